"""What one sees of a run: lines that redraw themselves on a terminal, one line per step anywhere else."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import rich.live
import rich.progress
from rich.console import Console, Group
from rich.text import Text

from outsize.config import format_bytes
from outsize.train.compare import Figure
from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.watch import RunFacts, Watcher

if TYPE_CHECKING:
    from outsize.engine import Report


def progress_on(console: Console) -> Watcher:
    """What suits `console`: a live line on a terminal, plain lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class RunConsole(Console):
    """A console whose reader may leave, as in `outsize train ... | head`: what follows is printed nowhere."""

    def on_broken_pipe(self) -> None:
        """Print nothing more; rich would end the process, and with it the run."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def learning(metrics: StepMetrics) -> list[str]:
    """How a step learned, and how fast."""
    shown = [f"loss {fixed(metrics.loss, 4)}", f"lr {metrics.lr:.2e}"]
    if metrics.grad_norm is not None:
        shown.append(f"grad {fixed(metrics.grad_norm, 2)}")
    return [*shown, f"{metrics.tokens_per_s:,.0f} tok/s"]


def moving(metrics: StepMetrics, report: Report) -> list[str]:
    """What is where, at most, and what a step moved."""
    shown = []
    if report.device_budget_bytes:
        peak, limit = format_bytes(report.device_peak_bytes), format_bytes(report.device_budget_bytes)
        shown.append(f"device {peak} of {limit}")
    used, budget = format_bytes(metrics.host_peak_bytes), format_bytes(report.host_budget_bytes)
    return [
        *shown,
        f"mem {used} of {budget}",
        f"read {format_bytes(metrics.bytes_read)}",
        f"wrote {format_bytes(metrics.bytes_written)}",
    ]


def fixed(value: float, digits: int) -> str:
    """A figure with so many decimals; one that would take the line for itself, as a power of ten.

    >>> fixed(2.5, 4), fixed(1e30, 4)
    ('2.5000', '1e+30')
    """
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


class PlainProgress(Watcher):
    """One line per step."""

    may_fail = True

    def __str__(self) -> str:
        return "standard output"

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seconds = 0.0
        self._count = 0

    def say(self, text: str) -> None:
        """Print `text`."""
        self._line(text)

    def started(self, facts: RunFacts) -> None:
        """Print what the files hold."""
        for line in facts.data:
            self._line(line)

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Print the step's figures and the time that is left."""
        self._seconds += metrics.step_s
        self._count += 1
        of, left = "", "?"
        if num_steps is not None:
            of = f"/{num_steps}"
            left = _clock(max(0, num_steps - metrics.step) * self._seconds / self._count)
        self._line(
            " | ".join(
                [f"step {metrics.step}{of}", *learning(metrics), *moving(metrics, report), f"left {left}"]
            )
        )

    def evaluated(self, evaluation: Evaluation) -> None:
        """Print the evaluation."""
        self._line(_evaluation(evaluation))

    def compared(self, figures: Sequence[Figure]) -> None:
        """Print them, a line each."""
        for figure in figures:
            self._line(str(figure))

    def stopping(self) -> None:
        """Say so, past all buffers: the signal may have interrupted a print."""
        os.write(2, f"\n{_STOPPING}\n".encode())

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(Watcher):
    """A bar with the figures of the latest step, and under it where memory and time go."""

    may_fail = True

    def __str__(self) -> str:
        return "standard output"

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed:.0f}{task.fields[of]}"),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, of="")
        self._losses: deque[float] = deque(maxlen=32)
        self._lines = [_line("the first step is under way")]
        self._is_stopping = False
        self._live = rich.live.Live(get_renderable=self._picture, console=console, refresh_per_second=4)

    def say(self, text: str) -> None:
        """Print `text`, dimmed, above the bar."""
        self._console.print(text, style="dim", markup=False, highlight=False)

    def started(self, facts: RunFacts) -> None:
        """Print what the files hold."""
        for line in facts.data:
            self.say(line)

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """Let the bar begin where the run does."""
        if steps:
            self._losses.extend(metrics.loss for metrics in steps[-32:])
            self._bar.reset(self._task, completed=steps[-1].step, of="")

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Redraw with the step's figures."""
        self._losses.append(metrics.loss)
        self._bar.update(
            self._task,
            completed=metrics.step,
            total=num_steps,
            of=f"/{num_steps}" if num_steps is not None else "",
        )
        self._lines = [
            _line("  ".join(learning(metrics)), "bold"),
            _line(course(list(self._losses)), "cyan"),
            _line("  ".join(moving(metrics, report))),
            _line(where_time_goes(metrics)),
        ]
        self._live.refresh()

    def evaluated(self, evaluation: Evaluation) -> None:
        """Print the evaluation above the bar."""
        self.say(_evaluation(evaluation))

    def compared(self, figures: Sequence[Figure]) -> None:
        """Print them, a line each."""
        for figure in figures:
            self.say(str(figure))

    def stopping(self) -> None:
        """Let the next redrawing say so; text written in between would tear the lines apart."""
        self._is_stopping = True

    def ended(self, report: Report, interrupted: bool) -> None:
        """What was announced has happened."""
        self._is_stopping = False

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _picture(self) -> Group:
        return Group(self._bar, *self._lines, *([_line(_STOPPING, "yellow")] if self._is_stopping else []))


def _line(text: str, style: str = "dim") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def sparkline(values: Sequence[float]) -> str:
    """Values as bars, from the lowest to the highest; a figure that is not finite leaves a gap.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▅▁'
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[round((v - low) / span * 7)] if math.isfinite(v) else " " for v in values)


def course(losses: Sequence[float]) -> str:
    """The latest losses as bars, and what the lowest and the highest bar stand for.

    >>> course([3.0, 2.0, 1.0])
    'loss █▅▁ 1.00 to 3.00 in 3 steps'
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    span = f" {min(finite):.2f} to {max(finite):.2f} in {len(losses)} steps" if len(finite) > 1 else ""
    return f"loss {sparkline(losses)}{span}"


def where_time_goes(metrics: StepMetrics) -> str:
    """How much of a step was waiting, for what most, and what would help."""
    waited_s = sum(metrics.wait_s.values())
    share = waited_s / max(metrics.step_s, 1e-9)
    if share < 0.02:
        return f"waited {waited_s:.1f} s of {metrics.step_s:.1f} s: moving is hidden behind computing"
    most = (
        max(metrics.wait_s, key=lambda link: metrics.wait_s[link]).removeprefix("wait ").removeprefix("free ")
    )
    return f"waited {share:.0%} of the step, most for {most}s: a larger batch or more memory helps"


_STOPPING = "finishing this step, then saving; Ctrl-C again stops at once"
_BARS = "▁▂▃▄▅▆▇█"


def _evaluation(evaluation: Evaluation) -> str:
    best = ", the best so far" if evaluation.is_best else ""
    figures = f"loss {fixed(evaluation.loss, 4)}, perplexity {fixed(evaluation.perplexity, 2)}{best}"
    return f"evaluation after step {evaluation.step}: {figures}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
