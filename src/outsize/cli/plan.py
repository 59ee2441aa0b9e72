"""`outsize plan`: what fits, where it lives, how long a step takes, and what would make it shorter; loads nothing."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.cli import options as shared
from outsize.cli import quiet

if TYPE_CHECKING:
    from outsize.plan.profile import Profile

_EXAMPLES = """\
examples:
  outsize plan Qwen3-8B
      on this machine, with the memory that is free now
  outsize plan Qwen3-8B --host 16GiB --disk /nvme/scratch --batch-size 16 --seq-len 1024
      within hard limits
  outsize plan Qwen3-8B --generate --host 8GiB
      for generating only: no gradients, no optimizer
  outsize plan Qwen3-8B --hardware rtx4090-1ssd --batch-size 16 --seq-len 1024
      on a machine that you may want to buy: a name that is known, or a file that `outsize profile --out` wrote there

After `outsize profile`, which measures this machine once, a step's time is predicted too, with what limits it.
Exit status 0 if it fits, 1 if not.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(
        commands, "plan", "show what fits and where it lives, without loading it", _EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help=shared.MODEL_HELP)
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="sequences per step (%(default)s)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=512, metavar="T", help="tokens per sequence (%(default)s)"
    )
    parser.add_argument(
        "--generate", action="store_true", help="plan for generating text instead of training"
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help=f"plan for another machine: {', '.join(_known())}, or a profile that was measured there",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    shared.add_compile(shared.add_place(parser))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    outsize = importlib.import_module("outsize")
    from outsize.hardware.others import MOST_OTHERS, OtherPrograms

    quiet.after_imports()
    hardware = _machine(options.hardware) if options.hardware is not None else None
    profile = shared.profile_of(options.disk) if hardware is None else None
    others = OtherPrograms()
    summary = outsize.preview(
        options.model,
        attention=options.attention,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        train=not options.generate,
        profile=profile,
        hardware=hardware,
        **shared.load_options(options),
    )
    part = others.part()
    print(summary.to_json() if options.json else summary)
    if summary.prediction is not None and hardware is None and part > MOST_OTHERS:
        print(
            f"other programs took {part:.0%} of the processor meanwhile: plan again when they are done",
            file=sys.stderr,
        )
    if profile is None and hardware is None and not options.json:
        print(shared.UNPREDICTED.format(disk=f" --disk {options.disk}" if options.disk else ""))
    return 0 if summary.fits else 1


def _known() -> list[str]:
    """Names of machines whose profiles are shipped; found without importing what would measure them."""
    folder = importlib.resources.files("outsize") / "hardware" / "machines"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())


def _machine(text: str) -> Profile:
    """A shipped machine by name, or a profile by file. Raises ConfigError."""
    from outsize.hardware import machine
    from outsize.plan.profile import Profile

    path = Path(text)
    is_file = text not in _known() and (path.suffix or path.exists())
    return Profile.read(path) if is_file else machine(text)
