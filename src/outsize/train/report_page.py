"""`report.html`: one page that says what a run did; self-contained, so that it can be sent, printed and kept.

Charts are inline SVG, colours follow the reader's light or dark scheme, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from outsize.config import format_bytes
from outsize.model.writer import storage_errors
from outsize.train.compare import Figure
from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.output import REPORT
from outsize.train.page import cards, document, table
from outsize.train.watch import RunFacts, Watcher

if TYPE_CHECKING:
    from outsize.engine import Report

MOST_POINTS = 2000
"""Points of a chart; of a longer run every second, fourth, ... step is drawn."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 64, 24, 12

_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px; margin-bottom: 12px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .fa { fill: var(--a); } .fb { fill: var(--b); } .fc { fill: var(--c); }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: `(step, value)` in order; colour `a`, `b` or `c`."""

    name: str
    colour: str
    points: Sequence[tuple[int, float]]
    dots: bool = False


@dataclass
class _Kept:
    """Steps of a run of any length, at most twice MOST_POINTS of them, evenly apart; the last is always known."""

    steps: list[StepMetrics] = field(default_factory=list)
    last: StepMetrics | None = None
    stride: int = 1

    def add(self, metrics: StepMetrics) -> None:
        self.last = metrics
        if (metrics.step - 1) % self.stride == 0:
            self.steps.append(metrics)
        if len(self.steps) > 2 * MOST_POINTS:
            self.steps, self.stride = self.steps[::2], 2 * self.stride

    def all(self) -> list[StepMetrics]:
        if self.last is None or (self.steps and self.steps[-1] is self.last):
            return self.steps
        return [*self.steps, self.last]


class ReportPage(Watcher):
    """Writes the page to `path` when the run ends, in whatever way it ends; before the first step there is none."""

    may_fail = True

    def __str__(self) -> str:
        return REPORT

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: RunFacts | None = None
        self._kept = _Kept()
        self._num_steps = 0
        self._host_peak_bytes = 0
        self._evaluations: list[Evaluation] = []
        self._report: Report | None = None
        self._started_s = 0.0
        self._seconds = 0.0
        self._compared: Sequence[Figure] = ()
        self._ending = "the run ended with an error"

    def started(self, facts: RunFacts) -> None:
        """Keep the facts, and the time."""
        self._facts = facts
        self._started_s = time.monotonic()

    def resumed(self, steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> None:
        """Keep what an earlier process did."""
        for metrics in steps:
            self._add(metrics)
        self._evaluations += evaluations

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Keep the step."""
        self._add(metrics)
        self._report = report

    def _add(self, metrics: StepMetrics) -> None:
        self._kept.add(metrics)
        self._num_steps += 1
        self._seconds += metrics.step_s
        self._host_peak_bytes = max(self._host_peak_bytes, metrics.host_peak_bytes)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep the evaluation."""
        self._evaluations.append(evaluation)

    def ended(self, report: Report, interrupted: bool) -> None:
        """Keep how it ended."""
        self._report = report
        self._ending = "stopped early on request" if interrupted else "complete"

    def compared(self, figures: Sequence[Figure]) -> None:
        """Keep what was predicted."""
        self._compared = figures

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._facts is None or self._kept.last is None or self._report is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._ending = "stopped at once on request; the weights were not saved"
        elif error is not None:
            self._ending = f"ended by {type(error).__name__.lstrip('_')}: {error}"
        with storage_errors(self._path):
            self._path.write_text(self.html(), encoding="utf-8")

    def html(self) -> str:
        """The page."""
        facts, last, report = self._facts, self._kept.last, self._report
        assert facts is not None and last is not None and report is not None
        settings = [
            # As the config file writes them.
            (name, str(value).lower() if isinstance(value, bool) else str(value))
            for name, value in facts.settings.items()
            if value is not None
        ]
        since = ", since the run was resumed" if facts.elapsed_s else ""
        return document(
            facts.name,
            _STYLE,
            [
                f"<h1>{escape(facts.name)}</h1><p>{escape(self._ending)}; {time.strftime('%Y-%m-%d %H:%M')}</p>",
                cards(self._figures(last, report)),
                f'<div class="charts">{"".join(self._charts(report))}</div>',
                '<div class="charts">',
                f"<section><h2>What lived where{since}</h2><pre>{escape(str(report))}</pre></section>",
                self._prediction(),
                f"<section><h2>Data</h2><pre>{escape(chr(10).join(facts.data))}</pre></section>",
                f"<section><h2>Settings</h2>{table(settings)}</section>",
                "</div>",
            ],
        )

    def _prediction(self) -> str:
        if not self._compared:
            return ""
        rows = [(figure.what, str(figure).partition(": ")[2]) for figure in self._compared]
        return f"<section><h2>Predicted and measured</h2>{table(rows)}</section>"

    def _figures(self, last: StepMetrics, report: Report) -> list[tuple[str, str]]:
        facts = self._facts
        assert facts is not None
        first = self._kept.steps[0]
        # Steps of an earlier process whose measurements are lost count as tokens, and in no rate.
        tokens, measured = (count * facts.tokens_per_step for count in (last.step, self._num_steps))
        peak_bytes = max(self._host_peak_bytes, report.host_peak_bytes)
        figures = [
            ("loss, first to last step", f"{first.loss:.3f} to {last.loss:.3f}"),
            ("steps", f"{last.step:,}" + (f" of {facts.num_steps:,}" if facts.num_steps else "")),
            ("tokens", f"{tokens:,}"),
            ("tokens per second", f"{measured / max(self._seconds, 1e-9):,.0f}"),
            ("time", duration(facts.elapsed_s + time.monotonic() - self._started_s)),
            (
                "memory, peak of limit",
                f"{format_bytes(peak_bytes)} of {format_bytes(report.host_budget_bytes)}",
            ),
            ("training state", format_bytes(report.state_bytes)),
        ]
        if report.device_budget_bytes:
            of_limit = (
                f"{format_bytes(report.device_peak_bytes)} of {format_bytes(report.device_budget_bytes)}"
            )
            figures.insert(-2, ("device memory, peak of limit", of_limit))
        if self._evaluations:
            best = min(self._evaluations, key=lambda evaluation: evaluation.loss)
            figures.insert(
                1,
                (
                    f"best evaluation, step {best.step:,}",
                    f"{best.loss:.3f} (perplexity {short(best.perplexity)})",
                ),
            )
        return figures

    def _charts(self, report: Report) -> list[str]:
        steps = self._kept.all()

        def of(name: str) -> list[tuple[int, float]]:
            return [(m.step, v) for m in steps if (v := getattr(m, name)) is not None]

        waited = [(m.step, sum(m.wait_s.values())) for m in steps]
        losses = [Line("training", "a", of("loss"))]
        if self._evaluations:
            losses.append(Line("evaluation", "b", [(e.step, e.loss) for e in self._evaluations], dots=True))
            best = min(self._evaluations, key=lambda evaluation: evaluation.loss)
            losses.append(Line("best", "c", [(best.step, best.loss)], dots=True))
        charts = [
            chart("Loss", losses),
            chart("Learning rate", [Line("learning rate", "a", of("lr"))], zero=True),
            chart("Gradient norm, before clipping", [Line("norm", "a", of("grad_norm"))], zero=True),
            chart("Tokens per second", [Line("tokens per second", "a", of("tokens_per_s"))], zero=True),
            chart(
                "Seconds per step",
                [Line("step", "a", of("step_s")), Line("of it waiting for data", "b", waited)],
                zero=True,
            ),
        ]
        if any(m.bytes_read or m.bytes_written for m in steps):
            gib = 2**30
            charts.append(
                chart(
                    "GiB moved per step",
                    [
                        Line("read", "a", [(m.step, m.bytes_read / gib) for m in steps]),
                        Line("written", "b", [(m.step, m.bytes_written / gib) for m in steps]),
                    ],
                    zero=True,
                )
            )
        return charts


def chart(title: str, lines: Sequence[Line], *, zero: bool = False) -> str:
    """A section with a chart over steps; empty where no line has a point that is finite. `zero`: the axis begins there."""
    lines = [
        Line(line.name, line.colour, _thinned([p for p in line.points if math.isfinite(p[1])]), line.dots)
        for line in lines
    ]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    if zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12
    first, last = min(s for s, _ in points), max(s for s, _ in points)

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        up = (value - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - 12), _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for part in (0.0, 0.5, 1.0):
        value = low + part * (high - low)
        _, y = place(first, value)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {step:,}</text>')
    for line in lines:
        places = [place(*point) for point in line.points]
        if len(places) > 1:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="{line.colour}" points="{text}"/>')
        if line.dots or len(places) == 1 or len(places) <= 60:
            radius = 4 if line.dots else 2
            for (x, y), (step, value) in zip(places, line.points, strict=True):
                tip = f"{escape(line.name)}, step {step:,}: {short(value)}"
                parts.append(
                    f'<circle class="f{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{tip}</title></circle>'
                )
    parts.append("</svg>")
    key = "".join(f'<i style="background: var(--{line.colour})"></i>{escape(line.name)}' for line in lines)
    legend = f'<p class="key">{key}</p>' if len(lines) > 1 else ""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}{legend}</section>"


def short(value: float) -> str:
    """A figure in few characters.

    >>> [short(value) for value in (0, 0.00001, 0.5, 12.345, 12345.6, 1e30)]
    ['0', '1e-05', '0.5', '12.3', '12,346', '1e+30']
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> [duration(seconds) for seconds in (5.4, 65, 3700)]
    ['5 s', '1 min 5 s', '1 h 1 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MOST_POINTS of the points, with the last."""
    stride = -(-len(points) // MOST_POINTS)
    return [*points[:-1:stride], points[-1]] if stride > 1 else points
