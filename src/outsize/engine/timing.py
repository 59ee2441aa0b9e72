"""The costs of computing: one block of each kind is timed at the real tile size, on weights of zero, before anything runs.

For a machine that is not there, operations are counted instead.

Together with a profile of the machine this is what a plan is simulated with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch

from outsize.block import Record
from outsize.engine.counting import estimated_s
from outsize.engine.dry_run import AnyPoint
from outsize.engine.head import Head
from outsize.engine.hooks import without_user_hooks
from outsize.engine.model import Model
from outsize.engine.modulestate import ModuleState
from outsize.engine.rng_autocast import RngState
from outsize.plan import Direction, memory_estimate
from outsize.plan.lower import Costs
from outsize.plan.profile import Profile
from outsize.plan.workload import Call, Kind, tile_sizes
from outsize.store import memory

Meter = Callable[[Callable[[], object]], float]
"""Returns the seconds that a function takes to compute."""

REPEATS = 2
"""Timed runs, of which the fastest counts; a run before them is not timed. Their relative difference is the spread."""


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


Seconds: TypeAlias = tuple[float, float]
"""Of a visit, forward and backward."""


def measure_costs(
    model: Model,
    points: Mapping[str, AnyPoint],
    call: Call,
    tile_rows: int,
    records: Sequence[Record],
    profile: Profile,
) -> Costs:
    """Seconds of each block's visits in `call`, its tiles of `tile_rows`. Takes a few visits of one block."""
    stopwatch = _Stopwatch(model.torch_device)
    seconds_of: Meter = stopwatch
    if model.torch_device.type == "meta":
        seconds_of = partial(estimated_s, profile, model.main_type)
    workload, shape = call
    rows = shape.rows or workload.rows
    state = ModuleState(model.module)
    with RngState.current(model.device).restored(), without_user_hooks(model.module):
        by_kind = [_time_kind(kind, tile_rows, seconds_of) for kind in workload.kinds]
    state.restore()
    seconds: dict[str, Seconds] = {}
    trainable = {record.name: record.num_trainable for record in records}
    for module, index in workload.kind_of.items():
        kind, layer = workload.kinds[index], points[module]
        is_tiled = workload.dims.get(module) is not None
        parts = tile_sizes(rows, tile_rows) if is_tiled else [rows]
        share = sum(parts) / (tile_rows if is_tiled else rows)
        forward, backward = (share * each for each in by_kind[index])
        if kind.trains:
            # Each tile's gradients are added to the block's sum: one read of each, one write.
            num_bytes = sum(trainable[name] for name in layer.blocks) * (model.dtype.itemsize + 8)
            backward += len(parts) * num_bytes / profile.host_copy
        seconds[layer.blocks[-1]] = forward, backward
    kept_backward = {block: max(0.0, backward - forward) for block, (forward, backward) in seconds.items()}
    # A tied table is visited by the embedding as well, which takes next to nothing.
    visits = Counter((visit.block, visit.direction) for visit in workload.visits)
    for point in points.values():
        if isinstance(point, Head):
            for name, (forward, backward) in _time_head(model, point, rows * shape.row_tokens, seconds_of):
                forward /= visits[name, Direction.FORWARD] or 1
                seconds[name] = forward, backward / (visits[name, Direction.BACKWARD] or 1)
    return Costs(
        {block: forward for block, (forward, _) in seconds.items()},
        {block: backward for block, (_, backward) in seconds.items()},
        kept_backward_s=kept_backward,  # without computing again
        input_bytes=memory_estimate.input_bytes(*call),
        spread=stopwatch.spread,
    )


def _time_kind(kind: Kind, tile_rows: int, seconds_of: Meter) -> Seconds:
    run = kind.at(tile_rows)
    return seconds_of(partial(run, False)), seconds_of(partial(run, True)) if kind.differentiates else 0.0


def _time_head(model: Model, head: Head, num_tokens: int, seconds_of: Meter) -> Iterator[tuple[str, Seconds]]:
    """The loss of `num_tokens`, row block by row block; those of one size are alike."""
    known: dict[int, Seconds] = {}
    for name, start, stop in model.parameters.row_blocks(head.weight):
        rows = stop - start
        if rows not in known:
            go_forward, go_back, tile_tokens = head.timed_tile(rows, num_tokens)
            share = num_tokens / tile_tokens
            known[rows] = share * seconds_of(go_forward), share * seconds_of(go_back)
        yield name, known[rows]


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
