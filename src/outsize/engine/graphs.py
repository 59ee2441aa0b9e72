"""Autograd graphs that a visit saves for its backward instead of computing again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outsize.engine.batch import Tile

Outputs = list[torch.Tensor]


@dataclass(eq=False, slots=True)
class Graph:
    """A tile's inputs and outputs, with the graph between them; `versions` are those of the outputs when it was made."""

    inputs: list[torch.Tensor]
    outputs: Outputs
    versions: list[int]

    @property
    def is_current(self) -> bool:
        """Whether no output was changed in place since: the graph may have saved it."""
        return self.versions == [output._version for output in self.outputs]


class Graphs(dict[Tile, Graph]):
    """The graphs that one visit saves, by tile; empty if its backward computes again."""
