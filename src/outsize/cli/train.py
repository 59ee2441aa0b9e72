"""`outsize train`: fine-tune a model on a text file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.cli import options as shared
from outsize.cli import quiet

if TYPE_CHECKING:
    from outsize.train.settings import TrainSettings

_EXAMPLES = """\
examples:
  outsize train Qwen3-0.6B notes.txt --out tuned
      once through the text, in the memory that is free
  outsize train Qwen3-0.6B stories.jsonl --out tuned --host 3GiB --disk /nvme/scratch --seq-len 512 --steps 20
      20 steps within 3 GiB of memory; lines such as {"text": "Once upon a time ..."}
  outsize train Qwen3-0.6B notes.txt --out tuned --overwrite --minutes 30 --batch-size 32
      as many steps as fit into half an hour; a larger batch costs no more transfers

OUT becomes an ordinary Hugging Face folder with a metrics.jsonl beside the weights; until it is complete, the
run lives in OUT.partial. Ctrl-C finishes the step and saves; twice stops at once.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(commands, "train", "fine-tune a model on a text file or JSON lines", _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", type=Path, help=shared.MODEL_HELP)
    parser.add_argument(
        "data", metavar="DATA", type=Path, help='text file, or .jsonl with a "text" field per line'
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in OUT once this is saved"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="number of updates")
    length.add_argument("--epochs", type=float, metavar="N", help="times through the data (1)")
    length.add_argument("--minutes", type=float, metavar="N", help="as many steps as fit into the time")
    learning = parser.add_argument_group("learning")
    learning.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="sequences per step (%(default)s)"
    )
    learning.add_argument(
        "--seq-len", type=int, default=512, metavar="T", help="tokens per sequence (%(default)s)"
    )
    learning.add_argument("--lr", type=float, default=1e-5, help="peak learning rate (%(default)s)")
    learning.add_argument(
        "--warmup", type=int, default=10, metavar="N", help="steps of warm-up (%(default)s)"
    )
    learning.add_argument(
        "--weight-decay", type=float, default=0.01, metavar="W", help="for matrices (%(default)s)"
    )
    learning.add_argument(
        "--max-grad-norm",
        type=_number_or_none,
        default=1.0,
        metavar="G",
        help="clip to this, or none (%(default)s)",
    )
    learning.add_argument(
        "--seed", type=int, default=0, help="for the order of the data and dropout (%(default)s)"
    )
    shared.add_place(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, then print what lived where."""
    from rich.console import Console

    from outsize.train.loop import train
    from outsize.train.progress import progress_on

    quiet.after_imports()
    console = Console()
    result = train(settings_of(options), progress=progress_on(console))
    console.print(str(result.report), markup=False, highlight=False)
    stopped = "stopped early; " if result.interrupted else ""
    last = f", loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}" if result.losses else ""
    console.print(
        f"{stopped}{result.num_steps} steps{last}; saved {result.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 130 if result.interrupted else 0


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """The command line as settings; raises ConfigError."""
    from outsize.train.settings import Learning, Length, TrainSettings

    given = (options.steps, options.epochs, options.minutes)
    epochs = 1.0 if given == (None, None, None) else options.epochs
    return TrainSettings(
        model=options.model,
        data=options.data,
        out=options.out,
        length=Length(steps=options.steps, epochs=epochs, minutes=options.minutes),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        learning=Learning(
            lr=options.lr,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
        ),
        place=shared.place_of(options),
        seed=options.seed,
        overwrite=options.overwrite,
    )


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)
