"""What a call of the model does and takes, as a dry run found it: what a plan is made from, beside limits and rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from outsize.plan.context import Visit


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A call's batch: `rows` is None where no argument tells it, and then nothing is tiled."""

    rows: int | None
    row_elements: int
    row_tokens: int


@dataclass(frozen=True, slots=True)
class BatchDims:
    """The batch dimension of each tensor that enters and leaves a visit; None where a tensor has none."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def tile_sizes(rows: int, tile_rows: int) -> list[int]:
    """The rows of each tile of a batch of `rows`, at most `tile_rows` each."""
    return [min(tile_rows, rows - start) for start in range(0, rows, tile_rows)]


@dataclass(frozen=True, slots=True)
class Linear:
    """A figure that grows with the batch: `fixed + rows * per_row`."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> int:
        """The figure at `rows`."""
        return int(self.fixed + rows * self.per_row)

    @classmethod
    def through(cls, figures: dict[int, float]) -> Linear:
        """The line through two points (through one and the origin if there is one only); it never falls."""
        (first, a), *rest = sorted(figures.items())
        if not rest:
            return cls(0.0, a / first)
        second, b = rest[0]
        per_row = max((b - a) / (second - first), 0.0)
        return cls(max(a - first * per_row, 0.0), per_row)


@dataclass(frozen=True, slots=True)
class LossMemory:
    """The peak memory of embedding, head and loss beside their weights, in bytes.

    `whole` counts logits that are not tiled. With tiles, `tiles` grows with the batch up to `most_tile_bytes`, the size
    at which a tile is full, and `beside_tiles` is what the loss holds beside its tiles.
    """

    whole: Linear
    tiles: Linear
    most_tile_bytes: int
    beside_tiles: Linear

    def at(self, rows: int) -> int:
        """Bytes in a batch of `rows`."""
        tiled = min(self.tiles.at(rows), self.most_tile_bytes) + self.beside_tiles.at(rows)
        return max(self.whole.at(rows), tiled)


@dataclass(frozen=True, slots=True)
class Activations:
    """The activations that the backward of one layer needs, over all its visits: bytes by rows of a tile."""

    blocks: tuple[str, ...]
    is_tiled: bool
    tile_bytes: Linear

    def bytes_at(self, rows: int, tile_rows: int) -> int:
        """Bytes of saving them all in a batch of `rows`."""
        sizes = tile_sizes(rows, tile_rows) if self.is_tiled else [rows]
        return sum(map(self.tile_bytes.at, sizes))


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that are alike, represented by the first of them.

    `at(tile_rows)` makes the inputs of a tile, and returns a function that computes it on weights of zero, with its
    backward or without, to be timed or counted.
    """

    at: Callable[[int], Callable[[bool], object]]
    trains: bool
    differentiates: bool


@dataclass(frozen=True, eq=False, slots=True)
class Workload:
    """What a call does, and calls of the same kind with rows of at most `row_elements`. Compared by identity."""

    visits: tuple[Visit, ...]
    row_elements: int
    rows: int
    """Rows of the batch that the dry run computed."""
    dims: dict[str, BatchDims | None]
    """By module of a layer; None where its batch dimension is unknown and it computes all rows at once."""
    boundary_bytes: Linear
    """Tensors that are saved between the forward and the backward of a call."""
    movable_bytes: Linear
    """Of these, tensors that take a gradient: they may wait in another tier."""
    input_bytes: Linear
    """Of these, the most that one visit has."""
    sent_bytes: dict[str, Linear]
    """Of these, what the visits of a layer are the first to save, by the layer's last block."""
    tile_bytes: Linear
    """The peak of a layer's visit beside its weights, by rows of a tile."""
    loss_memory: LossMemory
    kinds: tuple[Kind, ...]
    kind_of: dict[str, int]
    """The kind of each layer, by module."""
    changing: frozenset[str] = frozenset()
    """Layers, by module, that change buffers or attributes of their own in each forward."""
    uncut: str = ""
    """Why no layer is tiled, if part of the batch could not be computed."""
    activations: tuple[Activations, ...] = ()
    """Of the layers with matrices that a backward reaches, in the order of their last forward visits."""
    pages_bytes: int = 0
    """KV pages that the call reads and writes where blocks compute."""

    def last_layers(self, count: int) -> frozenset[str]:
        """The blocks of the `count` layers that are visited last: they hold activations for the shortest time."""
        layers = self.activations[max(0, len(self.activations) - count) :]
        return frozenset(block for layer in layers for block in layer.blocks)


class Call(NamedTuple):
    """A call of the model that memory is planned for."""

    workload: Workload
    shape: BatchShape
