"""`outsize demo`: everything at once on a small model, offline, in about two minutes."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.config import Pins, format_bytes
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from outsize.train.api import Api
    from outsize.train.demo import DemoFiles, DemoSize
    from outsize.train.loop import TrainResult

RESIDENT_BYTES = 0
"""Memory that may keep weights and state between visits: none, all of them live on disk."""

PREPARATION_S = 20.0
"""Seconds of the demo that are not training: tokenizer, imports, saving, generating."""

SHORTEST_S = 5.0
"""Seconds that training takes at least."""

MAX_NEW_TOKENS = 48
"""Tokens that are generated after each prompt."""

PROMPTS = ("def", "import os\n\n\nclass")

_MARK = "python.jsonl"

_EXAMPLES = """\
examples:
  outsize demo
      train, show what lived where, write a few lines of Python
  outsize demo --minutes 10 --out /nvme/outsize-demo
      longer, and on another disk

Works offline: the text is the source of Python's own standard library.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(
        commands, "demo", "train a small model out of core, offline, in two minutes", _EXAMPLES
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outsize-demo"), metavar="DIR", help="folder (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, metavar="N", help="how long to take (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare, train, show, generate."""
    from rich.console import Console

    from outsize.train.api import public_api
    from outsize.train.demo import DemoSize

    if not options.minutes > 0:
        raise ConfigError(f"minutes: {options.minutes} is not positive", hint="pass --minutes 2")
    quiet.after_imports()
    return show(Console(), options.out, options.minutes, DemoSize(), public_api())


def show(console: Console, out: Path, minutes: float, size: DemoSize, api: Api) -> int:
    """The demo, on `console`, in folder `out`."""
    from outsize.train.demo import prepare

    _claim(out)
    console.rule("[bold]outsize demo")
    console.print(
        "Writing a small language for Python: tokenizer, text and an untrained Llama ...", style="dim"
    )
    files = prepare(out, size)
    result = _train(console, out, minutes, size, files, api)
    _show_loss(console, result)
    _show_places(console, result)
    if not result.interrupted:
        _show_samples(console, result.out, api)
        console.print(f"\nThe model is an ordinary Hugging Face folder: {result.out}", highlight=False)
        console.print(
            f'Go on:  outsize generate {result.out} --prompt "class "', highlight=False, markup=False
        )
        console.print("        outsize train MODEL your-text.txt --out tuned", highlight=False, markup=False)
    return 130 if result.interrupted else 0


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` as a row of bars, lowest to highest, averaged to at most `width`.

    >>> sparkline([8.0, 6.0, 5.0, 4.0])
    '█▅▃▁'
    """
    bars = "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    cuts = [round(place * len(values) / count) for place in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(bars[round((mean - low) / ((high - low) or 1) * (len(bars) - 1))] for mean in means)


def _claim(out: Path) -> None:
    """Empty an earlier demo; refuse anything else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARK).is_file():
            raise ConfigError(
                f"{out} holds something that is no earlier demo", hint="pass --out with a new folder"
            )
        for name in ("untrained", "trained", "trained.partial", "store"):
            shutil.rmtree(out / name, ignore_errors=True)
    (out / "store").mkdir(parents=True, exist_ok=True)


def _train(
    console: Console, out: Path, minutes: float, size: DemoSize, files: DemoFiles, api: Api
) -> TrainResult:
    from outsize.train.data import DataFile
    from outsize.train.loop import train
    from outsize.train.progress import progress_on
    from outsize.train.settings import Learning, Length, TrainSettings

    console.print(
        f"Training on {files.num_files} source files of Python's standard library. Weights, gradients and "
        "optimizer state live on disk and pass through memory one layer at a time.\n",
        highlight=False,
    )
    settings = TrainSettings(
        model=files.model,
        data=(DataFile(files.data),),
        out=out / "trained",
        length=Length(minutes=max(minutes * 60 - PREPARATION_S, SHORTEST_S) / 60),
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        learning=Learning(lr=1.5e-3, warmup_steps=8),
        place={"disk": str(out / "store"), "home": "disk", "pins": Pins(resident_bytes=RESIDENT_BYTES)},
        from_scratch=True,
    )
    return train(settings, api=api, watchers=[progress_on(console)])


def _show_loss(console: Console, result: TrainResult) -> None:
    if result.losses:
        console.print(
            f"\nloss  {result.losses[0]:.2f} [green]{sparkline(result.losses)}[/] {result.losses[-1]:.2f}"
            f"   {result.num_steps} steps, {result.num_tokens:,} tokens, {result.duration_s:.0f} s\n",
            highlight=False,
            soft_wrap=True,
        )


def _show_places(console: Console, result: TrainResult) -> None:
    report = result.report
    console.print(
        f"{report.num_parameters / 1e6:.1f} M parameters, {format_bytes(report.state_bytes)} to train them. "
        "What lived where:",
        highlight=False,
    )
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)


def _show_samples(console: Console, folder: Path, api: Api) -> None:
    from outsize.model import load_tokenizer
    from outsize.serve import pipeline

    console.print("\nWhat it writes after so little training:", style="bold")
    generate = pipeline(api.load(folder, home="host"), tokenizer=load_tokenizer(folder))
    for seed, prompt in enumerate(PROMPTS):
        console.rule(style="dim")
        sys.stdout.write(prompt)
        for piece in generate.stream(
            prompt, max_new_tokens=MAX_NEW_TOKENS, temperature=0.6, top_p=0.9, seed=seed
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    console.rule(style="dim")
