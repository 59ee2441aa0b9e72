"""What computing costs: one block of each kind is timed at the real tile, on weights that are zero, before anything runs.

For a machine that is not there, operations are counted instead.

Together with a profile of the machine this is what a plan is simulated with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from outsize.block import Record
from outsize.engine.batch import tiles
from outsize.engine.counting import estimated_s
from outsize.engine.head import Head, measured_tiles
from outsize.engine.hooks import without_user_hooks
from outsize.engine.modulestate import ModuleState
from outsize.engine.probe import BatchShape, Kind, Rehearsal, run_on_zeros
from outsize.engine.surroundings import Randomness
from outsize.plan import Direction
from outsize.plan.profile import Profile
from outsize.plan.simulate import Costs
from outsize.store import memory, offload

if TYPE_CHECKING:
    from outsize.engine.session import Session

Meter = Callable[[Callable[[], object]], float]
"""Says how many seconds a piece of computing takes."""

REPEATS = 2
"""Runs of which the fastest counts; one before them is not counted. How far they lie apart is the spread."""


class _Stopwatch:
    """Times pieces of computing on `device`; `spread` is by what part the slowest runs took longer than the fastest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fastest_s = self._slowest_s = 0.0

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of the fastest of REPEATS runs."""
        times = _times(self._device, run)
        self._fastest_s += min(times)
        self._slowest_s += max(times)
        return min(times)

    @property
    def spread(self) -> float:
        """Over all pieces, the long ones counting most; 0 where none was timed."""
        return self._slowest_s / self._fastest_s - 1 if self._fastest_s else 0.0


@dataclass(frozen=True, slots=True)
class _Seconds:
    forward: float
    backward: float


def measure_costs(
    session: Session,
    rehearsal: Rehearsal,
    shape: BatchShape,
    tile_rows: int,
    records: Sequence[Record],
    profile: Profile,
) -> Costs:
    """Seconds of each block's visits in a call of `shape`, its tiles of `tile_rows`. Takes a few visits of one block."""
    stopwatch = _Stopwatch(session.torch_device)
    seconds_of: Meter = stopwatch
    if session.torch_device.type == "meta":
        seconds_of = partial(estimated_s, profile, session.settings.compute_type)
    rows = shape.rows or rehearsal.rows
    by_kind = [_time_kind(session, kind, rehearsal, tile_rows, seconds_of) for kind in rehearsal.kinds]
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    kept_backward: dict[str, float] = {}
    trainable = {record.name: record.num_trainable for record in records}
    for module, index in rehearsal.kind_of.items():
        kind, seconds = rehearsal.kinds[index], by_kind[index]
        layer = session.points[module]
        is_tiled = rehearsal.dims.get(module) is not None
        parts = [tile.stop - tile.start for tile in tiles(rows, tile_rows)] if is_tiled else [rows]
        full = tile_rows if is_tiled else rows
        share = sum(parts) / full
        block = layer.blocks[-1]
        forward[block] = share * seconds.forward
        backward[block] = share * seconds.backward
        if kind.trains:
            # Each tile's gradients are added to the block's sum: one read of each, one write.
            size = session.dtype.itemsize + 8
            backward[block] += (
                len(parts) * sum(trainable[name] for name in layer.blocks) * size / profile.host_copy
            )
        kept_backward[block] = max(0.0, backward[block] - forward[block])  # without computing again
    for point in session.points.values():
        if isinstance(point, Head):
            _add_head(session, point, rows * shape.row_tokens, forward, backward, seconds_of)
            # A tied table is visited by the embedding as well, which takes next to nothing.
            visits = Counter((visit.block, visit.direction) for visit in rehearsal.visits)
            for name in point.blocks:
                forward[name] /= visits[name, Direction.FORWARD] or 1
                backward[name] /= visits[name, Direction.BACKWARD] or 1
    return Costs(
        forward,
        backward,
        kept_backward_s=kept_backward,
        input_bytes=_input_bytes(rehearsal, shape),
        spread=stopwatch.spread,
    )


def _input_bytes(rehearsal: Rehearsal, shape: BatchShape) -> dict[str, int]:
    """Bytes that each visit of a block sends to where inputs wait; small ones stay where they are."""
    visits = Counter(visit.block for visit in rehearsal.visits if visit.direction is Direction.FORWARD)
    sent = {
        block: num_bytes.at(shape.rows or rehearsal.rows) // visits[block]
        for block, num_bytes in rehearsal.sent_bytes.items()
    }
    return {block: num_bytes for block, num_bytes in sent.items() if num_bytes >= offload.LEAST_BYTES}


def _time_kind(
    session: Session, kind: Kind, rehearsal: Rehearsal, tile_rows: int, seconds_of: Meter
) -> _Seconds:
    dims = rehearsal.dims.get(kind.layer.point.module)
    tensors = []
    for index, (shape, dtype, requires_grad) in enumerate(kind.inputs):
        sizes = list(shape)
        dim = dims.inputs[index] if dims is not None else None
        if dim is not None:
            sizes[dim] = sizes[dim] // rehearsal.rows * tile_rows
        tensor = torch.zeros(sizes, dtype=dtype, device=session.torch_device)
        tensors.append(tensor.requires_grad_(requires_grad))

    def run(differentiates: bool) -> None:
        run_on_zeros(session, kind.layer, kind.call, tensors, kind.trains and differentiates, differentiates)

    state = ModuleState(kind.layer.module)
    with Randomness.current(session.device).restored(), without_user_hooks(session.module):
        forward = seconds_of(lambda: run(False))
        backward = seconds_of(lambda: run(True)) if kind.differentiates else 0.0
    state.restore()
    return _Seconds(forward, backward)


def _add_head(
    session: Session,
    head: Head,
    num_tokens: int,
    forward: dict[str, float],
    backward: dict[str, float],
    seconds_of: Meter,
) -> None:
    """The loss of `num_tokens`, row block by row block; those of one size are alike."""
    known: dict[int, _Seconds] = {}
    for name, start, stop in session.parameters.row_blocks(head.weight):
        rows = stop - start
        if rows not in known:
            go_forward, go_back, tile_tokens = measured_tiles(head, rows, num_tokens, session)
            share = num_tokens / tile_tokens
            known[rows] = _Seconds(share * seconds_of(go_forward), share * seconds_of(go_back))
        forward[name] = known[rows].forward
        backward[name] = known[rows].backward


def _times(device: torch.device, run: Callable[[], object]) -> list[float]:
    memory.give_back()  # what runs of another kind have freed may fit into nothing of this one
    run()
    times = []
    for _ in range(REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
