"""Predicted beside measured, at the end of a run."""

import io
import math
from dataclasses import dataclass

import pytest
from rich.console import Console

from outsize.plan.profile import WORDS, Resource
from outsize.plan.timeline import Span, Timeline
from outsize.train.compare import KEPT_STEPS, Figure, Steady, compare
from outsize.train.loop import train
from outsize.train.progress import PlainProgress
from outsize.train.report_page import ReportPage
from outsize.train.settings import Evaluating, Length
from outsize.train.trace import Trace
from tests.plan.test_simulate import HOST
from tests.train.standin import WORDS as TEXT
from tests.train.standin import PlainApi, PlainReport, write_model
from tests.train.test_loop import settings_for
from tests.train.test_report_page import step as step_of


@dataclass(frozen=True)
class Expected:
    step_s: float = 2.0
    host_bytes: int = 1 << 30
    device_bytes: int = 0
    stalled_s: float = 0.5
    bytes_read: int = 1000
    bytes_written: int = 0

    def timeline(self):
        return Timeline(self.step_s, (Span(Resource.COMPUTE, 0.0, 1.5, "forward L00"),), (), {})


class PredictingApi(PlainApi):
    def __init__(self):
        super().__init__()
        self.predicted = []
        self.advised = []

    def advise(self, model, profile, step_s, stalled_s):
        self.advised.append(self.calls)
        return "--pin weight_slots=4"

    def predict(self, model, profile, commit_every):
        self.predicted.append((self.calls, profile))
        return Expected()


def test_errors_are_parts_of_what_was_measured():
    figure = Figure("a step", 1.1, 1.0, "s")
    assert figure.error == pytest.approx(0.1)
    assert str(figure) == "a step: predicted 1.1 s, measured 1 s (+10%)"
    assert (
        str(Figure("memory", 1 << 30, 1 << 31, "B")) == "memory: predicted 1.00 GiB, measured 2.00 GiB (-50%)"
    )


def test_what_was_not_there_at_all_is_infinitely_wrong():
    assert Figure("waiting", 0.5, 0.0, "s").error == math.inf
    assert str(Figure("waiting", 0.5, 0.0, "s")) == "waiting: predicted 500 ms, measured 0 s"
    assert Figure("waiting", 0.0, 0.0, "s").error == 0.0


def steady_of(numbers, evaluated=()):
    steady = Steady()
    for number in numbers:
        steady.stepped(step_of(number, step_s=float(number)))
        if number in evaluated:
            steady.evaluated()
    return steady


def test_first_steps_and_those_after_an_evaluation_do_not_count():
    assert compare(Expected(), steady_of([1, 2]).steps, PlainReport(), None) == []
    steady = steady_of(range(1, 9), evaluated=(1, 4, 6))
    assert [metrics.step for metrics in steady.steps] == [3, 4, 6, 8]
    figures = compare(Expected(), steady.steps, PlainReport(), None)
    assert figures[0].what == "a step" and figures[0].measured == 5.0
    assert len(figures) == len({figure.what for figure in figures})


def test_of_a_run_without_end_the_latest_steps_are_kept():
    steady = steady_of(range(1, 3 * KEPT_STEPS))
    assert len(steady.steps) == KEPT_STEPS and steady.steps[-1].step == 3 * KEPT_STEPS - 1


def test_memory_of_a_device_and_the_three_largest_differences_are_told():
    predicted = Timeline(
        4.0, tuple(Span(each, 0.0, 1.0 + index, "x") for index, each in enumerate(Resource)), (), {}
    )
    measured = Timeline(4.0, tuple(Span(each, 0.0, 1.0, "x") for each in Resource), (), {})
    report = PlainReport(device_peak_bytes=1 << 30)
    steps = steady_of([1, 2, 3]).steps
    figures = compare(Expected(device_bytes=2 << 30), steps, report, Trace("x", 4, predicted, measured))
    told = {figure.what: figure for figure in figures}
    assert told["memory of the device"].error == 1.0
    assert list(told)[-3:] == [f"{each} in step 4" for each in differing(predicted, measured)]
    assert told[list(told)[-1]].measured == 1.0


def differing(predicted, measured):
    found = {each: abs(predicted.busy_s[each] - measured.busy_s[each]) for each in Resource}
    return [WORDS[each] for each in sorted(found, key=lambda each: -found[each])[:3]]


def test_a_run_with_a_profile_is_predicted_once_and_compared(tmp_path):
    model = write_model(tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text((" ".join(TEXT) + "\n") * 20)
    console = Console(file=io.StringIO(), width=200)
    api = PredictingApi()
    settings = settings_for(model, data, tmp_path / "out", length=Length(steps=4))
    train(settings, api=api, watchers=[PlainProgress(console)], profile=HOST)
    assert api.predicted == [(1, HOST)] and api.advised == [3]
    printed = console.file.getvalue()
    assert "a step: predicted 2 s, measured" in printed and "memory: predicted 1.00 GiB" in printed
    assert printed.count("another plan would be faster: --pin weight_slots=4") == 1
    assert "computing in step 4: predicted 1.5 s, measured 1 s (+50%)" in printed
    assert "Predicted and measured" in (settings.out / "report.html").read_text()


@pytest.mark.parametrize(("every", "advised"), [(1, []), (2, [4])])
def test_a_step_after_an_evaluation_is_not_what_advice_is_founded_on(every, advised, tmp_path):
    model = write_model(tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text((" ".join(TEXT) + "\n") * 20)
    api = PredictingApi()
    evaluating = Evaluating(fraction=0.3, every=every)
    settings = settings_for(model, data, tmp_path / "out", length=Length(steps=6), evaluating=evaluating)
    train(settings, api=api, profile=HOST)
    assert api.advised == advised


def test_a_run_without_one_is_not(tmp_path):
    page = ReportPage(tmp_path / "page.html")
    assert page._prediction() == ""
