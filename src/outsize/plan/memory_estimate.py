"""What the activations of a call take: tensors between visits, and the most that one visit takes beside its weights."""

from __future__ import annotations

from collections import Counter

from outsize.block import ALIGNMENT, align
from outsize.config import Home
from outsize.plan.context import Direction
from outsize.plan.ledger import Ledger
from outsize.plan.workload import BatchShape, Workload

LEAST_INPUT_BYTES = 1 << 20
"""Smaller inputs stay where blocks compute."""

INPUT_COPIES = 4
"""Visits whose inputs are where blocks compute at once: in use, just made, and those on their way down or up."""

INPUT_PART_BYTES = 4 << 20
INPUT_BUFFERS = 8
"""Parts that are between memory and the disk at once, half of them each way."""


def input_buffers_bytes() -> int:
    """Host memory that inputs pass through on their way to the disk and back."""
    return INPUT_BUFFERS * INPUT_PART_BYTES


def input_bytes(workload: Workload, shape: BatchShape) -> dict[str, int]:
    """Bytes that each visit of a block sends to where inputs wait; small ones stay where they are."""
    visits = Counter(visit.block for visit in workload.visits if visit.direction is Direction.FORWARD)
    sent = {
        block: num_bytes.at(shape.rows or workload.rows) // visits[block]
        for block, num_bytes in workload.sent_bytes.items()
    }
    return {block: num_bytes for block, num_bytes in sent.items() if num_bytes >= LEAST_INPUT_BYTES}


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
    computes_in: Home,
    inputs: Home,
    kept: frozenset[str] = frozenset(),
) -> Ledger:
    """The ledger of a call's activations in tiles of `tile_rows`, and of its KV pages.

    Inputs of blocks wait in `inputs`, which may be where blocks compute. The blocks in `kept` save all their activations.
    """
    rows = shape.rows or 1
    is_tiled = bool(workload.dims) and all(dims is not None for dims in workload.dims.values())
    visit = max(workload.tile_bytes.at(tile_rows if is_tiled else rows), workload.loss_memory.at(rows))
    boundary = workload.boundary_bytes.at(rows) + saved_bytes(workload, shape, tile_rows, kept)
    each = workload.input_bytes.at(rows)
    pages = Ledger.of(computes_in, kv=workload.pages_bytes)
    if inputs is computes_in or each < LEAST_INPUT_BYTES:
        return activations(computes_in, boundary, visit) + pages
    movable = workload.movable_bytes.at(rows)
    num_kept = sum(v.block in kept and v.direction is Direction.FORWARD for v in workload.visits)
    boundary += (INPUT_COPIES + num_kept) * each - movable
    # Each input takes whole pages.
    moved = align(movable + ALIGNMENT * len(workload.visits))
    return activations(computes_in, boundary, visit, inputs, moved) + pages


def activations(
    computes_in: Home, boundary: int, visit: int, inputs: Home | None = None, moved: int = 0
) -> Ledger:
    """The lines of `boundary` bytes between visits, `visit` bytes of the largest visit, and inputs that wait elsewhere."""
    here = Ledger.of(computes_in, activations=boundary, visit=visit)
    if inputs is None:
        return here
    buffers = input_buffers_bytes() if inputs is Home.DISK else 0
    return here + Ledger.of(inputs, inputs=moved) + Ledger.of(Home.HOST, input_buffers=buffers)
