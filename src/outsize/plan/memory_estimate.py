"""What the activations of a call take: tensors between visits, and the most that one visit takes beside its weights."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.block import ALIGNMENT, align
from outsize.config import Home
from outsize.plan.context import Direction
from outsize.plan.workload import BatchShape, Workload

LEAST_INPUT_BYTES = 1 << 20
"""Smaller inputs stay where blocks compute."""

INPUT_COPIES = 4
"""Visits whose inputs are where blocks compute at once: in use, just made, and those on their way down or up."""

INPUT_PART_BYTES = 4 << 20
INPUT_BUFFERS = 8
"""Parts that are between memory and the disk at once, half of them each way."""


def input_buffers_bytes() -> int:
    """Memory of the host that inputs pass through on their way to the disk and back."""
    return INPUT_BUFFERS * INPUT_PART_BYTES


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to compute a call."""

    tile_rows: int
    """Rows that a layer computes at once."""
    is_roomy: bool
    """Whether there is room for the freed memory of a second visit."""
    inputs: Home | None
    """Where inputs of blocks wait for their backward; None: where blocks compute."""
    kept_blocks: int = 0
    """Layers that save their activations instead of computing them again."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of activations of a call, computed in one way."""

    boundary_bytes: int
    """Tensors between visits, where blocks compute."""
    visit_bytes: int
    """The most that one visit takes beside its weights."""
    moved_bytes: int = 0
    """Tensors between visits that wait in `inputs`."""
    inputs: Home | None = None
    kept: frozenset[str] = frozenset()
    """Blocks whose activations the boundary counts too."""

    @property
    def host_bytes(self) -> int:
        """Memory of the host for tensors that wait there, or for the buffers through which they pass to the disk."""
        return input_buffers_bytes() if self.inputs is Home.DISK else self.moved_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes where blocks compute."""
        return self.boundary_bytes + self.visit_bytes


def saved_bytes(workload: Workload, shape: BatchShape, tile_rows: int, kept: frozenset[str]) -> int:
    """The activations of the layers in `kept` between forward and backward."""
    return sum(
        layer.bytes_at(shape.rows or 1, tile_rows)
        for layer in workload.activations
        if kept.issuperset(layer.blocks)
    )


def estimate(
    workload: Workload,
    shape: BatchShape,
    tile_rows: int,
    inputs: Home | None = None,
    kept: frozenset[str] = frozenset(),
) -> MemoryEstimate:
    """Of a call of this shape in tiles of `tile_rows`, whose inputs wait in `inputs` and whose blocks `kept` save all."""
    rows = shape.rows or 1
    is_tiled = bool(workload.dims) and all(dims is not None for dims in workload.dims.values())
    tile = workload.tile_bytes.at(tile_rows if is_tiled else rows)
    visit = max(tile, workload.loss_memory.at(rows))
    boundary = workload.boundary_bytes.at(rows) + saved_bytes(workload, shape, tile_rows, kept)
    each = workload.input_bytes.at(rows)
    if inputs is None or each < LEAST_INPUT_BYTES:
        return MemoryEstimate(boundary, visit, kept=kept)
    movable = workload.movable_bytes.at(rows)
    num_kept = sum(v.block in kept and v.direction is Direction.FORWARD for v in workload.visits)
    # Each input takes whole pages.
    moved = align(movable + ALIGNMENT * len(workload.visits))
    here = boundary - movable + (INPUT_COPIES + num_kept) * each
    return MemoryEstimate(here, visit, moved, inputs, kept)


def estimate_of(variant: Variant, workload: Workload, shape: BatchShape) -> MemoryEstimate:
    """Of a call of this shape, computed in this way."""
    kept = workload.last_layers(variant.kept_blocks)
    return estimate(workload, shape, variant.tile_rows, variant.inputs, kept)
