"""`metrics.jsonl`: one line after each step and each evaluation, readable while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from outsize.model.writer import storage_errors
from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.output import METRICS
from outsize.train.watch import Watcher

if TYPE_CHECKING:
    from outsize.engine import Report


class MetricsFile(Watcher):
    """Writes the file from its beginning; open while it is entered. A run that goes on begins with its earlier steps.

    Lines that cannot be written stay in memory until they can be.
    """

    may_fail = True

    def __str__(self) -> str:
        return METRICS

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """Write what was kept of the earlier steps."""
        lines = [(each.step, each.to_json()) for each in steps]
        lines += [(each.step, each.to_json()) for each in evaluations]
        for _, line in sorted(lines, key=lambda pair: pair[0]):
            self._write(line)

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Append the step."""
        self._write(metrics.to_json())

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append the evaluation."""
        self._write(evaluation.to_json())

    def __enter__(self) -> MetricsFile:
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with storage_errors(self._path):
                self._file.close()

    def _write(self, line: str) -> None:
        assert self._file is not None, "the file is open while it is entered"
        with storage_errors(self._path):
            self._file.write(line + "\n")
            self._file.flush()
