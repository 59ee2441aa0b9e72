"""The trace of a run: read and refused, for Perfetto, and as a page that a real browser draws."""

import io
import itertools
import json
import re

import pytest
from rich.console import Console

from outsize.errors import ConfigError
from outsize.plan.profile import Resource
from outsize.plan.simulate import Stall
from outsize.plan.timeline import Span, Timeline
from outsize.train import perfetto, trace_page
from outsize.train.loop import train
from outsize.train.progress import PlainProgress
from outsize.train.settings import Evaluating
from outsize.train.trace import Trace, seconds
from tests import browser
from tests.plan.test_simulate import HOST
from tests.plan.test_timeline import simulated
from tests.train.standin import WORDS, PlainApi, write_model
from tests.train.test_compare import PredictingApi
from tests.train.test_loop import settings_for
from tests.train.test_report_page import Checker

COMPUTE, READ, WRITE = Resource.COMPUTE, Resource.READ, Resource.WRITE
NASTY = '</script><script>alert("x")</script>'
MEASURED = Timeline(
    2.0,
    (
        Span(COMPUTE, 0.0, 0.5, "forward L00"),
        Span(READ, 0.25, 1.0, "read L01.weight[0]", 1 << 20),
        Span(READ, 0.5, 0.75, "read L01.weight[1]", 1 << 20),
        Span(COMPUTE, 1.0, 2.0, "backward L01"),
    ),
    (Stall(0.5, 1.0, READ),),
    {"host": ((0.0, 100 << 20), (1.0, 300 << 20), (2.0, 200 << 20))},
)


def trace(predicted=True, name="a run", measured=MEASURED):
    return Trace(name, 4, simulated()[1] if predicted else None, measured)


def run_folder(tmp_path, found=None):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (found or trace()).write(folder / "timeline.json")
    return folder


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted", [True, False])
def test_a_trace_is_read_as_it_was_written(predicted, tmp_path):
    found = Trace.read(run_folder(tmp_path, trace(predicted)))
    assert found == trace(predicted, name="run")
    assert list(found.timelines) == (["predicted", "measured"] if predicted else ["measured"])


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        Trace.read(folder)
    assert caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


def test_what_is_no_run_is_refused(tmp_path):
    assert f"no such folder: {tmp_path / 'none'}" in refused(tmp_path / "none")
    (tmp_path / "none.partial").mkdir()
    assert "none.partial" in refused(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(tmp_path / "file")
    (tmp_path / "other").mkdir()
    assert "holds no run" in refused(tmp_path / "other")
    (tmp_path / "other" / "metrics.jsonl").touch()
    assert "no step of that run was recorded | train for 4 steps or more" in refused(tmp_path / "other")


def measured(step_s, span=""):
    return (
        '{"version": 1, "step": 4, "measured": '
        f'{{"step_s": {step_s}, "spans": [{span}], "stalls": [], "memory": {{}}}}}}'
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "version None"),
        ('{"version": 9}', "version 9, expected 1"),
        ('{"version": 1, "measured": {}}', "step is None"),
        ('{"version": 1, "step": 4}', "measured: step_s is malformed"),
        ('{"version": 1, "step": 4, "predicted": {}, "measured": {}}', "predicted: step_s is missing"),
        ("[" * 100_000, "not JSON"),
        *(
            (measured(step_s), "measured: step_s is malformed")
            for step_s in ("0", "-1", "NaN", "1e308", "9" * 400)
        ),
        (measured("1", '["read", 0, 1e308, "x", 0]'), "measured: spans is malformed"),
        (measured("1", f'["read", 0, 1, "x", {"9" * 400}]'), "measured: spans is malformed"),
        (measured("1", '["read", 0, 1, "\\ud800", 0]'), "measured: spans is malformed"),
    ],
)
def test_a_damaged_file_is_named(text, said, tmp_path):
    folder = run_folder(tmp_path)
    (folder / "timeline.json").write_text(text)
    assert str(folder / "timeline.json") in refused(folder) and said in refused(folder)


def test_differences_come_with_the_largest_first():
    predicted = Timeline(
        1.0, (Span(READ, 0.0, 1.0, "a"), Span(WRITE, 0.0, 0.25, "b"), Span(COMPUTE, 0.0, 0.5, "c")), (), {}
    )
    found = Trace("x", 4, predicted, MEASURED).differences()
    assert [each.resource for each in found] == [COMPUTE, READ, WRITE]
    assert str(found[0]) == "computing: predicted 500 ms, measured 1.5 s"
    assert trace(predicted=False).differences() == []


def test_times_are_short():
    assert [seconds(value) for value in (0.0, 4.2e-6, 0.0009999, 0.01234, 0.9997, 1.5, 999.7, 1234.5)] == [
        *("0 s", "4.2 µs", "1 ms", "12.3 ms", "1 s", "1.5 s", "1,000 s", "1,234 s"),
    ]


# -- a run records one -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text((" ".join(WORDS) + "\n") * 20)
    return write_model(tmp_path / "model"), data, tmp_path / "out"


def trained(files, api, profile=None, **changes):
    settings = settings_for(*files, **changes)
    train(settings, api=api, watchers=[PlainProgress(Console(file=io.StringIO()))], profile=profile)
    return settings.out


def test_the_fourth_step_is_recorded_with_what_was_predicted(files):
    api = PredictingApi()
    found = Trace.read(trained(files, api, HOST))
    assert api.recorded == [(4, 4)] and found.step == 4
    assert found.predicted.step_s == 2.0 and found.measured.step_s == 1.0


def test_without_a_profile_there_is_no_prediction(files):
    assert Trace.read(trained(files, PlainApi(), trace_step=2)).predicted is None


@pytest.mark.parametrize(
    ("chosen", "every", "recorded"),
    [(4, 3, 5), (2, 1, None), (0, None, None), (7, None, None), (1, None, 2), (1, 1, None)],
)
def test_which_step_is_recorded(files, chosen, every, recorded):
    """A step after an evaluation finds nothing to update: it is not like the others."""
    evaluating = Evaluating(fraction=0.3, every=every) if every else Evaluating()
    api = PlainApi()
    out = trained(files, api, trace_step=chosen, evaluating=evaluating)
    assert [step for step, _ in api.recorded] == ([recorded] if recorded else [])
    assert (out / "timeline.json").exists() is (recorded is not None)


def test_a_step_below_none_is_refused(files):
    with pytest.raises(ConfigError, match="trace_step: -1"):
        settings_for(*files, trace_step=-1)


# -- for Perfetto ------------------------------------------------------------------------------------------------------


def test_perfetto_has_a_process_each_and_a_thread_for_each_resource():
    values = json.loads(perfetto.perfetto(trace()))
    events = values["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "predicted", 2: "measured"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert {name for (process, _), name in threads.items() if process == 2} == {
        *("computing", "reading the disk", "reading the disk (2)", "computing waits"),
    }
    slices = [event for event in events if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in slices} == set(threads)
    own = [(e["name"], e["ts"], e["dur"], e["args"]) for e in slices if e["pid"] == 2]
    assert ("read L01.weight[0]", 0.25e6, 0.75e6, {"bytes": 1 << 20}) in own
    assert ("waits for reading the disk", 0.5e6, 0.5e6, {}) in own
    assert len(slices) == sum(len(t.spans) + len(t.stalls) for t in trace().timelines.values())
    counters = [e for e in events if e["ph"] == "C" and e["pid"] == 2]
    assert [(e["ts"], e["args"]["bytes"]) for e in counters] == [
        (time_s * 1e6, size) for time_s, size in MEASURED.memory["host"]
    ]


def test_no_slices_of_a_thread_overlap():
    """Perfetto drops a slice that begins within another of its thread and ends after it."""
    spans = tuple(Span(READ, index / 3e7, (index + 2) / 3e7, "r") for index in range(-1, 200))
    text = perfetto.perfetto(Trace("x", 4, None, Timeline(1.0, spans, (), {})))
    by_thread = {}
    for event in json.loads(text)["traceEvents"]:
        if event["ph"] == "X":
            by_thread.setdefault(event["tid"], []).append(event)
    assert len(by_thread) == 2
    for events in by_thread.values():
        assert all(event["ts"] >= 0 for event in events)
        for a, b in itertools.pairwise(events):
            assert round(a["ts"] + a["dur"], 3) <= b["ts"]


# -- the page ----------------------------------------------------------------------------------------------------------


def checked(html):
    parser = Checker()
    parser.feed(html)
    assert not parser.open and not parser.fetched and "link" not in parser.tags
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", html)
    return " ".join(parser.text)


def test_the_page_needs_nothing_and_says_the_figures():
    text = checked(trace_page.page(trace()))
    for expected in (
        "a run, step 4",
        "step, predicted",
        "2 s",
        "reading the disk",
        "waiting for reading the disk",
    ):
        assert expected in text, expected
    assert "difference" in text and "300.0 MiB" in text


def test_without_a_prediction_the_page_says_how_to_get_one():
    text = checked(trace_page.page(trace(predicted=False)))
    assert "outsize profile" in text and "step, predicted" not in text and "difference" not in text


def test_names_from_outside_are_text():
    spans = (Span(COMPUTE, 0.0, 1.0, NASTY),)
    html = trace_page.page(trace(predicted=False, name=NASTY, measured=Timeline(1.0, spans, (), {})))
    assert html.count("</script>") == 2 and "<script>alert" not in html
    assert NASTY in checked(html)


@pytest.fixture
def opened(tmp_path):
    def open_it(html, **how):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        return browser.open_page(path, tmp_path / "browser", **how)

    return open_it


def with_script(html, script):
    return html.replace("</body>", f"<script>{script}</script></body>")


PAINTED = """
const canvas = document.getElementById("trace"), ratio = devicePixelRatio, { layout } = outsizeTrace;
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
for (const row of layout.rows) {
  const y = Math.round((row.y + 2) * ratio);
  let isPainted = false;  // tracks, ticks and ends are nearly grey
  for (let x = Math.ceil(layout.left * ratio); x < layout.right * ratio - 1; x++) {
    const at = 4 * (y * canvas.width + x);
    const colour = [...data.slice(at, at + 3)];
    isPainted ||= Math.max(...colour) - Math.min(...colour) > 60;
  }
  const name = row.group.name + "Rows";
  if (isPainted) document.body.dataset[name] = 1 + Number(document.body.dataset[name] || 0);
}
"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_a_browser_draws_both_timelines_without_an_error(opened, width, dark):
    found = trace()
    page = opened(with_script(trace_page.page(found), PAINTED), width=width, dark=dark)
    assert page.console == []
    for name, timeline in found.timelines.items():
        assert int(page.body[f"data-{name}-spans"]) == len(timeline.spans) > 0
        assert int(page.body[f"data-{name}-stalls"]) == len(timeline.stalls) > 0
        assert int(page.body[f"data-{name}-rows"]) == len({span.resource for span in timeline.spans})


def test_a_browser_draws_a_measured_timeline_alone(opened):
    page = opened(trace_page.page(trace(predicted=False)))
    assert page.console == [] and "data-predicted-spans" not in page.body
    assert int(page.body["data-measured-spans"]) == len(MEASURED.spans)


def test_a_page_of_a_step_in_which_nothing_was_done_is_drawn_too(opened):
    page = opened(trace_page.page(trace(predicted=False, measured=Timeline(0.0, (), (), {}))))
    assert page.console == [] and page.body["data-measured-spans"] == "0"


def test_what_a_page_says_on_its_console_is_seen(opened):
    assert len(opened(with_script(trace_page.page(trace()), "console.error('x')")).console) == 1
    assert len(opened(with_script(trace_page.page(trace()), "nowhere()")).console) == 1


HANDS = """
const canvas = document.getElementById("trace"), out = document.body.dataset;
const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
const length = () => (outsizeTrace.view.to - outsizeTrace.view.from).toFixed(3);
const at = (time, row) => {
  const { left, right } = outsizeTrace.layout, { from, to } = outsizeTrace.view, box = canvas.getBoundingClientRect();
  return { clientX: box.left + left + (time - from) / (to - from) * (right - left), clientY: box.top + row.y + 3,
    bubbles: true, cancelable: true };
};
const said = () => [...document.querySelectorAll("#tip:not([hidden]) > *")].map((each) => each.textContent).join(" | ");
const press = async (key) => {
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  await drawn();
};
(async () => {
  const [computing, reading] = outsizeTrace.layout.rows;
  out.whole = length();
  canvas.dispatchEvent(new PointerEvent("pointermove", at(0.9, reading)));
  await drawn();
  out.hover = said();
  canvas.dispatchEvent(new PointerEvent("pointermove", at(0.75, computing)));
  out.hoverStall = said();
  canvas.dispatchEvent(new PointerEvent("pointermove", at(0.75, outsizeTrace.layout.charts[0])));
  out.hoverMemory = said();
  canvas.dispatchEvent(new PointerEvent("pointerleave"));
  out.left = said();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -240, ...at(1.5, reading) }));
  await drawn();
  out.zoomed = length();
  out.spans = outsizeTrace.drawn.measured.spans;
  await press("ArrowRight"); await press("ArrowRight"); await press("ArrowRight");
  out.moved = outsizeTrace.view.to.toFixed(3);
  await press("0");
  out.again = length();
  document.getElementById("in").click();
  await drawn();
  out.clicked = length();
  await press("Home");
  await press("ArrowDown");
  await press("ArrowDown");
  await press("]");
  await press("]");
  out.walked = said();
  await press("Escape");
  out.escaped = said();
})();
"""


def test_one_can_look_closer_with_wheel_pointer_and_keys(opened):
    html = with_script(trace_page.page(trace(predicted=False)), HANDS)
    # A browser that writes the document down draws no frames on the way there.
    frames = "<script>window.requestAnimationFrame = (draw) => setTimeout(draw, 1);</script>"
    page = opened(html.replace("</head>", frames + "</head>"))
    assert page.console == []
    said = {key.removeprefix("data-"): value for key, value in page.body.items()}
    assert (
        said["hover"]
        == "read L01.weight[0] | measured: reading the disk | 750 ms, from 250 ms | 1 MiB, 1.33 MiB/s"
    )
    assert said["hover-stall"] == "waiting for reading the disk | measured: 500 ms, from 500 ms"
    assert said["hover-memory"] == "memory of the host at 750 ms | measured: 100 MiB"
    assert said["left"] == ""
    assert said["whole"] == said["again"] == "2.000" and float(said["zoomed"]) < 1.5
    assert int(said["spans"]) < len(MEASURED.spans) and said["moved"] == "2.000"
    assert said["clicked"] == "1.200"
    assert said["walked"].startswith("read L01.weight[1] | ") and said["escaped"] == ""
