"""`outsize quantize`: write a model with the matrices of its layers in few bits."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.cli.generate import add_weights
from outsize.config import format_bytes
from outsize.errors import ConfigError

_EXAMPLES = """\
examples:
  outsize quantize Qwen3-8B Qwen3-8B-int4 --weights int4
      a folder of a third of the size, in memory of about a layer
  outsize generate Qwen3-8B-int4 --prompt "def main" --host 4GiB
      text from it: a third of the bytes stream

The folder is for generating with outsize; transformers does not read it. Its weights are not trained.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(commands, "quantize", "write a model with its weights in few bits", _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    add_weights(parser, required=True)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Encode block by block."""
    if not options.model.is_dir():
        raise ConfigError(f"no such folder: {options.model}", hint="pass the folder of a Hugging Face model")
    if options.out.exists():
        raise ConfigError(f"{options.out} is there already", hint="pass the name of a folder to make")
    outsize = importlib.import_module("outsize")
    quiet.after_imports()
    model = outsize.load(options.model, weights=options.weights)
    outsize.save(model, options.out, tokenizer_from=options.model, watch=_tell)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    before, after = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (options.model, options.out)
    )
    print(f"{options.out}: {format_bytes(after)}, from {format_bytes(before)}")
    return 0


def _tell(number: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kblock {number} of {count}", end="", file=sys.stderr, flush=True)
