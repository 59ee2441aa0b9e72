"""`timeline.json`: one step of a run in time, as it was predicted and as it was measured. Imports no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outsize.errors import ConfigError
from outsize.plan.profile import WORDS, Resource
from outsize.plan.timeline import Timeline
from outsize.train.output import METRICS, TIMELINE

VERSION = 1
"""Of the format; a file of another version is refused."""


MOST_DIFFERENCES = 3
"""That are told of a step."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How long a resource was busy in a step, in seconds."""

    resource: Resource
    predicted_s: float
    measured_s: float

    def __str__(self) -> str:
        return f"{WORDS[self.resource]}: predicted {seconds(self.predicted_s)}, measured {seconds(self.measured_s)}"


@dataclass(frozen=True)
class Trace:
    """Step `step` of the run `name`; `predicted` is None where the machine was not measured before."""

    name: str
    step: int
    predicted: Timeline | None
    measured: Timeline

    @property
    def timelines(self) -> dict[str, Timeline]:
        """Those that are there, by name, the prediction first."""
        both = {"predicted": self.predicted, "measured": self.measured}
        return {name: timeline for name, timeline in both.items() if timeline is not None}

    @property
    def resources(self) -> list[Resource]:
        """What was busy in either."""
        used = {span.resource for timeline in self.timelines.values() for span in timeline.spans}
        return [resource for resource in Resource if resource in used]

    def differences(self) -> list[Difference]:
        """How long each resource was busy, predicted and measured, those that differ most first."""
        if self.predicted is None:
            return []
        predicted, measured = self.predicted.busy_s, self.measured.busy_s
        found = [
            Difference(resource, predicted.get(resource, 0.0), measured.get(resource, 0.0))
            for resource in self.resources
        ]
        return sorted(found, key=lambda each: -abs(each.predicted_s - each.measured_s))

    def write(self, path: Path) -> None:
        """Write the file that `read` takes."""
        values: dict[str, Any] = {"version": VERSION, "step": self.step, "predicted": None}
        values |= {name: timeline.to_json() for name, timeline in self.timelines.items()}
        path.write_text(json.dumps(values, separators=(",", ":"), allow_nan=False), encoding="utf-8")

    @classmethod
    def read(cls, run: Path) -> Trace:
        """The trace in the folder of a run. Raises ConfigError where there is no run, no trace, or a damaged one."""
        path = _timeline_of(run)
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not JSON: {error}", hint="the file is damaged: train again to record another"
            ) from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ConfigError(
                f"{path}: version {version!r}, expected {VERSION}",
                hint="train again, with this version of Outsize, to record another",
            )
        step = values.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ConfigError(
                f"{path}: step is {step!r}", hint="the file is damaged: train again to record another"
            )
        predicted = values.get("predicted")
        return cls(
            os.fsencode(run.resolve().name).decode(errors="replace"),  # a name is bytes, and a page is text
            step,
            None if predicted is None else Timeline.from_json(predicted, f"{path}: predicted"),
            Timeline.from_json(values.get("measured"), f"{path}: measured"),
        )


def seconds(value: float) -> str:
    """A time in three digits.

    >>> [seconds(value) for value in (0.0, 0.0000042, 0.01234, 0.9997, 1.5, 1234.5)]
    ['0 s', '4.2 µs', '12.3 ms', '1 s', '1.5 s', '1,234 s']
    """
    value = float(f"{value:.3g}") if value < 1000 else value  # before the unit is chosen: 999.7 ms are 1 s
    if value >= 1000:
        return f"{value:,.0f} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s"


def _timeline_of(run: Path) -> Path:
    if not run.is_dir():
        partial = run.with_name(f"{run.name}.partial")
        raise ConfigError(
            f"{run} is not a folder" if run.exists() else f"no such folder: {run}",
            hint=f"the run is not complete; what it has so far is in {partial}"
            if partial.is_dir()
            else "pass the folder that outsize train wrote with --out",
        )
    if (path := run / TIMELINE).is_file():
        return path
    if not (run / METRICS).is_file():
        raise ConfigError(
            f"{run} holds no run: it has no {METRICS}",
            hint="pass the folder that outsize train wrote with --out",
        )
    raise ConfigError(
        f"{run} has no {TIMELINE}: no step of that run was recorded",
        hint="train for 4 steps or more; one that follows an evaluation is not recorded (--trace-step chooses which)",
    )
