"""Predicted beside measured, at the end of a run."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from outsize.plan.profile import Resource
from outsize.plan.timeline import Span, Timeline
from outsize.train.compare import Figure, compare
from outsize.train.loop import train
from outsize.train.progress import PlainProgress
from outsize.train.report_page import ReportPage
from outsize.train.settings import Length
from tests.plan.test_simulate import HOST
from tests.train.standin import WORDS, PlainApi, write_model
from tests.train.test_loop import settings_for
from tests.train.test_report_page import step as step_of


@dataclass(frozen=True)
class Expected:
    step_s: float = 2.0
    host_bytes: int = 1 << 30
    stalled_s: float = 0.5
    bytes_read: int = 1000
    bytes_written: int = 0

    def timeline(self):
        return Timeline(self.step_s, (Span(Resource.COMPUTE, 0.0, 1.5, "forward L00"),), (), {})


class PredictingApi(PlainApi):
    def __init__(self):
        super().__init__()
        self.predicted = []

    def advise(self, model, profile, step_s, stalled_s):
        return None

    def predict(self, model, profile):
        self.predicted.append((self.calls, profile))
        return Expected()


def test_errors_are_parts_of_what_was_measured():
    figure = Figure("a step", 1.1, 1.0, "s")
    assert figure.error == pytest.approx(0.1)
    assert str(figure) == "a step: predicted 1.10 s, measured 1.00 s (+10%)"
    assert (
        str(Figure("memory", 1 << 30, 1 << 31, "B")) == "memory: predicted 1.00 GiB, measured 2.00 GiB (-50%)"
    )


def test_first_steps_do_not_count():
    steps = [step_of(i) for i in range(1, 3)]
    assert compare(Expected(), steps) == []
    steady = compare(Expected(), [*steps, *(step_of(i) for i in range(3, 6))])
    assert steady[0].what == "a step" and steady[0].measured == step_of(3).step_s
    assert len(steady) == len({figure.what for figure in steady})


def test_a_run_with_a_profile_is_predicted_once_and_compared(tmp_path):
    model = write_model(tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text((" ".join(WORDS) + "\n") * 20)
    console = Console(file=io.StringIO(), width=200)
    api = PredictingApi()
    settings = settings_for(model, data, tmp_path / "out", length=Length(steps=4))
    train(settings, api=api, watchers=[PlainProgress(console)], profile=HOST)
    assert api.predicted == [(1, HOST)]
    printed = console.file.getvalue()
    assert "a step: predicted 2.00 s, measured" in printed and "memory: predicted 1.00 GiB" in printed
    assert "Predicted and measured" in (settings.out / "report.html").read_text()


def test_a_run_without_one_is_not(tmp_path):
    page = ReportPage(tmp_path / "page.html")
    assert page._prediction() == ""
