"""What the trainer costs over a plain loop: the same model, data and optimizer, step by step in turns.

Two processes: `train()` with its terminal, metrics, report page and checks, and a loop of six lines around the same
`outsize.load` and `outsize.AdamW` on batches that are ready. Each makes a step when told.

    python benchmarks/trainer.py --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROWS, SEQ_LEN = 8, 512


def answer(step_s: float) -> None:
    print(json.dumps({"step_s": step_s}), flush=True)


def plain(folder: Path) -> None:
    import outsize
    from outsize.train.data import DataFile, DataOptions, Position, open_dataset

    dataset = open_dataset(folder / "model", [DataFile(folder / "text.jsonl")], DataOptions(seq_len=SEQ_LEN))
    model = outsize.load(folder / "model", dtype="float32", disk=folder, home="disk").train()
    optimizer = outsize.AdamW(model, lr=1e-4, max_grad_norm=1.0)
    batch: Any = dataset.batch(Position(), ROWS)
    print("ready", flush=True)
    for _ in sys.stdin:
        start_s = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        answer(time.perf_counter() - start_s)


def trained(folder: Path, steps: int) -> None:
    from rich.console import Console

    from outsize.train.data import DataFile
    from outsize.train.loop import Run, train
    from outsize.train.progress import progress_on
    from outsize.train.settings import Length, Place, TrainSettings

    # A step here is everything between one request and the next: the step itself, and all that looks on.
    make = Run.step
    started: list[float] = []

    def step(run: Run) -> Any:
        if started:
            answer(time.perf_counter() - started.pop())
        else:
            print("ready", flush=True)
        sys.stdin.readline()
        started.append(time.perf_counter())
        return make(run)

    Run.step = step  # type: ignore[method-assign]
    place = Place(dtype="float32", disk=str(folder), home="disk")
    console = Console(file=(folder / "terminal").open("w"), force_terminal=True, width=120)
    train(
        TrainSettings(
            folder / "model",
            (DataFile(folder / "text.jsonl"),),
            folder / "out",
            Length(steps=steps + 1),
            batch_size=ROWS,
            seq_len=SEQ_LEN,
            place=place,
        ),
        watchers=[progress_on(console)],
    )


def start(kind: str, folder: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, f"--kind={kind}", f"--folder={folder}", f"--steps={steps}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{kind} ended early")
    return process


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind == "plain":
        return plain(arguments.folder)
    if arguments.kind == "trained":
        return trained(arguments.folder, arguments.steps)

    from outsize.train import demo

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        texts = demo.python_sources(3_000_000)
        size = demo.DemoSize(vocab_size=4096, seq_len=SEQ_LEN)
        demo.train_tokenizer(texts[:200], size.vocab_size).save_pretrained(folder / "model")
        demo.model_config(size).save_pretrained(folder / "model")
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        processes = {kind: start(kind, folder, arguments.steps) for kind in ("plain", "trained")}
        times: dict[str, list[float]] = {kind: [] for kind in processes}
        for index in range(arguments.steps):
            for kind, process in processes.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                figure = json.loads(process.stdout.readline())["step_s"]
                if index >= 2:
                    times[kind].append(figure)
        for process in processes.values():
            process.kill()
        ratios = [own / plain for own, plain in zip(times["trained"], times["plain"], strict=True)]
        for kind, figures in times.items():
            print(f"{kind:8} median {statistics.median(figures):.3f} s per step")
        print(f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
