"""Predicted beside measured: how right the plan was, said at the end of every run that had a prediction."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outsize.config import format_bytes
from outsize.plan.profile import WORDS
from outsize.train.metrics import StepMetrics
from outsize.train.trace import MOST_DIFFERENCES, Trace, seconds

if TYPE_CHECKING:
    from outsize.engine import Prediction, Report

FIRST_STEADY_STEP = 3
"""Steps before it read weights from their files and write state for the first time."""

KEPT_STEPS = 1000
"""Of a long run the latest steps are compared."""


class Steady:
    """The latest steps that are like all others: none of the first, and none after an evaluation.

    An evaluation applies the updates that a step would otherwise find.
    """

    def __init__(self) -> None:
        self.steps: deque[StepMetrics] = deque(maxlen=KEPT_STEPS)
        self._num_left_out = FIRST_STEADY_STEP - 1

    def stepped(self, metrics: StepMetrics) -> bool:
        """Add a step where it is one; whether it is the first."""
        if self._num_left_out:
            self._num_left_out -= 1
            return False
        self.steps.append(metrics)
        return len(self.steps) == 1

    def evaluated(self) -> None:
        """An evaluation was made since the last step."""
        self._num_left_out = max(1, self._num_left_out)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, predicted and measured; seconds or bytes, as `unit` says."""

    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """By what part of the measured figure the prediction is too high (negative: too low); infinite where that is 0."""
        if self.measured:
            return (self.predicted - self.measured) / self.measured
        return math.inf if self.predicted else 0.0

    def __str__(self) -> str:
        shown = [
            format_bytes(int(value)) if self.unit == "B" else seconds(value)
            for value in (self.predicted, self.measured)
        ]
        error = f" ({self.error:+.0%})" if math.isfinite(self.error) else ""
        return f"{self.what}: predicted {shown[0]}, measured {shown[1]}{error}"


def compare(
    predicted: Prediction, steady: Sequence[StepMetrics], report: Report, trace: Trace | None
) -> list[Figure]:
    """Time, memory, waiting and traffic per step, in this order; then what differs most in the step that was recorded.

    Nothing where no step was steady.
    """
    if not steady:
        return []
    figures = [
        Figure("a step", predicted.step_s, statistics.median(m.step_s for m in steady), "s"),
        Figure("memory", predicted.host_bytes, report.host_peak_bytes, "B"),
        Figure("memory of the device", predicted.device_bytes, report.device_peak_bytes, "B"),
        Figure(
            "waiting per step",
            predicted.stalled_s,
            statistics.median(sum(m.wait_s.values()) for m in steady),
            "s",
        ),
        Figure("read per step", predicted.bytes_read, statistics.median(m.bytes_read for m in steady), "B"),
        Figure(
            "written per step",
            predicted.bytes_written,
            statistics.median(m.bytes_written for m in steady),
            "B",
        ),
    ]
    if trace is not None:
        figures += [
            Figure(f"{WORDS[each.resource]} in step {trace.step}", each.predicted_s, each.measured_s, "s")
            for each in trace.differences()[:MOST_DIFFERENCES]
        ]
    return [figure for figure in figures if figure.predicted or figure.measured]
