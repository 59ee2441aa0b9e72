"""Nested arguments and results of a layer, taken apart into tensors and everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@final
@dataclass(frozen=True, slots=True)
class Nested:
    """The structure of a nested value and its leaves, with None in the places of tensors."""

    spec: TreeSpec
    leaves: list[Any]
    positions: list[int]
    """Where among the leaves tensors belong."""

    @classmethod
    def apart(
        cls, value: Any, flatten: Callable[[Any], tuple[list[Any], TreeSpec]] = tree_flatten
    ) -> tuple[Nested, list[torch.Tensor]]:
        """Take `value` apart; the tensors in it, in order."""
        leaves, spec = flatten(value)
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[position] for position in positions]
        for position in positions:
            leaves[position] = None
        return cls(spec, leaves, positions), tensors

    def filled(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The leaves with `tensors` in their places."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return leaves

    def whole(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The value with `tensors` in their places."""
        return tree_unflatten(self.filled(tensors), self.spec)
