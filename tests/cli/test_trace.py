"""`outsize trace`: what it writes and prints, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.cli import main
from outsize.errors import ConfigError
from tests.train.test_trace import run_folder, trace


def run(*arguments):
    return main.main(["trace", *map(str, arguments)])


def test_both_files_are_written_and_the_figures_are_said(tmp_path, capsys):
    folder = run_folder(tmp_path)
    for _ in range(2):  # an earlier trace is replaced
        assert run(folder) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    lines = lines[: len(lines) // 2]
    assert lines[0].startswith("step 4: predicted ") and "measured 2 s (" in lines[0]
    assert lines[1] == "computing waited 500 ms of it, mostly for reading the disk"
    assert lines[2] == "seconds busy that differ most:" and len(lines) == 8
    differences = trace().differences()[:3]
    assert lines[3:6] == [f"  {difference}" for difference in differences]
    assert str(folder / "trace.html") in lines[6] and str(folder / "trace.json") in lines[7]
    assert '<canvas id="trace"' in (folder / "trace.html").read_text()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_without_a_prediction_it_says_so(tmp_path, capsys):
    assert run(run_folder(tmp_path, trace(predicted=False))) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step 4: measured 2 s, not predicted\n") and "outsize profile" in printed


def test_files_go_where_they_are_asked_to(tmp_path, capsys):
    folder = run_folder(tmp_path)
    assert run(folder, "--out", tmp_path / "a.html", "--perfetto", tmp_path / "b.json") == 0
    assert (tmp_path / "a.html").exists() and (tmp_path / "b.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "timeline.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    def full(self, text, encoding=None):
        raise OSError(28, "No space left on device")

    folder = run_folder(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert run(folder) == 1
    assert f"error: {folder / 'trace.html'}: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--perfetto"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("absent/file", "there is no folder"),
        ("run/metrics.jsonl", "the file there is no trace"),
        ("run", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_lost(option, place, said, tmp_path, capsys):
    folder = run_folder(tmp_path)
    assert run(folder, option, tmp_path / place) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert (
        error.startswith(f"error: {option} {tmp_path / place}")
        and said in error
        and hint.startswith("hint: ")
    )
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "timeline.json"]


def test_a_folder_whose_name_is_no_text_is_drawn_too(tmp_path):
    folder = run_folder(tmp_path).rename(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    command = [sys.executable, "-m", "outsize.cli.main", "trace", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert "run\ufffd, step 4" in (folder / "trace.html").read_text(encoding="utf-8")


def test_one_page_that_cannot_be_made_leaves_neither(tmp_path, monkeypatch):
    def fail(found):
        raise ConfigError("no", hint="none")

    monkeypatch.setattr("outsize.train.perfetto.perfetto", fail)
    folder = run_folder(tmp_path)
    assert run(folder) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "timeline.json"]


def test_one_file_for_both_is_refused(tmp_path, capsys):
    assert run(run_folder(tmp_path), "--out", tmp_path / "x", "--perfetto", tmp_path / "x") == 1
    assert "error: --out and --perfetto are both" in capsys.readouterr().err


def test_what_is_no_run_is_two_lines_and_1(tmp_path, capsys):
    assert run(tmp_path / "none") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: no such folder: {tmp_path / 'none'}" and "outsize train" in hint


def test_it_imports_no_torch(tmp_path):
    code = "import sys, outsize.cli.main as m; m.main(sys.argv[1:]); print({'torch', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "trace", run_folder(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
