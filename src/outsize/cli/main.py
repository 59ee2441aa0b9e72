"""The `outsize` command: finds the command, runs it, and turns errors into two lines and an exit status.

Exit status: 0 done, 1 an error that is explained, 2 a command line that cannot be understood, 130 stopped by
Ctrl-C. torch is imported by the commands that need it, when they run: `outsize --help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from io import TextIOWrapper

from outsize.cli import checkpoint, demo, generate, plan, profile, quantize, quiet, trace, train
from outsize.cli.explain import Parser, explain
from outsize.errors import OutsizeError

_DESCRIPTION = "Train and run transformer models that are larger than the memory of this machine."

_EXAMPLES = """\
examples:
  outsize demo
      train a small model out of core, offline, in about two minutes
  outsize plan Qwen3-8B --host 16GiB --disk /nvme/scratch
      what would fit, and where it would live; loads nothing
  outsize train Qwen3-0.6B notes.txt --out tuned --host 3GiB --disk /nvme/scratch --steps 20
      fine-tune on a text file within 3 GiB of memory
  outsize generate tuned --prompt "The plan for today:"
      continue a text

MODEL is always a Hugging Face folder: config.json, safetensors, tokenizer. Nothing is downloaded.
"""


_SYSTEM_HINT = "is it there, is it yours, and is there room? OUTSIZE_DEBUG=1 shows what was being done"


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="outsize",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"outsize {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (plan, profile, train, checkpoint, trace, generate, quantize, demo):
        command.add_parser(commands)
    parser.commands = commands.choices
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options. What no option takes is refused by the command's own parser: it knows what is near."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.commands[options.command].unknown(unknown)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Usage errors and `--help` leave through SystemExit, as in
    argparse."""
    options = parse(arguments)
    # Registered first, so it runs last. Python would otherwise look through all objects of torch and transformers for
    # garbage before it ends: over a second of a process that a scheduler is about to kill.
    atexit.register(gc.freeze)
    quiet.before_imports()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be text
    try:
        status = options.run(options)
        assert isinstance(status, int), status
        sys.stdout.flush()
        return status
    except OutsizeError as error:
        if os.environ.get("OUTSIZE_DEBUG") == "1":
            raise
        explain(error.message, error.hint)
        _print_notes(error)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `outsize plan M | head -1`; let the interpreter's last
        # flush be silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # What no room foresaw: a folder above a file that may not be entered, a disk that went away.
        if os.environ.get("OUTSIZE_DEBUG") == "1":
            raise
        explain(f"{_place_of(error)}{error.strerror or error}", _SYSTEM_HINT)
        _print_notes(error)
        return 1


def _print_notes(error: Exception) -> None:
    """What was added to the error on its way, such as where the weights are."""
    for note in getattr(error, "__notes__", ()):
        print(f"note: {note}", file=sys.stderr)


def _place_of(error: OSError) -> str:
    """What the error is about, for a message; files name themselves, standard output does not."""
    if error.filename is not None:
        return f"{error.filename}: "
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter's last flush would fail as well, and change the exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "standard output: "
    return ""


def _version() -> str:
    try:
        return metadata.version("outsize")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
