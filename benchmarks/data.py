"""Reading data: tokenising and packing against the tokenizer's own batch speed, and the loader's share of a step.

The text is the Python standard library's sources, repeated with changes to --size; the tokenizer a byte-level BPE of 8,192
tokens trained on it. `tokenizers` alone gets the same documents in lists of 256 and throws its result away. Each is run
in turns with the other; a second opening of the data comes from the cache.

    python benchmarks/data.py --size 100MiB
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TOKENS_PER_STEP = 4096


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def write_documents(path: Path, texts: list[str], num_bytes: int) -> list[str]:
    """Documents of `num_bytes` together, as JSON lines; numbers in them differ, so that no cache of words helps."""
    documents, size = [], 0
    for turn in itertools.count():
        for text in texts:
            document = f"# part {turn}\n" + text.replace("0", str(turn))
            documents.append(document)
            size += len(document)
            if size >= num_bytes:
                path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
                return documents
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="100MiB")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    from outsize.config import parse_bytes
    from outsize.train import demo
    from outsize.train.data import DataFile, DataOptions, Dataset, Position, load_tokenizer, open_dataset

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        os.environ["OUTSIZE_CACHE"] = str(folder / "cache")
        texts = demo.python_sources(8_000_000)
        size = demo.DemoSize(vocab_size=8192, seq_len=512)
        demo.train_tokenizer(texts[:400], size.vocab_size).save_pretrained(folder / "model")
        demo.model_config(size).save_pretrained(folder / "model")
        documents = write_documents(folder / "text.jsonl", texts, parse_bytes(arguments.size))
        backend = load_tokenizer(folder / "model").backend_tokenizer

        def alone() -> None:
            for start in range(0, len(documents), 256):
                backend.encode_batch_fast(documents[start : start + 256], add_special_tokens=False)

        def opened() -> Dataset:
            return open_dataset(folder / "model", [DataFile(folder / "text.jsonl")], DataOptions(seq_len=512))

        ratios = []
        for index in range(arguments.rounds):
            os.utime(folder / "text.jsonl", (index, index))
            alone_s, opened_s = timed(alone), timed(opened)
            ratios.append(opened_s / alone_s)
            print(
                f"tokenizers alone {alone_s:6.1f} s   read, tokenise, pack {opened_s:6.1f} s   {ratios[-1]:.2f}"
            )
        print(f"ratio, median of {arguments.rounds}: {statistics.median(ratios):.2f}")
        print(f"from the cache: {timed(opened):.2f} s")

        dataset, times = opened(), []
        position, rows = Position(), TOKENS_PER_STEP // 512
        for _ in range(200):
            times.append(timed(partial(dataset.batch, position, rows)))
            position = dataset.advance(position, rows)
        print(
            f"a batch of {TOKENS_PER_STEP} tokens: {statistics.median(times) * 1e3:.2f} ms, at most {max(times) * 1e3:.2f}"
        )


if __name__ == "__main__":
    main()
