"""Real text: requests together and one by one, guesses, deterministic products, weights in memory and streamed.

    outsize demo --out /nvme/demo
    python benchmarks/serve_text.py /nvme/demo/tuned            greedy continuations of Python's own sources
    python benchmarks/serve_text.py MODEL --disk /nvme/scratch  the same with all weights on disk between visits

Prints tokens per second of each way, and the share of guesses that held. All ways give the same tokens.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

import outsize
from outsize.model import load_tokenizer
from outsize.serve import Engine, Request
from outsize.serve.single import SingleEngine
from outsize.serve.speculate import Guesser


def prompts(tokenizer: Any, count: int, length: int) -> list[tuple[int, ...]]:
    """Beginnings of modules of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:: max(1, 160 // count)]
    ids = (tokenizer(path.read_text(errors="ignore")[: 20 * length])["input_ids"] for path in files)
    return [tuple(tokens[:length]) for tokens in ids if len(tokens) >= length][:count]


class Never(Guesser):
    """Guesses nothing."""

    def prepare(self, samples: Any) -> None:
        """Do nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    requests = [
        Request(prompt, max_new_tokens=options.new)
        for prompt in prompts(tokenizer, options.requests, options.length)
    ]
    home = "disk" if options.disk else "host"
    said = None

    def measure(name: str, engine: Any, some: list[Request]) -> list[list[int]]:
        start = time.perf_counter()
        streams = [engine.submit(request) for request in some]
        tokens = [stream.wait()[0].tokens for stream in streams]
        pace = sum(map(len, tokens)) / (time.perf_counter() - start)
        guesser = getattr(engine, "guesser", None)
        held = (
            f"  {guesser.num_held} of {guesser.num_guessed} guesses held"
            if guesser and guesser.num_guessed
            else ""
        )
        print(f"{name:<42} {pace:8.1f} tokens/s{held}", flush=True)
        return tokens

    def opened() -> Any:
        return outsize.load(options.model, home=home, disk=options.disk, dtype="float32").requires_grad_(
            False
        )

    print(
        f"{len(requests)} prompts of {options.length} tokens, {options.new} new, {torch.get_num_threads()} threads, {home}"
    )
    measure("generate, one by one (4 of them)", SingleEngine(opened().eval(), tokenizer), requests[:4])
    for name, settings, guesses in (
        ("together", {}, False),
        ("together, copied guesses", {}, True),
        ("together, deterministic", {"deterministic": True}, False),
    ):
        engine = Engine(opened().eval(), tokenizer, kv="256MiB", **settings)
        if not guesses:
            engine.guesser = Never()
        tokens = measure(name, engine, requests)
        said = said or tokens
        assert sum(a != b for a, b in zip(tokens, said, strict=True)) <= 1, "a tie may be broken otherwise"
    for guesses in (False, True):
        engine = Engine(opened().eval(), tokenizer, kv="256MiB")
        if not guesses:
            engine.guesser = Never()
        measure(f"one request{', copied guesses' if guesses else ''}", engine, requests[:1])


if __name__ == "__main__":
    main()
