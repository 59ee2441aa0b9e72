"""Runs of `train` that commit, are broken off, and go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import outsize
from outsize.checkpoint.catalogue import contents
from outsize.cli.main import main
from outsize.engine.api import Options
from outsize.errors import ConfigError
from outsize.train import evaluate
from outsize.train.data import DataFile
from outsize.train.evaluate import mean_loss
from outsize.train.loop import train
from outsize.train.schedule import Shape
from outsize.train.settings import Checkpointing, Evaluating, Learning, Length
from outsize.train.watch import Watcher
from tests.running import settled  # noqa: F401
from tests.seams import close_all
from tests.train.test_loop import settings_for

SOURCES = Path(__file__).parents[2] / "src"


class Interrupt(Watcher):
    """Sends SIGTERM to this process after a step, as a scheduler would; or fails, as a machine would."""

    def __init__(self, step, kind=signal.SIGTERM):
        self.step = step
        self.kind = kind

    def stepped(self, metrics, report, num_steps):
        if metrics.step == self.step:
            if self.kind is None:
                raise RuntimeError("the machine is gone")
            os.kill(os.getpid(), self.kind)


def settings(model, data, out, *, resume=False, every=2, **changes):
    place = changes.pop("place", Options(disk=str(out.parent), home="disk", dtype="float32"))
    return settings_for(
        model, data, out, checkpointing=Checkpointing(every=every, resume=resume), place=place, **changes
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(line):
    return {
        key: value for key, value in line.items() if key in ("step", "loss", "lr", "grad_norm", "eval_loss")
    }


@pytest.mark.parametrize("kind", [signal.SIGTERM, None])
@pytest.mark.parametrize("home", ["disk", "host"])
def test_a_run_that_goes_on_is_the_run(kind, home, model, data, tmp_path):
    evaluating = Evaluating(fraction=0.2, every=3)
    place = Options(disk=str(tmp_path), home=home, dtype="float32")
    options = {"evaluating": evaluating, "place": place, "length": Length(steps=8)}
    whole = train(settings_for(model, data, tmp_path / "whole", **options))
    close_all()
    out = tmp_path / "out"
    if kind is None:
        with pytest.raises(RuntimeError):
            train(settings(model, data, out, **options), watchers=[Interrupt(5, kind)])
    else:
        first = train(settings(model, data, out, **options), watchers=[Interrupt(5, kind)])
        assert first.interrupted and not out.exists() and first.checkpoint.is_dir()
    close_all()
    committed = contents(tmp_path / "out.checkpoint").commits[-1].step
    assert committed == (5 if kind is not None else 4)
    told = []

    class Listener(Watcher):
        def say(self, text):
            told.append(text)

    result = train(settings(model, data, out, resume=True, **options), watchers=[Listener()])
    assert any(f"going on after step {committed}" in text for text in told)
    assert result.losses == whole.losses and result.num_steps == 8
    assert [e.loss for e in result.evaluations] == [e.loss for e in whole.evaluations]
    assert list(map(without_times, lines(out))) == list(map(without_times, lines(tmp_path / "whole")))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "complete" in (out / "report.html").read_text()


def test_an_evaluation_that_a_kill_broke_off_is_made_when_the_run_goes_on(model, data, tmp_path, monkeypatch):
    place = Options(disk=str(tmp_path), home="disk", dtype="float32")
    options = {"evaluating": Evaluating(fraction=0.2, every=2), "place": place, "length": Length(steps=8)}
    whole = train(settings_for(model, data, tmp_path / "whole", **options))
    close_all()
    out = tmp_path / "out"
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        measured = mean_loss(*arguments)
        if len(calls) == 2:
            outsize.checkpoint.finish(arguments[0])
            raise RuntimeError("killed")
        return measured

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(evaluate, "mean_loss", killed)
        train(settings(model, data, out, **options))
    close_all()
    assert contents(tmp_path / "out.checkpoint").commits[-1].step == 4
    result = train(settings(model, data, out, resume=True, **options))
    assert [e.step for e in result.evaluations] == [2, 4, 6, 8]
    assert [e.loss for e in result.evaluations] == [e.loss for e in whole.evaluations]
    assert result.losses == whole.losses
    assert list(map(without_times, lines(out))) == list(map(without_times, lines(tmp_path / "whole")))


def test_a_longer_run_goes_on_from_one_that_is_complete(model, data, tmp_path):
    learning = Learning(lr=1e-2, warmup_steps=2, schedule=Shape.CONSTANT)
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=4), learning=learning))
    close_all()
    result = train(settings(model, data, out, resume=True, length=Length(steps=7), learning=learning))
    close_all()
    place = Options(disk=str(tmp_path), home="disk", dtype="float32")
    whole = train(
        settings_for(model, data, tmp_path / "whole", length=Length(steps=7), learning=learning, place=place)
    )
    assert result.losses == whole.losses
    assert [line["step"] for line in lines(out)] == list(range(1, 8))


class Facts(Watcher):
    """Keeps what is known before the first step."""

    def started(self, facts):
        self.facts = facts


def test_a_run_that_goes_on_counts_the_time_of_its_earlier_processes(model, data, tmp_path, monkeypatch):
    """The first process runs for an hour."""
    clock, passed_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed_s[0])

    class Hour(Watcher):
        def stepped(self, metrics, report, num_steps):
            passed_s[0] = 3600.0

    out = tmp_path / "out"
    first = train(
        settings(model, data, out, length=Length(steps=8)), watchers=[Interrupt(4), Hour(), before := Facts()]
    )
    close_all()
    result = train(
        settings(model, data, out, resume=True, length=Length(steps=6)), watchers=[after := Facts()]
    )
    assert before.facts.elapsed_s == 0.0 and first.duration_s > 3600
    assert after.facts.elapsed_s > 3600 and result.duration_s > after.facts.elapsed_s
    assert "1 h 0 min" in (out / "report.html").read_text()


def test_resume_begins_where_there_is_no_commit(model, data, tmp_path):
    result = train(settings(model, data, tmp_path / "out", resume=True, length=Length(steps=2)))
    assert result.num_steps == 2 and (tmp_path / "out").is_dir()


def test_metrics_that_are_lost_do_not_hold_a_run_up(model, data, tmp_path):
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=8)), watchers=[Interrupt(4)])
    close_all()
    (tmp_path / "out.partial" / "metrics.jsonl").unlink()
    result = train(settings(model, data, out, resume=True, length=Length(steps=6)))
    assert result.num_steps == 6
    assert [line["step"] for line in lines(out)] == [5, 6]


def test_commits_of_an_earlier_run_are_not_overwritten(model, data, tmp_path):
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=8)), watchers=[Interrupt(4)])
    close_all()
    with pytest.raises(ConfigError, match="after step 4") as caught:
        train(settings(model, data, out, length=Length(steps=8), overwrite=True))
    assert "--resume" in caught.value.hint
    assert contents(tmp_path / "out.checkpoint").commits[-1].step == 4


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 2}, "batch-size"),
        ({"seq_len": 8}, "seq-len"),
        ({"seed": 5}, "seed"),
        ({"learning": Learning(lr=1e-3, warmup_steps=2)}, "lr"),
        ({"evaluating": Evaluating(fraction=0.3)}, "eval-split"),
    ],
)
def test_what_would_make_it_another_run_is_refused(changes, name, model, data, tmp_path):
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=8)), watchers=[Interrupt(4)])
    close_all()
    with pytest.raises(ConfigError, match=f"--{name}"):
        train(settings(model, data, out, resume=True, length=Length(steps=8), **changes))
    close_all()
    assert contents(tmp_path / "out.checkpoint").commits[-1].step == 4
    assert train(settings(model, data, out, resume=True, length=Length(steps=5))).num_steps == 5


def test_the_data_are_known_by_what_they_hold(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=8)), watchers=[Interrupt(4)])
    close_all()
    text = data.read_text()
    data.write_text(text.upper())
    with pytest.raises(ConfigError, match=r"text\.txt is not what the run that is resumed had") as caught:
        train(settings(model, data, out, resume=True, length=Length(steps=8)))
    assert "export the commit" in caught.value.hint
    close_all()
    data.write_text(text)
    weighted = dataclasses.replace(settings(model, data, out, resume=True), data=(DataFile(data, 0.5),) * 2)
    with pytest.raises(ConfigError, match=r"data: .*text\.txt@0\.5 .*, and the run that is resumed had"):
        train(weighted)
    close_all()
    monkeypatch.chdir(tmp_path)
    result = train(settings(model, Path("text.txt"), out, resume=True, length=Length(steps=5)))
    assert result.num_steps == 5, "the same file by another path"
    close_all()
    data.rename(tmp_path / "moved.txt")
    moved = settings(model, tmp_path / "moved.txt", out, resume=True, length=Length(steps=6))
    assert train(moved).num_steps == 6


def test_commits_of_a_loop_of_ones_own_are_named(model, data, tmp_path):
    own = outsize.load(model, disk=str(tmp_path), dtype="float32").train()
    optimizer = outsize.AdamW(own, outsize.decay_groups(own, 0.01), lr=1e-3)
    outsize.checkpoint.resume(own, optimizer, tmp_path / "out.checkpoint")
    ids = torch.ones(1, 8, dtype=torch.long)
    own(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    outsize.checkpoint.commit(own, optimizer, tmp_path / "out.checkpoint")
    outsize.checkpoint.finish(own)
    close_all()
    with pytest.raises(ConfigError, match="loop of one's own"):
        train(settings(model, data, tmp_path / "out", resume=True))


def test_a_killed_command_goes_on(model, data, tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "outsize.cli.main", "train", str(model), str(data), "--out", str(out)),
        *(
            "--steps",
            "400",
            "--batch-size",
            "4",
            "--seq-len",
            "16",
            "--disk",
            str(tmp_path),
            "--home",
            "disk",
        ),
        *("--checkpoint-every", "1", "--resume"),
    ]
    environment = {**os.environ, "OUTSIZE_EAGER": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    commits = tmp_path / "out.checkpoint" / "commits"
    while not list(commits.glob("*3.json")):
        assert run.poll() is None, run.stderr.read().decode()
        time.sleep(0.01)
    run.kill()
    run.communicate()
    committed = contents(tmp_path / "out.checkpoint").commits[-1].step
    assert committed >= 3
    result = train(
        settings(
            model,
            data,
            out,
            resume=True,
            every=1,
            length=Length(steps=committed + 2),
            learning=Learning(),
            place=Options(disk=str(tmp_path), home="disk"),
        )
    )
    assert result.num_steps == committed + 2 == len(lines(out))


def test_the_command_looks_checks_exports_and_removes(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    train(settings(model, data, out, length=Length(steps=4)))
    close_all()
    folder = str(tmp_path / "out.checkpoint")
    assert main(["checkpoint", "list", folder]) == 0
    printed = capsys.readouterr().out
    assert " 4  " in printed and "1 commit in" in printed
    assert main(["checkpoint", "show", folder]) == 0
    assert "AdamW" in capsys.readouterr().out
    assert main(["checkpoint", "verify", folder]) == 0
    assert "as they were written" in capsys.readouterr().out
    assert main(["checkpoint", "export", folder, str(tmp_path / "exported")]) == 0
    ours, theirs = (load_file(each / "model.safetensors") for each in (tmp_path / "exported", out))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "exported" / "tokenizer.json").exists()
    assert main(["checkpoint", "export", folder, str(tmp_path / "exported")]) == 1
    assert main(["checkpoint", "export", folder, str(tmp_path / "x"), "--step", "3"]) == 1
    assert "it has 4" in capsys.readouterr().err
    assert main(["checkpoint", "remove", folder, "--step", "9"]) == 1
    assert main(["checkpoint", "remove", folder, "--step", "4"]) == 0
    assert main(["checkpoint", "verify", folder]) == 1
    assert main(["checkpoint", "remove", folder, "--all"]) == 0
    assert not Path(folder).exists()
    assert main(["checkpoint", "list", folder]) == 1
    assert "no checkpoint" in capsys.readouterr().err
