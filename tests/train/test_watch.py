"""Watchers that fail once the run has begun are reported, and cost nothing else."""

import io
import json
import os
import resource
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from outsize.errors import ConfigError, StorageError
from outsize.train import loop
from outsize.train.loop import train
from outsize.train.metrics import StepMetrics
from outsize.train.metrics_file import MetricsFile
from outsize.train.progress import PlainProgress, RunConsole
from outsize.train.report_page import ReportPage
from outsize.train.trace import Trace
from outsize.train.watch import Watcher
from tests.train.standin import PlainApi, PlainReport
from tests.train.test_loop import settings_for, weights


class Offline(TrainerCallback):
    """A tracker whose network fails in one of its events."""

    event = ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.fail("begin")

    def on_log(self, args, state, control, **kwargs):
        self.fail("log")

    def on_train_end(self, args, state, control, **kwargs):
        self.fail("end")

    def fail(self, event):
        if event == self.event:
            raise ConnectionError("the server is gone")


def no_timeline(self, path):
    raise OSError(28, "No space left on device")


BREAK = {
    "metrics.jsonl": lambda patch: patch.setattr(
        loop, "MetricsFile", lambda path: MetricsFile(Path("/dev/full"))
    ),
    "report.html": lambda patch: patch.setattr(
        loop, "ReportPage", lambda path: ReportPage(Path("/dev/full"))
    ),
    "--tracker offline": lambda patch: patch.setattr(Offline, "event", "log"),
    "--tracker offline at its end": lambda patch: patch.setattr(Offline, "event", "end"),
    "outsize trace": lambda patch: patch.setattr(Trace, "write", no_timeline),
}


@pytest.mark.parametrize("name", BREAK)
def test_a_run_goes_on_without_what_cannot_be_written(model, data, tmp_path, monkeypatch, name):
    train(settings_for(model, data, tmp_path / "good"), api=PlainApi())
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "offline", Offline)
    BREAK[name](monkeypatch)
    console = Console(file=io.StringIO(), width=300)
    settings = settings_for(model, data, tmp_path / "out", trackers=("offline",))
    result = train(settings, api=PlainApi(), watchers=[PlainProgress(console)])
    assert result.num_steps == 6 and not result.interrupted
    got, expected = weights(tmp_path / "out"), weights(tmp_path / "good")
    assert all(got[key].equal(expected[key]) for key in expected)
    said = [line for line in console.file.getvalue().splitlines() if name.removesuffix(" at its end") in line]
    assert len(said) == 1, "said once, not at every step"
    if name != "outsize trace":
        [(failed, reason)] = result.failures.items()
        assert failed == name.removesuffix(" at its end")
        assert "server is gone" in reason or "/dev/full" in reason


class Guard(Watcher):
    """A user's own, which ends a run that has gone far enough."""

    def __init__(self):
        self.steps = []

    def stepped(self, metrics, report, num_steps):
        self.steps.append(metrics.step)
        if metrics.step == 2:
            raise RuntimeError("far enough")


def test_a_watcher_of_the_users_own_ends_the_run_by_raising(model, data, tmp_path):
    guard = Guard()
    with pytest.raises(RuntimeError, match="far enough"):
        train(settings_for(model, data, tmp_path / "out"), api=PlainApi(), watchers=[guard])
    assert guard.steps == [1, 2]


def test_a_tracker_that_cannot_begin_is_refused_before_the_first_step(model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "offline", Offline)
    monkeypatch.setattr(Offline, "event", "begin")
    api = PlainApi()
    with pytest.raises(ConfigError, match="--tracker offline cannot begin: the server is gone"):
        train(settings_for(model, data, tmp_path / "out", trackers=("offline",)), api=api)
    assert not api.calls


def step(number):
    return StepMetrics(number, 2.0, 1e-3, None, 10.0, 1.0, 1, 0, 0, {})


def test_lines_that_could_not_be_written_are_written_once_they_can_be(tmp_path):
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(path) as file:
        file.stepped(step(1), PlainReport(), None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            with pytest.raises(StorageError, match=r"metrics\.jsonl: File too large"):
                file.stepped(step(2), PlainReport(), None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.stepped(step(3), PlainReport(), None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_reader_that_leaves_does_not_end_the_run(model, data, tmp_path, monkeypatch):
    """As in `outsize train ... | head`."""
    source, sink = os.pipe()
    os.close(source)
    with (tmp_path / "stdout").open("w") as stands_for_stdout, os.fdopen(sink, "w") as file:
        monkeypatch.setattr(sys, "stdout", stands_for_stdout)
        settings = settings_for(model, data, tmp_path / "out")
        result = train(settings, api=PlainApi(), watchers=[PlainProgress(RunConsole(file=file))])
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), file.fileno()
        )  # what is buffered goes there when it is closed
    assert result.num_steps == 6 and (tmp_path / "out").is_dir()
