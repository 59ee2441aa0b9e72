"""A step in time: what each resource did when, what computing waited for, and the memory taken meanwhile.

One value for both sides of a comparison: `Timeline.simulated` makes it from a simulation, the engine from what it
recorded. As JSON it is one object; times are seconds from the start of the step:

    {"step_s": 1.5,
     "spans":  [[resource, start_s, end_s, label, num_bytes], ...],
     "stalls": [[start_s, end_s, cause], ...],
     "memory": {tier: [[time_s, num_bytes], ...], ...}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outsize.errors import ConfigError
from outsize.plan.profile import Resource
from outsize.plan.simulate import Simulation, Stall

_LONGEST_S = 1e9
_MOST_BYTES = 1 << 62
"""What a file may say at most, so that whatever is computed of it is finite."""


@dataclass(frozen=True, slots=True)
class Span:
    """A resource works from `start_s` to `end_s`, in seconds; `num_bytes` is 0 where nothing is moved.

    In a simulation, what was under way when the step began starts below 0, and what went on after it ends above `step_s`.
    A recording holds what began within the step and was over with it, and what a device was given to copy meanwhile.
    """

    resource: Resource
    start_s: float
    end_s: float
    label: str
    num_bytes: int = 0


Memory = Mapping[str, tuple[tuple[float, int], ...]]
"""Bytes over time, by tier."""


@dataclass(frozen=True)
class Timeline:
    """One step of `step_s` seconds; `spans` and `stalls` in the order in which they start."""

    step_s: float
    spans: tuple[Span, ...]
    stalls: tuple[Stall, ...]
    memory: Memory

    @classmethod
    def simulated(cls, simulation: Simulation, memory_bytes: Mapping[str, int]) -> Timeline:
        """The step of a simulation; `memory_bytes` are what each tier has at most, the step through."""
        begin, step_s = simulation.start_s, simulation.step_s
        spans = [
            Span(
                event.task.resource,
                event.start_s - begin,
                event.end_s - begin,
                event.task.label,
                event.task.num_bytes,
            )
            for event in simulation.events
            if event.end_s > event.start_s
        ]
        stalls = [
            Stall(stall.start_s - begin, stall.end_s - begin, stall.cause)
            for stall in simulation.stalls
            if stall.end_s > stall.start_s
        ]
        return cls(
            step_s,
            tuple(sorted(spans, key=lambda span: span.start_s)),
            tuple(sorted(stalls, key=lambda stall: stall.start_s)),
            {tier: ((0.0, num_bytes), (step_s, num_bytes)) for tier, num_bytes in memory_bytes.items()},
        )

    @property
    def busy_s(self) -> dict[Resource, float]:
        """Seconds within the step in which each resource did anything, however much at once."""
        busy: dict[Resource, float] = {}
        until: dict[Resource, float] = {}
        for span in self.spans:
            start_s = max(span.start_s, until.get(span.resource, 0.0))
            end_s = min(span.end_s, self.step_s)
            if end_s > start_s:
                busy[span.resource] = busy.get(span.resource, 0.0) + end_s - start_s
                until[span.resource] = end_s
        return {resource: busy[resource] for resource in Resource if resource in busy}

    @property
    def stall_s(self) -> dict[Resource, float]:
        """Seconds in which computing waited, by what for."""
        waited: dict[Resource, float] = {}
        for stall in self.stalls:
            waited[stall.cause] = waited.get(stall.cause, 0.0) + stall.end_s - stall.start_s
        return {resource: waited[resource] for resource in Resource if resource in waited}

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` takes."""
        return {
            "step_s": self.step_s,
            "spans": [[s.resource, s.start_s, s.end_s, s.label, s.num_bytes] for s in self.spans],
            "stalls": [[s.start_s, s.end_s, s.cause] for s in self.stalls],
            "memory": {tier: [list(point) for point in points] for tier, points in self.memory.items()},
        }

    @classmethod
    def from_json(cls, values: Any, where: str) -> Timeline:
        """The timeline that `values` describe. Raises ConfigError naming the part that is missing or wrong."""
        part = "the object"
        try:
            part = "step_s"
            step_s = _seconds(values["step_s"])
            if step_s <= 0:
                raise ValueError(f"{step_s} is no length")
            part = "spans"
            spans = [
                Span(Resource(resource), *_interval(start_s, end_s), _text(label), _count(num_bytes))
                for resource, start_s, end_s, label, num_bytes in values["spans"]
            ]
            part = "stalls"
            stalls = [
                Stall(*_interval(start_s, end_s), Resource(cause))
                for start_s, end_s, cause in values["stalls"]
            ]
            part = "memory"
            memory = {
                _text(tier): tuple((_seconds(time_s), _count(num_bytes)) for time_s, num_bytes in points)
                for tier, points in values["memory"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = "is missing" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ConfigError(
                f"{where}: {part} {what}", hint="the file is damaged: train again to record another"
            ) from error
        return cls(step_s, tuple(spans), tuple(stalls), memory)


def tracks(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans, given in the order in which they start, side by side: within one track none overlap."""
    found: list[list[Span]] = []
    for span in spans:
        track = next((track for track in found if track[-1].end_s <= span.start_s), None)
        if track is None:
            found.append([span])
        else:
            track.append(span)
    return found


def _seconds(value: Any) -> float:
    # Not `> _LONGEST_S`: a NaN is neither above nor below.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LONGEST_S:
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _interval(start_s: Any, end_s: Any) -> tuple[float, float]:
    start, end = _seconds(start_s), _seconds(end_s)
    if end < start:
        raise ValueError(f"{end} comes before {start}")
    return start, end


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # a lone surrogate, which no file can hold, is a ValueError too
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_BYTES:
        raise ValueError(f"{value!r} is no number of bytes")
    return value
