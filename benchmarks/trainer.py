"""What the whole trainer costs over a plain loop of the same calls.

Two processes take turns, step by step, on the demo's model: `for batch in ...: loss, backward, step, zero_grad` under
Outsize, and `outsize.train` with its data loading, metrics.jsonl, report page and live progress (drawn as on a terminal,
thrown away). Everything is resident, so that no disk adds noise; evaluation is off. Printed: the median of the ratios
pair by pair, and the part of a step that the trainer spends outside the model's own calls, measured from within.

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

BATCH_SIZE, SEQ_LEN = 16, 256


def turn(step_s: float | None) -> float:
    """Say how long the last step took, wait for one's turn, and take the time (a live display takes `sys.stdout`)."""
    if step_s is not None:
        print(json.dumps(step_s), file=sys.__stdout__, flush=True)
    if not sys.stdin.readline():
        raise SystemExit
    return time.perf_counter()


def plain_loop(folder: Path, num_steps: int) -> None:
    """The calls of the README's loop, on random tokens."""
    import torch

    import outsize

    model = outsize.load(folder / "untrained", disk=folder, dtype="float32", from_scratch=True).train()
    optimizer = outsize.AdamW(model, lr=1e-4, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    print("ready", flush=True)
    start_s = turn(None)
    for _ in range(num_steps):
        ids = torch.randint(0, 2048, (BATCH_SIZE, SEQ_LEN), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        start_s = turn(time.perf_counter() - start_s)


def trainer(folder: Path, num_steps: int) -> None:
    """The same steps by `outsize.train`."""
    from rich.console import Console

    from outsize.engine.api import Options
    from outsize.train.data import DataFile
    from outsize.train.loop import train
    from outsize.train.progress import LiveProgress
    from outsize.train.settings import Length, TrainSettings
    from outsize.train.watch import Watcher

    class Turns(Watcher):
        """Comes last, so that a step ends when all other watchers have been told."""

        start_s = 0.0

        def started(self, facts: Any) -> None:
            print("ready", file=sys.__stdout__, flush=True)
            self.start_s = turn(None)

        def stepped(self, metrics: Any, report: Any, num_steps: int | None) -> None:
            self.start_s = turn(time.perf_counter() - self.start_s)

    settings = TrainSettings(
        folder / "untrained",
        (DataFile(folder / "python.jsonl"),),
        folder / "out",
        Length(steps=num_steps),
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        place=Options(disk=str(folder), dtype="float32"),
        from_scratch=True,
    )
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, force_terminal=True, width=120)
        train(settings, watchers=[LiveProgress(console), Turns()])


def start(kind: str, num_steps: int, folder: Path) -> subprocess.Popen[str]:
    """One of the two processes, ready to step."""
    process = subprocess.Popen(
        [sys.executable, __file__, f"--kind={kind}", f"--folder={folder}", f"--steps={num_steps}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{kind} ended early")
    return process


def main() -> None:
    """Take turns, and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that, not counted")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        {"loop": plain_loop, "trainer": trainer}[arguments.kind](arguments.folder, arguments.steps)
        return

    from outsize.train import demo

    num_steps = arguments.steps + arguments.warmup
    with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as name:
        demo.prepare(Path(name), demo.DemoSize(text_bytes=3_000_000))
        processes = {kind: start(kind, num_steps, Path(name)) for kind in ("loop", "trainer")}
        times: dict[str, list[float]] = {kind: [] for kind in processes}
        for index in range(num_steps):
            for kind, process in processes.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                step_s = float(json.loads(process.stdout.readline()))
                print(f"step {index} {kind:<8} {step_s:6.3f} s", flush=True)
                if index >= arguments.warmup:
                    times[kind].append(step_s)
        for process in processes.values():
            process.kill()
            process.wait()
        metrics = [
            json.loads(line)
            for line in (Path(name) / "out.partial" / "metrics.jsonl").read_text().splitlines()
        ]
    ratios = [own / plain for own, plain in zip(times["trainer"], times["loop"], strict=True)]
    print(
        f"{BATCH_SIZE * SEQ_LEN} tokens  loop {statistics.median(times['loop']):.3f} s  "
        f"trainer {statistics.median(times['trainer']):.3f} s  "
        f"ratio {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"
    )
    outside = [
        own - metric["step_s"]
        for own, metric in zip(times["trainer"], metrics[arguments.warmup :], strict=False)
    ]
    print(f"watchers and loop around a step: median {statistics.median(outside) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
