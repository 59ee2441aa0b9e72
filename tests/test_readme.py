"""The README's first command and its loop run as they stand, on a tiny model in the place of the one they name."""

import re
import shlex
import subprocess

import torch

import outsize
from outsize.cli import main
from tests.documents import ROOT, Runner, fences
from tests.zoo import ZOO


def test_the_loop_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (block,) = (fence for fence in fences(ROOT / "README.md") if fence.language == "python")
    monkeypatch.chdir(tmp_path)
    ZOO["qwen3"].build().save_pretrained("Qwen3-0.6B")
    (tmp_path / "scratch").mkdir()
    batches = [ZOO["qwen3"].batch(seed=seed) for seed in range(2)]
    runner = Runner(tmp_path / "scratch", lambda: capsys.readouterr().out, {"loader": batches})
    runner.run(block)
    assert (tmp_path / "tuned" / "config.json").is_file()
    assert "process peak" in runner.printed
    assert torch.isfinite(outsize.load(tmp_path / "tuned").lm_head.weight.detach()).all()


def test_the_first_command_of_the_readme_runs_what_another_test_runs():
    """`make demo` comes to `outsize demo`, which tests/cli runs on a smaller model."""
    first = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    "))
    command = shlex.split(first, comments=True)
    assert command == ["make", "demo"]
    printed = subprocess.run(
        [*command, "--dry-run", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    last = printed.stdout.splitlines()[-1]
    assert re.fullmatch(r"\S*/outsize demo", last), last
    assert main.build_parser().parse_args(shlex.split(last)[1:]).command == "demo"
