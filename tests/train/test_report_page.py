"""The page at the end of a run: its figures, that it holds all it needs, and that it is right for any run."""

import math
import re
from html.parser import HTMLParser

import pytest

from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.report_page import MOST_POINTS, Line, ReportPage, chart, short
from outsize.train.watch import RunFacts
from tests.train.standin import PlainReport

REPORT = PlainReport()


def step(number, loss=2.0, **changes):
    values = dict(
        step=number,
        loss=loss,
        lr=1e-4,
        grad_norm=1.5,
        tokens_per_s=1000.0,
        step_s=0.5,
        host_peak_bytes=1 << 20,
        bytes_read=1 << 30,
        bytes_written=1 << 29,
        wait_s={"wait weight": 0.1},
    )
    return StepMetrics(**(values | changes))


def facts(**changes):
    values = dict(
        name="run <1>",
        settings={"lr": 1e-4, "host": None},
        data=["a.jsonl: 3"],
        num_steps=10,
        tokens_per_step=64,
    )
    return RunFacts(**(values | changes))


def page_of(tmp_path, steps, evaluations=(), error=None, ended=True, **changes):
    path = tmp_path / "report.html"
    page = ReportPage(path)
    try:
        with page:
            page.started(facts(**changes))
            for metrics in steps:
                page.stepped(metrics, REPORT, 10)
            for evaluation in evaluations:
                page.evaluated(evaluation)
            if error is not None:
                raise error
            if ended:
                page.ended(REPORT, interrupted=False)
    except ValueError:
        pass
    return path.read_text(encoding="utf-8") if path.exists() else None


class Checker(HTMLParser):
    """Every tag that is opened is closed; collects text, and whatever could be fetched."""

    EMPTY = frozenset({"meta", "line", "polyline", "circle", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.EMPTY and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    parser = Checker()
    parser.feed(html)
    assert not parser.open and not parser.fetched
    assert "script" not in parser.tags and "link" not in parser.tags
    assert not re.search(r"url\(|@import|https?://", html)
    assert (
        "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split('points="', 1)[-1]
    )
    return " ".join(parser.text)


def test_a_run_with_evaluations(tmp_path):
    evaluations = [Evaluation(2, 1.9, 10, 0.1, True), Evaluation(3, 2.5, 10, 0.1, False)]
    html = page_of(tmp_path, [step(1, 3.0), step(2, 2.0), step(3, 1.0)], evaluations)
    text = checked(html)
    for expected in (
        "3.000 to 1.000",
        "3 of 10",
        "192",
        "best evaluation, step 2",
        "1.900 (perplexity 6.69)",
        "complete",
    ):
        assert expected in text, expected
    assert "128" in text and "lr" in text and "a.jsonl: 3" in text and "what lived where" in text
    assert "GiB moved per step" in text and "evaluation, step 3: 2.5" in text


def tiles(page):
    """The figures at the top of a page, by name."""
    assert page.html()
    return dict(page._figures(page._kept.last, page._report))


def test_a_run_that_goes_on_is_reported_whole(tmp_path):
    """Tokens, rate, time and peak are those of all processes, also where measurements of the first are lost."""
    page = ReportPage(tmp_path / "report.html")
    page.started(facts(elapsed_s=7200.0))
    page.resumed([step(number, host_peak_bytes=3 << 30) for number in (1, 2)], [])
    page.stepped(step(3, step_s=1.0, host_peak_bytes=2 << 30), PlainReport(host_peak_bytes=2 << 30), 10)
    figures = tiles(page)
    assert figures["tokens"] == "192" and figures["tokens per second"] == "96"  # 3 * 64 tokens in 2 s
    assert figures["time"] == "2 h 0 min"
    assert figures["memory, peak of limit"].startswith("3.00 GiB of ")
    assert "What lived where, since the run was resumed" in page.html()
    page = ReportPage(tmp_path / "report.html")
    page.started(facts(elapsed_s=7200.0))
    page.resumed([], [])
    page.stepped(step(3, step_s=1.0), REPORT, 10)
    assert tiles(page)["tokens"] == "192" and tiles(page)["tokens per second"] == "64"


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [-1.0, 0.0, 1.0], [0.0]])
def test_short_runs_and_all_signs(tmp_path, losses):
    checked(page_of(tmp_path, [step(n, loss) for n, loss in enumerate(losses, 1)]))


def test_a_long_run_is_thinned_and_keeps_its_ends(tmp_path):
    count = 5 * MOST_POINTS + 3
    html = page_of(tmp_path, (step(n, 5.0 - n / count) for n in range(1, count + 1)))
    text = checked(html)
    assert f"step {count:,}" in text and "5.000 to 4.000" in text
    assert max(points.count(",") for points in re.findall(r'points="([^"]*)"', html)) <= MOST_POINTS + 1
    assert len(html) < 600_000


def test_what_comes_from_outside_is_text(tmp_path):
    nasty = '<script>alert("x")</script>'
    html = page_of(tmp_path, [step(1)], name=nasty, data=[nasty], settings={nasty: nasty})
    assert nasty in checked(html) and "<script" not in html


def test_an_error_is_told_and_the_page_is_there(tmp_path):
    html = page_of(tmp_path, [step(1)], error=ValueError("no <room>"))
    assert "ended by ValueError: no <room>" in checked(html)


def test_endings_have_no_names_from_inside(tmp_path):
    class _Private(ValueError):
        pass

    assert "ended by Private: why" in checked(page_of(tmp_path, [step(1)], error=_Private("why")))
    page = ReportPage(tmp_path / "stopped.html")
    with pytest.raises(KeyboardInterrupt), page:
        page.started(facts())
        page.stepped(step(1), REPORT, 10)
        raise KeyboardInterrupt
    assert "stopped at once on request" in checked((tmp_path / "stopped.html").read_text())


def test_settings_are_written_as_the_config_file_writes_them(tmp_path):
    assert "false" in checked(page_of(tmp_path, [step(1)], settings={"overwrite": False}))


def test_before_the_first_step_there_is_no_page(tmp_path):
    assert page_of(tmp_path, []) is None


def test_figures_that_are_not_finite_or_not_known_are_left_out(tmp_path):
    steps = [step(1, grad_norm=None), step(2, grad_norm=math.inf), step(3, grad_norm=2.0)]
    checked(page_of(tmp_path, steps))
    assert chart("nothing", [Line("norm", "a", [(1, math.nan)])]) == ""


def test_figures_of_a_run_that_diverges_fit_into_the_page(tmp_path):
    html = page_of(
        tmp_path, [step(1, lr=1e30), step(2, grad_norm=1e35)], [Evaluation(2, 690.0, 10, 0.1, True)]
    )
    assert max(map(len, re.findall(r">([^<>]+)</(?:text|b)>", html))) <= 32
    assert "perplexity 4.6e+299" in checked(html)


def test_points_lie_where_their_values_are():
    html = chart("c", [Line("v", "a", [(1, 0.0), (2, 10.0), (3, 5.0)])])
    (points,) = re.findall(r'points="([^"]*)"', html)
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert x1 < x2 < x3 and x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y2 < y3 < y1 and y3 == pytest.approx((y1 + y2) / 2, abs=0.11)
    assert short(12345.6) == "12,346"
