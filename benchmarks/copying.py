"""Copied guesses where texts are copied and edited, and where they are not; and what few bits cost, on the same model.

    python benchmarks/copying.py --minutes 12        trains once into OUTSIZE_BENCH_DIR, then measures

A small Llama learns Python's own sources, and to repeat a few lines of them with one name changed. Prompts are lines that
it never saw. Each way of answering is timed in turn, with all weights in memory, and with all of them read from the files
at each pass; all say the same. So small a model repeats itself where the likeliest token is taken, so other texts are drawn
as well. Before, the perplexity of held-out sources with weights in bf16, int8 and int4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import outsize
from outsize.model import load_tokenizer
from outsize.serve import Engine, Request, Sampling
from outsize.serve.speculate import Guesser
from outsize.train.demo import LARGEST_FILE_BYTES, DemoSize, model_config, python_sources, train_tokenizer

SIZE = DemoSize(
    text_bytes=6_000_000,
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    seq_len=256,
    batch_size=16,
)
HELD_OUT_FILES = 24
NUM_EDITS = 40_000
PROMPTS = 12
NEW_TOKENS = 200


def an_edit(text: str, names: list[str], chosen: random.Random) -> tuple[str, str] | None:
    """Some lines with what to do, and the lines when it is done."""
    lines = text.splitlines()
    start = chosen.randrange(max(1, len(lines) - 12))
    part = "\n".join(lines[start : start + chosen.randint(3, 8)])
    found = [name for name in re.findall(r"[A-Za-z_]{4,}", part) if part.count(name) > 1]
    if not found or not 80 < len(part) < 260:
        return None
    old, new = chosen.choice(found), chosen.choice(names)
    return f"{part}\n### {old} -> {new}\n", re.sub(rf"\b{old}\b", new, part) + "\n"


def prepare(folder: Path) -> None:
    """Texts, edits, the tokenizer and the untrained model."""
    texts = python_sources(SIZE.text_bytes)
    chosen = random.Random(0)
    chosen.shuffle(texts)
    held_out, texts = texts[:HELD_OUT_FILES], texts[HELD_OUT_FILES:]
    names = sorted({name for text in texts[:200] for name in re.findall(r"\b[a-z_]{4,10}\b", text)})
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(texts[:400], SIZE.vocab_size)
    tokenizer.save_pretrained(folder / "untrained")
    model_config(SIZE).save_pretrained(folder / "untrained")

    def edits(sources: list[str], count: int) -> list[tuple[str, str]]:
        made: list[tuple[str, str]] = []
        while len(made) < count:
            edit = an_edit(chosen.choice(sources), names, chosen)
            made += [edit] if edit else []
        return made

    for name, sources, count in (("train", texts, NUM_EDITS), ("held-out", held_out, 200)):
        with (folder / f"{name}-edits.jsonl").open("w") as file:
            for prompt, completion in edits(sources, count):
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        with (folder / f"{name}-texts.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in sources)


def train(folder: Path, minutes: float) -> None:
    """As `outsize train` does."""
    from outsize.cli.main import main as command

    status = command(
        [
            "train",
            str(folder / "untrained"),
            "--from-scratch",
            f"{folder}/train-edits.jsonl@0.85",
            f"{folder}/train-texts.jsonl@0.15",
            *("--out", str(folder / "trained"), "--minutes", str(minutes), "--lr", "2e-3"),
            *("--seq-len", str(SIZE.seq_len), "--batch-size", str(SIZE.batch_size), "--home", "host"),
            *("--too-long", "skip"),
        ]
    )
    if status:
        raise SystemExit(status)


class Never(Guesser):
    """Guesses nothing."""

    def prepare(self, samples: Any) -> None:
        """Do nothing."""


def measure(folder: Path, rounds: int) -> None:
    """Tokens per second with guesses and without, in turn."""
    trained = folder / "trained"
    tokenizer = load_tokenizer(trained)
    edits = [json.loads(line)["prompt"] for line in (folder / "held-out-edits.jsonl").open()][:PROMPTS]
    texts = [json.loads(line)["text"][:400] for line in (folder / "held-out-texts.jsonl").open()][:PROMPTS]
    greedy, drawn = Sampling(), Sampling(temperature=1.0, seed=1)
    for kind, prompts, at_once, sampling in (
        ("copy and edit", edits, 1, greedy),
        ("copy and edit, together", edits, PROMPTS, greedy),
        ("other text, drawn", texts, 1, drawn),
        ("other text, drawn, together", texts, PROMPTS, drawn),
        ("other text, likeliest", texts, 1, greedy),
    ):
        requests = [Request(tuple(tokenizer(text)["input_ids"]), sampling, NEW_TOKENS) for text in prompts]
        for place, options in (
            ("in memory", {"home": "host"}),
            ("streamed", {"disk": folder, "home": "disk", "pins": outsize.Pins(weight_slots=2)}),
        ):
            ratios, said, guesser = [], [], None
            for _ in range(rounds):
                paces = {}
                for never in (True, False):
                    engine = Engine(outsize.load(trained, **options).requires_grad_(False), tokenizer)
                    if never:
                        engine.guesser = Never()
                    engine.submit(Request((1, 2, 3), max_new_tokens=4)).wait()
                    num_tokens, start, texts_said = 0, time.perf_counter(), []
                    for first in range(0, len(requests), at_once):
                        streams = [engine.submit(request) for request in requests[first : first + at_once]]
                        for stream in streams:
                            (completion,) = stream.wait()
                            texts_said.append(completion.tokens)
                            num_tokens += len(completion.tokens)
                    paces[never] = num_tokens / (time.perf_counter() - start)
                    said.append(texts_said)
                    guesser = engine.guesser
                ratios.append(paces[False] / paces[True])
            same = statistics.mean(
                one == other for each in said[1:] for one, other in zip(each, said[0], strict=True)
            )
            held, guessed = guesser.num_held, guesser.num_guessed
            print(
                f"{kind:<28} {place:<10} {paces[True]:7.1f} -> {paces[False]:7.1f} tokens/s, "
                f"{statistics.median(ratios):.2f} times; {held} of {guessed} guesses held, "
                f"wasted {(guessed - held) / num_tokens:.1%} of {num_tokens} tokens; {same:.0%} of answers the same",
                flush=True,
            )


def perplexities(folder: Path) -> None:
    """Of held-out sources and of held-out edits."""
    tokenizer = load_tokenizer(folder / "trained")
    texts = [json.loads(line)["text"] for line in (folder / "held-out-texts.jsonl").open()]
    ids = [torch.tensor([tokenizer(text)["input_ids"][: SIZE.seq_len]]) for text in texts]
    for weights in (None, "int8", "int4"):
        model = outsize.load(folder / "trained", weights=weights, dtype="bfloat16").requires_grad_(False)
        loss = count = 0.0
        with torch.no_grad():
            for row in ids:
                logits = model(input_ids=row).logits[0, :-1].float()
                loss += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
                count += row.shape[1] - 1
        print(
            f"{weights or 'bf16':<5} perplexity {torch.tensor(loss / count).exp():.3f} of {count:.0f} tokens",
            flush=True,
        )


def main() -> None:
    """Train where nothing is there yet; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) / "outsize-bench-copying"
    assert LARGEST_FILE_BYTES
    if not (folder / "untrained").exists():
        prepare(folder)
    if not (folder / "trained").exists():
        train(folder, arguments.minutes)
    perplexities(folder)
    measure(folder, arguments.rounds)


if __name__ == "__main__":
    main()
