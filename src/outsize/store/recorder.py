"""Records computing, updates, transfers and waits of one step, and makes a timeline of them.

The executor reports visits and waits, the optimizer worker chunks, tiers and links transfers; each checks one attribute for
None while nothing is recorded. Reports come from any thread and are appended to a list without a lock. Points in time are
those of the device that computes: on a GPU they are events, which are read at the end.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from outsize.plan import Op, Visit
from outsize.plan.profile import Resource
from outsize.plan.simulate import Stall
from outsize.plan.timeline import Span, Timeline
from outsize.store import memory
from outsize.tier import Device, Moment, at

SHORTEST_STALL_S = 1e-4
"""A shorter wait had nothing to wait for: it is the interpreter's own time."""

_CLOCK_S = 1e-5
"""Difference with which two threads may see the same moment."""

_ANY = tuple(Resource)


class Recorder:
    """One step, from `begin` to `timeline`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._start_s = 0.0
        self._spans: list[tuple[Resource, str, int, Moment, Moment]] = []
        self._waits: list[tuple[str, Sequence[Resource], Moment, Moment]] = []
        self._memory: list[tuple[float, int, int]] = []

    def begin(self) -> None:
        """Start the step."""
        self._start_s = time.perf_counter()
        self._sample()

    def moment(self) -> Moment:
        """The present point in time of computing."""
        return self._device.moment()

    def visited(self, visits: Sequence[Visit], began: Moment) -> None:
        """Record a visit that ends now."""
        label = ", ".join(f"{visit.direction} {visit.block}" for visit in visits)
        self._spans.append((Resource.COMPUTE, label, 0, began, self.moment()))
        self._sample()

    def ran(self, op: Op, began: Moment, *, in_place: bool) -> None:
        """Record an operation between visits that ends now; an update `in_place` runs where blocks compute."""
        if op.ended_by:
            self.waited(op.block, op.ended_by, began)
        elif op.computes and (in_place or op.resource is not Resource.UPDATE):
            self._spans.append((Resource.COMPUTE, f"{op.computes} {op.block}", 0, began, self.moment()))

    def waited(self, block: str, ended_by: Sequence[Resource], began: Moment) -> None:
        """Record that computing waited, since `began`, for a transfer or an update of `block`."""
        self._waits.append((block, ended_by, began, self.moment()))

    def updated(self, block: str, start_s: float) -> None:
        """Record that the host updated a part of a block."""
        self._spans.append((Resource.UPDATE, f"update {block}", 0, at(start_s), at(time.perf_counter())))

    def moved(self, verb: str, label: str, num_bytes: int, start: Moment, end: Moment) -> None:
        """Record a transfer or a piece of one; a `Listener`."""
        self._spans.append((Resource(verb), f"{verb} {label}", num_bytes, start, end))

    def _sample(self) -> None:
        """Record the memory in use now."""
        device = self._device.torch_device
        beside = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._memory.append((time.perf_counter() - self._start_s, memory.resident_bytes(), beside))

    def timeline(self) -> Timeline:
        """End the step, and return its timeline."""
        step_s = time.perf_counter() - self._start_s
        self._sample()
        begin = self._start_s
        spans = [
            Span(resource, start() - begin, end() - begin, label, num_bytes)
            for resource, label, num_bytes, start, end in list(self._spans)
        ]
        spans = sorted(
            (span for span in spans if span.end_s > max(0.0, span.start_s) and span.start_s < step_s),
            key=lambda span: span.start_s,
        )
        of_block = _by_block(spans)
        stalls: list[Stall] = []
        for block, ended_by, start, end in self._waits:
            start_s, end_s = start() - begin, end() - begin
            if end_s - start_s >= SHORTEST_STALL_S:
                stalls += reversed(list(causes(ended_by, start_s, end_s, of_block.get(block, ()))))
        tiers = {"host": tuple((time_s, host) for time_s, host, _ in self._memory)}
        if self._device.torch_device.type == "cuda":
            tiers["device"] = tuple((time_s, beside) for time_s, _, beside in self._memory)
        return Timeline(step_s, tuple(spans), tuple(sorted(stalls, key=lambda stall: stall.start_s)), tiers)


def causes(
    ended_by: Sequence[Resource], start_s: float, end_s: float, own: Sequence[Span]
) -> Iterator[Stall]:
    """The causes of a wait, backwards in time. `own` are the spans of its block, in the order of their ends.

    As in the simulation: first the span that ended the wait, then the spans that it had to come after.
    """
    kinds, cause = ended_by, ended_by[0]
    until_s = before_s = end_s
    for span in reversed(own):
        if span.end_s <= start_s:
            break
        if span.resource not in kinds or span.end_s > before_s + _CLOCK_S:
            continue
        if kinds is not _ANY:
            cause, kinds = span.resource, _ANY  # what ended the wait; before it there may be anything
        elif span.resource is not cause and span.end_s < until_s:
            yield Stall(span.end_s, until_s, cause)
            until_s, cause = span.end_s, span.resource
        before_s = span.start_s
    if until_s > start_s:
        yield Stall(start_s, until_s, cause)


def _by_block(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Spans by the block that their label names, such as `read L07.state[3]`, in the order of their ends."""
    found: defaultdict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.end_s):
        if span.resource is not Resource.COMPUTE:
            found[span.label.partition(" ")[2].partition(".")[0]].append(span)
    return found
