"""Predicted beside measured: how right the plan was, said at the end of every run that had a prediction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from outsize.config import format_bytes
from outsize.train.api import Predicted
from outsize.train.metrics import StepMetrics

FIRST_STEADY_STEP = 3
"""Steps before it read weights from their files and write state for the first time."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, predicted and measured; seconds or bytes, as `unit` says."""

    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """By what part of the measured figure the prediction is too high (negative: too low)."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0

    def __str__(self) -> str:
        shown = [
            format_bytes(v) if self.unit == "B" else f"{v:.2f} s" for v in (self.predicted, self.measured)
        ]
        return f"{self.what}: predicted {shown[0]}, measured {shown[1]} ({self.error:+.0%})"


def compare(predicted: Predicted, steps: Sequence[StepMetrics]) -> list[Figure]:
    """Time, memory, waiting and traffic per step, in this order; nothing where no step was steady."""
    steady = [metrics for metrics in steps if metrics.step >= FIRST_STEADY_STEP]
    if not steady:
        return []
    figures = [
        Figure("a step", predicted.step_s, statistics.median(m.step_s for m in steady), "s"),
        Figure("memory", predicted.host_bytes, steady[-1].host_peak_bytes, "B"),
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
    return [figure for figure in figures if figure.predicted or figure.measured]
