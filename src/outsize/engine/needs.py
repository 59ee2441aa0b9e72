"""What the activations of a call take: tensors between visits, and the most that one visit takes beside its weights."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.block import ALIGNMENT, align
from outsize.config import Home
from outsize.engine.probe import BatchShape, Rehearsal
from outsize.plan import Direction
from outsize.store import offload


@dataclass(frozen=True, slots=True)
class Needs:
    """What activations take: tensors kept between visits, and the most that one visit takes beside its weights."""

    boundary_bytes: int
    visit_bytes: int
    moved_bytes: int = 0
    """Of the boundary, what waits elsewhere; `boundary_bytes` counts the rest."""
    inputs: Home | None = None
    """Where it waits."""
    kept: frozenset[str] = frozenset()
    """Blocks whose activations the boundary holds too."""

    @property
    def host_bytes(self) -> int:
        """Memory of the host that it takes: its own or, on the way to the disk, that of buffers."""
        return offload.BUFFERS_BYTES if self.inputs is Home.DISK else self.moved_bytes

    @property
    def num_bytes(self) -> int:
        """What is taken where blocks compute."""
        return self.boundary_bytes + self.visit_bytes


@dataclass(frozen=True, slots=True)
class Attempt:
    """A way to make it fit: tiles of so many rows; with room for a second visit; inputs elsewhere than blocks compute."""

    tile_rows: int
    is_roomy: bool
    inputs: Home | None
    kept_blocks: int = 0
    """Layers that keep their activations."""


def last_layers(rehearsal: Rehearsal, count: int) -> frozenset[str]:
    """The blocks of the `count` layers that a call visits last: what they keep is kept for the shortest time."""
    layers = rehearsal.activations[max(0, len(rehearsal.activations) - count) :]
    return frozenset(block for layer in layers for block in layer.blocks)


def kept_bytes(rehearsal: Rehearsal, shape: BatchShape, tile_rows: int, kept: frozenset[str]) -> int:
    """What the activations of the layers in `kept` take between forward and backward."""
    return sum(
        layer.bytes_at(shape.rows or 1, tile_rows)
        for layer in rehearsal.activations
        if kept.issuperset(layer.blocks)
    )


def needs_at(
    rehearsal: Rehearsal,
    shape: BatchShape,
    tile_rows: int,
    inputs: Home | None = None,
    kept: frozenset[str] = frozenset(),
) -> Needs:
    """Of a call of this shape, in tiles of so many rows, where inputs of blocks wait in `inputs` and `kept` keep all."""
    rows = shape.rows or 1
    is_tiled = bool(rehearsal.dims) and all(dims is not None for dims in rehearsal.dims.values())
    tile = rehearsal.tile_bytes.at(tile_rows if is_tiled else rows)
    visit = max(tile, rehearsal.loss_memory.at(rows))
    boundary = rehearsal.boundary_bytes.at(rows) + kept_bytes(rehearsal, shape, tile_rows, kept)
    each = rehearsal.input_bytes.at(rows)
    if inputs is None or each < offload.LEAST_BYTES:
        return Needs(boundary, visit, kept=kept)
    movable = rehearsal.movable_bytes.at(rows)
    num_kept = sum(v.block in kept and v.direction is Direction.FORWARD for v in rehearsal.visits)
    # Each input takes whole pages.
    moved = align(movable + ALIGNMENT * len(rehearsal.visits))
    return Needs(boundary - movable + (offload.COPIES + num_kept) * each, visit, moved, inputs, kept)


def needs_of(attempt: Attempt, rehearsal: Rehearsal, shape: BatchShape) -> Needs:
    """Of a call of this shape, made in this way."""
    kept = last_layers(rehearsal, attempt.kept_blocks)
    return needs_at(rehearsal, shape, attempt.tile_rows, attempt.inputs, kept)
