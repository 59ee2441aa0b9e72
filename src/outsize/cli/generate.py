"""`outsize generate`: continue texts, printed as they appear; or answer a file of prompts."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.config import Weights
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from outsize.serve import Concurrency, Pipeline, Progress, Request

_EXAMPLES = """\
examples:
  outsize generate tuned --prompt "The plan for today:"
      the likeliest continuation (greedy)
  outsize generate tuned --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1
      a sampled one; the same seed gives the same text
  outsize generate Qwen3-8B --prompt "def main" --host 4GiB --max-new-tokens 40
      with less memory than the model has weights
  outsize generate Qwen3-8B --prompt "def main" --weights int4
      in a quarter of the memory; `outsize quantize` keeps weights so on disk
  echo "Dear diary," | outsize generate tuned --prompt -
      the prompt from standard input
  outsize generate Qwen3-8B --prompts questions.jsonl --out answers.jsonl --host 8GiB
      a file of prompts, many at once; started again, it goes on where it was stopped

Each line of a file of prompts is a JSON object with "prompt", a text, or with "messages", a list; "id" is handed
through, and "temperature", "max_new_tokens" and the like hold for that line alone.
The text goes to standard output, everything else to standard error.
"""

_SAY_EVERY_S = 10.0


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(commands, "generate", "continue texts", _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", type=Path, help=shared.MODEL_HELP)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, repeatable; - reads standard input",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines of prompts to answer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where their answers go, as JSON lines")
    _add_settings(parser.add_argument_group("how it is continued"))
    add_weights(shared.add_place(parser))
    parser.set_defaults(run=run)


def add_weights(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    """How matrices are kept."""
    group.add_argument(
        "--weights",
        choices=[str(kind) for kind in Weights],
        required=required,
        help="keep the matrices of layers in 8 or 4 bits: less memory and reading, nearly the same text",
    )


def _add_settings(group: Any) -> None:
    """Each option is a setting of `Pipeline.submit` by its destination."""
    add = group.add_argument
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most so many (%(default)s)")
    add("--temperature", type=float, metavar="X", help="sample; below 1 is bolder, 0 is greedy")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this weight")
    add("--min-p", type=float, metavar="P", help="sample among tokens with this part of the likeliest one's")
    add("--repetition-penalty", type=float, metavar="X", help="above 1, what was said is said less")
    add("--seed", type=int, default=0, help="for sampling (%(default)s)")
    add("--stop", action="append", metavar="TEXT", help="end where this would come, repeatable")
    add("--samples", dest="num_samples", type=int, metavar="N", help="so many continuations of each prompt")
    add(
        "--logprobs",
        type=int,
        metavar="N",
        help="tell each token's log-probability, and the N likeliest (with --out)",
    )
    add("--prompt-logprobs", action="store_true", default=None, help="tell those of the prompt (with --out)")
    add("--kv", metavar="SIZE", help="memory of the KV cache (a quarter of what is free)")
    add("--pass-tokens", type=int, metavar="N", help="tokens that go through the model at once, at most")
    add(
        "--draft",
        type=Path,
        metavar="MODEL",
        help="a smaller model that guesses ahead; the text stays the same",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits whatever else is computed beside it, slower",
    )


def run(options: argparse.Namespace) -> int:
    """Load, and stream the continuation to standard output, or answer a file."""
    _check(options)
    prompts = [
        sys.stdin.read().removeprefix("\ufeff") if prompt == "-" else prompt
        for prompt in options.prompt or []
    ]
    from outsize.model import load_tokenizer
    from outsize.serve import pipeline, run_job
    from outsize.serve.pipeline import SETTINGS, request_of

    outsize = importlib.import_module("outsize")
    quiet.after_imports()
    given = {name: value for name, value in vars(options).items() if name in SETTINGS and value is not None}
    tokenizer = load_tokenizer(options.model)
    # What is malformed is refused before a model is loaded.
    requests = [request_of(tokenizer, prompt, given) for prompt in prompts or ["-"]]
    place = shared.load_options(options)

    def opened(folder: Path, weights: str | None) -> Any:
        model = outsize.load(folder, weights=weights, attention=options.attention, **place)
        return model.requires_grad_(False)  # no memory for gradients

    generate = pipeline(
        opened(options.model, options.weights),
        tokenizer=tokenizer,
        kv=options.kv,
        pass_tokens=options.pass_tokens,
        deterministic=options.deterministic,
        draft=None if options.draft is None else opened(options.draft, None),
        concurrency=_concurrency(requests) if prompts else None,
    )
    if options.prompts is not None:
        return int(run_job(generate, options.prompts, options.out, given, _Teller()).num_failed > 0)
    if len(prompts) == 1 and options.num_samples is None:
        _stream(generate, prompts[0], given)
    else:
        _print(generate, prompts, given)
    return 0


def _concurrency(requests: Sequence[Request]) -> Concurrency:
    """What memory is planned for: all prompts at once, each as long as the longest may become."""
    from outsize.serve import Concurrency

    return Concurrency(
        sum(request.num_samples for request in requests),
        max(len(request.prompt) + request.max_new_tokens for request in requests),
    )


def _stream(generate: Pipeline, prompt: str, given: dict[str, Any]) -> None:
    sys.stdout.write(prompt)
    generate.submit(prompt, watch=lambda token: _write(token.text), **given).wait()
    sys.stdout.write("\n")


def _print(generate: Pipeline, prompts: list[str], given: dict[str, Any]) -> None:
    """Each continuation after its prompt, in the order of the prompts, with a line between them."""
    streams = [(prompt, generate.submit(prompt, **given)) for prompt in prompts]
    texts = (prompt + completion.text for prompt, stream in streams for completion in stream.wait())
    for number, text in enumerate(texts):
        _write(("\n" if number else "") + text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Teller:
    """Says how a job goes: in place on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._said_at = 0.0
        self._was_done = False

    def __call__(self, progress: Progress) -> None:
        is_done = progress.num_done == progress.num_prompts
        now = time.monotonic()
        is_early = not is_done and now - self._said_at < (0.2 if sys.stderr.isatty() else _SAY_EVERY_S)
        if is_early or self._was_done:
            return
        self._said_at, self._was_done = now, is_done
        pace = progress.num_tokens / progress.duration_s if progress.duration_s else 0.0
        text = f"{progress.num_done:,} of {progress.num_prompts:,} prompts, {pace:.1f} tokens/s"
        text += f", {progress.num_failed:,} refused" if progress.num_failed else ""
        if progress.left_s is not None and not is_done:
            text += f", {_duration(progress.left_s)} left"
        print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr)
        print(end="\n" if is_done or not sys.stderr.isatty() else "", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"


def _check(options: argparse.Namespace) -> None:
    for folder in (options.model, options.draft):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"no such folder: {folder}", hint="pass the folder of a Hugging Face model")
    if not options.prompt and options.prompts is None:
        raise ConfigError(
            "no prompt", hint='pass --prompt "some text", --prompt - to read it, or --prompts FILE --out FILE'
        )
    if options.prompt and options.prompts is not None:
        raise ConfigError("--prompt and --prompts are both given", hint="pass one of them")
    if "" in (options.prompt or []):
        raise ConfigError("--prompt is empty", hint='pass --prompt "some text", or --prompt - to read it')
    if (options.prompts is None) != (options.out is None):
        raise ConfigError("--prompts and --out go together", hint="pass --prompts FILE --out FILE")
