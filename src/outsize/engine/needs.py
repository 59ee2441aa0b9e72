"""What the activations of a call take: tensors between visits, and the most that one visit takes beside its weights."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.block import ALIGNMENT, align
from outsize.config import Home
from outsize.plan import Direction
from outsize.plan.workload import BatchShape, Workload
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


def kept_bytes(workload: Workload, shape: BatchShape, tile_rows: int, kept: frozenset[str]) -> int:
    """What the activations of the layers in `kept` take between forward and backward."""
    return sum(
        layer.bytes_at(shape.rows or 1, tile_rows)
        for layer in workload.activations
        if kept.issuperset(layer.blocks)
    )


def needs_at(
    workload: Workload,
    shape: BatchShape,
    tile_rows: int,
    inputs: Home | None = None,
    kept: frozenset[str] = frozenset(),
) -> Needs:
    """Of a call of this shape, in tiles of so many rows, where inputs of blocks wait in `inputs` and `kept` keep all."""
    rows = shape.rows or 1
    is_tiled = bool(workload.dims) and all(dims is not None for dims in workload.dims.values())
    tile = workload.tile_bytes.at(tile_rows if is_tiled else rows)
    visit = max(tile, workload.loss_memory.at(rows))
    boundary = workload.boundary_bytes.at(rows) + kept_bytes(workload, shape, tile_rows, kept)
    each = workload.input_bytes.at(rows)
    if inputs is None or each < offload.LEAST_BYTES:
        return Needs(boundary, visit, kept=kept)
    movable = workload.movable_bytes.at(rows)
    num_kept = sum(v.block in kept and v.direction is Direction.FORWARD for v in workload.visits)
    # Each input takes whole pages.
    moved = align(movable + ALIGNMENT * len(workload.visits))
    return Needs(boundary - movable + (offload.COPIES + num_kept) * each, visit, moved, inputs, kept)


def needs_of(attempt: Attempt, workload: Workload, shape: BatchShape) -> Needs:
    """Of a call of this shape, made in this way."""
    kept = workload.last_layers(attempt.kept_blocks)
    return needs_at(workload, shape, attempt.tile_rows, attempt.inputs, kept)
