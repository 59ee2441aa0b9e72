"""`trace.html`: a step as one looks at it, predicted above measured on the same axis of time.

One file that holds all it needs. What is drawn lies in it as JSON, `trace_page.js` draws it on a canvas.
"""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any

from outsize.config import format_bytes
from outsize.plan.profile import WORDS, Resource
from outsize.plan.timeline import Timeline, tracks
from outsize.train.page import cards, document
from outsize.train.trace import Trace, seconds

MARK = '<canvas id="trace"'
"""By which one knows a page of ours."""

_HELP = (
    "Wheel zooms, drag moves, double click shows all. With the picture focused: "
    "<kbd>&larr;</kbd> <kbd>&rarr;</kbd> move, <kbd>+</kbd> <kbd>&minus;</kbd> zoom, <kbd>0</kbd> shows all, "
    "<kbd>&uarr;</kbd> <kbd>&darr;</kbd> choose a row, <kbd>[</kbd> <kbd>]</kbd> step through what it did."
)


def page(trace: Trace) -> str:
    """The page."""
    title = f"{trace.name}, step {trace.step}"
    return document(
        title,
        _resource("trace_page.css"),
        [
            f"<h1>{escape(title)}</h1><p>{_subtitle(trace)}</p>",
            cards(_figures(trace)),
            '<section class="trace"><div class="bar"><h2>What each resource did</h2>'
            '<span><button id="out" aria-label="zoom out">&minus;</button>'
            '<button id="in" aria-label="zoom in">+</button><button id="fit">all</button></span></div>',
            f'<div class="stage"><canvas id="trace" tabindex="0" role="img" aria-label="{escape(_spoken(trace))}">'
            '</canvas><div id="tip" role="status" aria-live="polite" hidden></div></div>',
            f"{_legend(trace)}<p class='help'>{_HELP}</p></section>",
            f'<section class="wide"><h2>How long each was busy</h2>{_shares(trace)}</section>',
            f'<script type="application/json" id="data">{_data(trace)}</script>',
            f"<script>{_resource('trace_page.js')}</script>",
        ],
    )


def _resource(name: str) -> str:
    return resources.files("outsize.train").joinpath(name).read_text(encoding="utf-8")


def _subtitle(trace: Trace) -> str:
    if trace.predicted is None:
        return (
            "Measured only: this machine had not been measured when the run began. <code>outsize profile</code> does it "
            "once; runs after it are predicted."
        )
    return "Predicted above measured, on the same axis of time."


def _figures(trace: Trace) -> list[tuple[str, str]]:
    measured, predicted = trace.measured, trace.predicted
    figures = [("step, measured", seconds(measured.step_s))]
    if predicted is not None:
        error = (predicted.step_s - measured.step_s) / measured.step_s
        figures.insert(0, ("step, predicted", seconds(predicted.step_s)))
        figures.append(("prediction beside measurement", f"{error:+.0%}".replace("-", "\N{MINUS SIGN}")))
    figures.append(("computing waited, measured", _share(sum(measured.stall_s.values()), measured)))
    longest = max(measured.busy_s.items(), key=lambda item: item[1], default=None)
    if longest is not None:
        figures.append((f"{WORDS[longest[0]]}, the busiest", _share(longest[1], measured)))
    for tier, points in measured.memory.items():
        if points:
            figures.append((f"memory of the {tier}, most", format_bytes(max(size for _, size in points))))
    return figures


def _share(time_s: float, timeline: Timeline) -> str:
    return f"{time_s / timeline.step_s:.0%}" if timeline.step_s else "0%"


def _spoken(trace: Trace) -> str:
    parts = []
    for name, timeline in trace.timelines.items():
        busy = ", ".join(f"{WORDS[each]} {_share(busy, timeline)}" for each, busy in timeline.busy_s.items())
        parts.append(f"{name}: {seconds(timeline.step_s)}; {busy}")
    return "Timeline of a step. " + ". ".join(parts)


def _legend(trace: Trace) -> str:
    causes = {stall.cause for timeline in trace.timelines.values() for stall in timeline.stalls}
    solid = "".join(
        f'<span><i class="r-{resource}"></i>{WORDS[resource]}</span>' for resource in trace.resources
    )
    striped = "".join(
        f'<span><i class="r-{resource} stall"></i>waiting for {WORDS[resource]}</span>'
        for resource in Resource
        if resource in causes
    )
    return f'<p class="legend">{solid}{striped}</p>'


def _shares(trace: Trace) -> str:
    """A row per resource, then what computing waited for, then what is neither."""
    rows = [
        (
            f"r-{resource}",
            WORDS[resource],
            {n: t.busy_s.get(resource, 0.0) for n, t in trace.timelines.items()},
        )
        for resource in trace.resources
    ]
    for cause in Resource:
        waited = {name: timeline.stall_s.get(cause, 0.0) for name, timeline in trace.timelines.items()}
        if any(waited.values()):
            rows.append((f"r-{cause} stall", f"waiting for {WORDS[cause]}", waited))
    rows.append(
        ("rest", "neither computing nor waiting", {n: _rest_s(t) for n, t in trace.timelines.items()})
    )
    names = "".join(f"<th>{name}</th>" for name in trace.timelines)
    head = f"<tr><th></th>{names}{'<th>difference</th>' if trace.predicted is not None else ''}</tr>"
    body = ""
    for kind, words, values in rows:
        cells = "".join(
            f'<td><div class="meter"><i class="{kind}" style="width:{_share(values[name], timeline)}"></i></div>'
            f"<span>{seconds(values[name])}, {_share(values[name], timeline)}</span></td>"
            for name, timeline in trace.timelines.items()
        )
        if trace.predicted is not None:
            difference = values["predicted"] - values["measured"]
            sign = "&minus;" if difference < 0 else "+"
            cells += f"<td>{sign}{seconds(abs(difference))}</td>"
        body += f"<tr><th>{words}</th>{cells}</tr>"
    return f'<table class="shares">{head}{body}</table>'


def _rest_s(timeline: Timeline) -> float:
    computing = timeline.busy_s.get(Resource.COMPUTE, 0.0)
    return max(0.0, timeline.step_s - computing - sum(timeline.stall_s.values()))


def _data(trace: Trace) -> str:
    """What the script draws, as JSON that no markup can end."""
    values = {
        "words": {str(resource): WORDS[resource] for resource in trace.resources},
        "groups": [_group(name, timeline, trace.resources) for name, timeline in trace.timelines.items()],
    }
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _group(name: str, timeline: Timeline, used: list[Resource]) -> dict[str, Any]:
    rows = []
    for resource in used:
        side_by_side = tracks(span for span in timeline.spans if span.resource is resource)
        drawn = [
            [[_t(s.start_s), _t(s.end_s), s.label, s.num_bytes] for s in track] for track in side_by_side
        ]
        rows.append({"resource": resource, "tracks": drawn})
    return {
        "name": name,
        "step": _t(timeline.step_s),
        "rows": rows,
        "stalls": [[_t(stall.start_s), _t(stall.end_s), stall.cause] for stall in timeline.stalls],
        "memory": {
            tier: [[_t(time_s), num_bytes] for time_s, num_bytes in points]
            for tier, points in timeline.memory.items()
        },
    }


def _t(time_s: float) -> float:
    return round(time_s, 7)
