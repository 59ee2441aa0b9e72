"""The update rule is compiled before a run takes memory, once."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from outsize.cli import compiling, main


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """The commands that would build; each leaves a package, unless told otherwise by its exit status."""
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path))
    monkeypatch.delenv("OUTSIZE_EAGER", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    (tmp_path / "rules").mkdir()
    commands, status = [], [0]

    def run(command, **options):
        commands.append(command)
        package = tmp_path / "rules" / "adamw-bfloat16.pt2"
        package.write_text("package")
        return SimpleNamespace(returncode=status[0], stdout=f"a warning\n{package}\n")

    monkeypatch.setattr(compiling.subprocess, "run", run)
    return SimpleNamespace(commands=commands, status=status, folder=tmp_path / "rules")


def test_a_rule_is_compiled_once_and_it_is_said(builds, capsys):
    compiling.compile_first("adamw", "bfloat16")
    assert "compiling the update rule adamw" in capsys.readouterr().err
    assert builds.commands[0][-2:] == ["adamw", "bfloat16"]
    compiling.compile_first("adamw", "bfloat16")
    assert len(builds.commands) == 1 and not capsys.readouterr().err
    compiling.compile_first("adamw", None)
    compiling.compile_first("lion", "bfloat16")
    assert [command[-2:] for command in builds.commands[1:]] == [["adamw", ""], ["lion", "bfloat16"]]


def test_a_package_that_is_gone_or_failed_is_built_again(builds):
    compiling.compile_first("adamw", "bfloat16")
    (builds.folder / "adamw-bfloat16.pt2").unlink()
    builds.status[0] = 1
    compiling.compile_first("adamw", "bfloat16")
    for stamp in builds.folder.glob("*.stamp"):
        stamp.unlink()
    compiling.compile_first("adamw", "bfloat16")
    compiling.compile_first("adamw", "bfloat16")
    assert len(builds.commands) == 4


def test_nothing_is_compiled_where_rules_run_eagerly_or_a_run_is_refused(builds, monkeypatch, tmp_path):
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    compiling.compile_first("adamw", "bfloat16")
    monkeypatch.delenv("OUTSIZE_EAGER")
    (tmp_path / "data.txt").write_text("text\n")
    arguments = [
        "train",
        str(tmp_path / "nowhere"),
        str(tmp_path / "data.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main.main(arguments) != 0
    assert not builds.commands


def test_it_needs_no_torch():
    code = "import sys, outsize.cli.compiling, outsize.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
