"""Watchers of a run: the terminal, metrics.jsonl, TensorBoard, a tracker, the report page.

The loop tells each watcher what happened; none of them changes the run. The watchers of this package may fail once the
run has begun: a full disk or a network that is down is reported, and the training goes on. A watcher of the user's own
that raises ends the run like any other error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from outsize.errors import in_short
from outsize.train.compare import Figure
from outsize.train.metrics import Evaluation, StepMetrics

if TYPE_CHECKING:
    from outsize.engine import Report


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run before its first step.

    `settings`: the resolved settings, flat, by the names of the command line's options. `data`: one line per file,
    such as `chat.jsonl: 1,200 examples, 310,000 tokens`. `num_steps` is None where the time decides. `elapsed_s`: seconds
    that earlier processes spent on the run, where it is resumed.
    """

    name: str
    settings: Mapping[str, str | int | float | bool | None]
    data: Sequence[str]
    num_steps: int | None
    tokens_per_step: int
    elapsed_s: float = 0.0


class Watcher(AbstractContextManager["Watcher"]):
    """Entered around the steps of a run. By default it does nothing: watchers override what they need."""

    may_fail: ClassVar[bool] = False
    """Whether an error of this watcher is reported instead of ending a run that has begun."""

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
    """Several watchers as one; each is told in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.failures: dict[str, str] = {}
        """The first error of each watcher that failed, by its name."""
        self._watchers = tuple(watchers)
        self._stack = ExitStack()

    def say(self, text: str) -> None:
        """Tell all."""
        self._tell(lambda watcher: watcher.say(text))

    def started(self, facts: RunFacts) -> None:
        """Tell all. Raises what any of them raises: nothing is lost before the first step."""
        for watcher in self._watchers:
            watcher.started(facts)

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """Tell all. Raises as `started` does."""
        for watcher in self._watchers:
            watcher.resumed(steps, evaluations)

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Tell all."""
        self._tell(lambda watcher: watcher.stepped(metrics, report, num_steps))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell all."""
        self._tell(lambda watcher: watcher.evaluated(evaluation))

    def stopping(self) -> None:
        """Tell all."""
        for watcher in self._watchers:
            with suppress(
                OSError
            ):  # standard error may be closed; nothing else may be done in a signal handler
                watcher.stopping()

    def ended(self, report: Report, interrupted: bool) -> None:
        """Tell all."""
        self._tell(lambda watcher: watcher.ended(report, interrupted))

    def compared(self, figures: Sequence[Figure]) -> None:
        """Tell all."""
        self._tell(lambda watcher: watcher.compared(figures))

    def __enter__(self) -> Watchers:
        with ExitStack() as stack:
            for watcher in self._watchers:
                watcher.__enter__()
                stack.push(partial(self._leave, watcher))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _tell(self, event: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers:
            try:
                event(watcher)
            except Exception as error:
                self._failed(watcher, error)

    def _leave(
        self,
        watcher: Watcher,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            watcher.__exit__(kind, error, trace)
        except Exception as failure:
            self._failed(watcher, failure)

    def _failed(self, watcher: Watcher, error: Exception) -> None:
        """Note the error, and report it where it is the watcher's first; raise it where the watcher may not fail.

        The watcher is told of later events all the same: disks are emptied and networks come back.
        """
        if not watcher.may_fail:
            raise error
        name = str(watcher)
        if name not in self.failures:
            self.failures[name] = in_short(error)
            self.say(f"{name} failed, and the training goes on: {self.failures[name]}")
