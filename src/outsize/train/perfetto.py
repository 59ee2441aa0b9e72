"""A trace in the format that ui.perfetto.dev and chrome://tracing open: two processes, predicted and measured.

Each resource is a thread; where several transfers are under way at once, there is a thread for each. Memory is a counter
per tier. Times are microseconds; what began before the step begins with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from outsize.plan.profile import WORDS, Resource
from outsize.plan.timeline import Timeline, tracks
from outsize.train.trace import Trace

MARK = '"by":"outsize trace"'
"""By which one knows a file of ours."""

_TRACKS = 1000
"""Threads of one resource, at most."""

Event = dict[str, Any]


def perfetto(trace: Trace) -> str:
    """The file's text."""
    events = [
        event
        for process, (name, timeline) in enumerate(trace.timelines.items(), 1)
        for event in _process(process, name, timeline)
    ]
    values = {
        "otherData": {"by": "outsize trace", "run": trace.name, "step": trace.step},
        "displayTimeUnit": "ms",
        "traceEvents": events,
    }
    return json.dumps(values, separators=(",", ":"), allow_nan=False)


def _process(process: int, name: str, timeline: Timeline) -> Iterator[Event]:
    yield _named("process_name", process, 0, name)
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    for place, resource in enumerate(Resource, 1):
        own = [span for span in timeline.spans if span.resource is resource]
        for index, track in enumerate(tracks(own)):
            thread = _TRACKS * place + index
            words = WORDS[resource] + (f" ({index + 1})" if index else "")
            yield _named("thread_name", process, thread, words)
            for span in track:
                more = {"bytes": span.num_bytes} if span.num_bytes else {}
                yield _slice(process, thread, span.label, resource, span.start_s, span.end_s, more)
    if timeline.stalls:
        yield _named("thread_name", process, 1, "computing waits")
    for stall in timeline.stalls:
        words = f"waits for {WORDS[stall.cause]}"
        yield _slice(process, 1, words, stall.cause, stall.start_s, stall.end_s, {})
    for tier, points in timeline.memory.items():
        for time_s, num_bytes in points:
            yield {
                "ph": "C",
                "name": f"memory: {tier}",
                "pid": process,
                "ts": _microseconds(time_s),
                "args": {"bytes": num_bytes},
            }


def _named(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(
    process: int,
    thread: int,
    name: str,
    resource: Resource,
    start_s: float,
    end_s: float,
    more: dict[str, int],
) -> Event:
    start, end = _microseconds(start_s), _microseconds(end_s)
    return {
        "ph": "X",
        "name": name,
        "cat": resource,
        "pid": process,
        "tid": thread,
        "ts": start,
        "dur": round(end - start, 3),
        "args": more,
    }


def _microseconds(time_s: float) -> float:
    return round(max(time_s, 0.0) * 1e6, 3)
