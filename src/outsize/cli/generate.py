"""`outsize generate`: continue a text, printed as it appears."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.errors import ConfigError

_EXAMPLES = """\
examples:
  outsize generate tuned --prompt "The plan for today:"
      the likeliest continuation (greedy)
  outsize generate tuned --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1
      a sampled one; the same seed gives the same text
  outsize generate Qwen3-8B --prompt "def main" --host 4GiB --max-new-tokens 40
      with less memory than the model has weights
  echo "Dear diary," | outsize generate tuned --prompt -
      the prompt from standard input

The text goes to standard output, everything else to standard error.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(commands, "generate", "continue a text", _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", type=Path, help=shared.MODEL_HELP)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads standard input"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="at most so many (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="sample; below 1 is bolder, 0 is greedy"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this weight"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling (%(default)s)")
    shared.add_place(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Load, and stream the continuation to standard output."""
    _check(options)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    from outsize.train.sample import Sampling, stream_text

    outsize = importlib.import_module("outsize")
    quiet.after_imports()
    place = shared.place_of(options)
    model = outsize.load(
        options.model,
        device=place.device,
        host=place.host,
        disk=place.disk,
        home=place.home,
        dtype=place.dtype,
        pins=place.pins,
        attention=place.attention,
    )
    model.requires_grad_(False)  # no memory for gradients
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    stream_text(model, options.model, prompt, sampling, sys.stdout)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not options.model.is_dir():
        raise ConfigError(f"no such folder: {options.model}", hint="pass the folder of a Hugging Face model")
    if options.prompt == "":
        raise ConfigError("--prompt is empty", hint='pass --prompt "some text", or --prompt - to read it')
