"""Whoever looks on while a run goes: the terminal, metrics.jsonl, TensorBoard, a tracker, the report page.

The loop tells each watcher what happened; none of them changes the run. A watcher that fails ends the run like any
other error, since a run whose measurements are lost is not what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType

from outsize.train.api import Report
from outsize.train.compare import Figure
from outsize.train.metrics import Evaluation, StepMetrics


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run before its first step.

    `settings`: the resolved settings, flat, by the names of the command line's options. `data`: one line per file,
    such as `chat.jsonl: 1,200 examples, 310,000 tokens`. `num_steps` is None where the time decides.
    """

    name: str
    settings: Mapping[str, str | int | float | bool | None]
    data: Sequence[str]
    num_steps: int | None
    tokens_per_step: int


class Watcher(AbstractContextManager["Watcher"]):
    """Entered around the steps of a run. By default it does nothing: watchers override what they need."""

    def say(self, text: str) -> None:
        """Something is about to happen that may take a while; may come before the watcher is entered."""

    def started(self, facts: RunFacts) -> None:
        """The model is loaded, the first step is next."""

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """The run goes on; what an earlier process did. Comes before the first step."""

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """A step is done; `num_steps` of the run as far as is known now."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The model was evaluated after a step."""

    def stopping(self) -> None:
        """The run was asked to end after the step that is under way. Called inside a signal handler, which may have
        interrupted a print: do not print and wait for no lock."""

    def ended(self, report: Report, interrupted: bool) -> None:
        """The last step is done; the weights are saved next."""

    def compared(self, figures: Sequence[Figure]) -> None:
        """What was predicted of the run, beside what was measured; after the last step."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Watchers(Watcher):
    """Several watchers as one; told in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)
        self._stack = ExitStack()

    def say(self, text: str) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.say(text)

    def started(self, facts: RunFacts) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.started(facts)

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.resumed(steps, evaluations)

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.stepped(metrics, report, num_steps)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.evaluated(evaluation)

    def stopping(self) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.stopping()

    def ended(self, report: Report, interrupted: bool) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.ended(report, interrupted)

    def compared(self, figures: Sequence[Figure]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.compared(figures)

    def __enter__(self) -> Watchers:
        with ExitStack() as stack:
            for watcher in self._watchers:
                stack.enter_context(watcher)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
