"""Which dimension of a tensor is the batch, and how a batch is cut into tiles.

Found by running the call at two batch sizes and comparing shapes: a dimension that grows in proportion is the batch,
or, where it leads, a multiple of it (BLOOM's alibi is `[B*heads, 1, S]`, router logits are `[B*S, E]`). Never guessed
from equal sizes; where it is unclear a block runs the whole batch as one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Shape = tuple[int, ...]

Tensors: TypeAlias = Sequence[Tensor]

Gradients: TypeAlias = Sequence[Tensor | None]
"""Of some tensors, in their order."""


def find_dims(
    shapes: Sequence[Shape], others: Sequence[Shape], rows: int, other_rows: int
) -> tuple[int | None, ...] | None:
    """The batch dimension of each shape, seen at `rows` and at `other_rows`; None as a whole where one is unclear."""
    if len(shapes) != len(others):
        return None
    dims: list[int | None] = []
    for shape, other in zip(shapes, others, strict=True):
        if len(shape) != len(other):
            return None
        growing = [dim for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
        if not growing:
            dims.append(None)
            continue
        dim = growing[0]
        is_multiple = shape[dim] * other_rows == other[dim] * rows and shape[dim] % rows == 0
        if len(growing) > 1 or not is_multiple or (shape[dim] != rows and dim != 0):
            return None
        dims.append(dim)
    return tuple(dims)


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows `[start, stop)` of a batch of `rows`."""

    start: int
    stop: int
    rows: int

    @property
    def is_whole(self) -> bool:
        """Whether the tile is the whole batch."""
        return self.stop - self.start == self.rows

    def of(self, tensor: Tensor, dim: int | None) -> Tensor:
        """The tile's part of `tensor`, a view; `tensor` itself where it has no batch."""
        if dim is None or self.is_whole:
            return tensor
        per_row = tensor.shape[dim] // self.rows
        return tensor.narrow(dim, self.start * per_row, (self.stop - self.start) * per_row)


def tiles(rows: int, tile_rows: int) -> Iterator[Tile]:
    """Cut `rows` into tiles of at most `tile_rows`."""
    for start in range(0, rows, tile_rows):
        yield Tile(start, min(start + tile_rows, rows), rows)


class UnevenTiles(Exception):
    """An output without a batch dimension differs between tiles: it depends on the whole batch."""


class TiledOutput:
    """Collects the outputs of tiles into whole tensors."""

    def __init__(self, dims: Sequence[int | None] | None) -> None:
        self._dims = dims
        self.tensors: list[Tensor] = []

    def add(self, tile: Tile, outputs: Sequence[Tensor]) -> None:
        """Take one tile's outputs. Raises UnevenTiles where the outputs of tiles cannot be put together."""
        if tile.is_whole:
            self.tensors = list(outputs)
            return
        assert self._dims is not None
        if not self.tensors:
            made = []
            for output, dim in zip(outputs, self._dims, strict=True):
                shape = list(output.shape)
                if dim is not None:
                    shape[dim] = shape[dim] // (tile.stop - tile.start) * tile.rows
                made.append(output.new_empty(shape))
            self.tensors = made  # all, or, where memory runs out, none
        for whole, output, dim in zip(self.tensors, outputs, self._dims, strict=True):
            if dim is None and tile.start > 0 and not torch.equal(whole, output):
                raise UnevenTiles
            tile.of(whole, dim).copy_(output)


@dataclass(eq=False, slots=True)
class Graph:
    """A tile's inputs and outputs, with the graph between them; `versions` are those of the outputs when it was made."""

    inputs: Tensors
    outputs: Tensors
    versions: list[int]

    @property
    def is_current(self) -> bool:
        """Whether no output was changed in place since: the graph may have saved it."""
        return self.versions == [output._version for output in self.outputs]


class Graphs(dict[Tile, Graph]):
    """The graphs that one visit saves, by tile; empty if its backward computes again."""
