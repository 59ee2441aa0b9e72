"""Trackers by name: what they are told, and names that are none."""

import sys

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from outsize.errors import ConfigError
from outsize.train.metrics import Evaluation
from outsize.train.trackers import trackers
from tests.train.test_report_page import REPORT, facts, step


class Heard(TrainerCallback):
    events = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.events.append(("begin", args.run_name, state.max_steps))

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        self.events.append(("log", state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


def run(watcher):
    with watcher:
        watcher.started(facts())
        watcher.stepped(step(1, 2.5), REPORT, 10)
        watcher.evaluated(Evaluation(1, 0.0, 10, 0.1, True))
        watcher.ended(REPORT, interrupted=False)


def test_a_tracker_of_transformers_hears_what_a_trainer_would_tell_it(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "heard", Heard)
    Heard.events.clear()
    [watcher] = trackers(["heard"], tmp_path)
    run(watcher)
    begin, log, evaluation, end = Heard.events
    assert begin == ("begin", "run <1>", 10) and end == ("end", 1)
    assert log[:2] == ("log", 1) and log[2]["train/loss"] == 2.5 and log[2]["io/wait_s"] == 0.1
    assert evaluation == ("log", 1, {"eval/loss": 0.0, "eval/perplexity": 1.0})


def test_a_name_that_nobody_knows(tmp_path):
    with pytest.raises(ConfigError, match="--tracker diary: not known") as caught:
        trackers(["diary"], tmp_path)
    assert "mlflow" in caught.value.hint and "tensorboard" in caught.value.hint


def test_a_tracker_whose_package_is_missing(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("HeardCallback requires heard to be installed.\nRun ...")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "heard", missing)
    with pytest.raises(ConfigError, match="--tracker heard: HeardCallback requires heard") as caught:
        trackers(["heard"], tmp_path)
    assert caught.value.hint == "pip install heard"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard: the package is missing"):
        trackers(["tensorboard"], tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [watcher] = trackers(["tensorboard"], tmp_path)
    run(watcher)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5)]
    assert events.Scalars("eval/perplexity")[0].value == 1.0
