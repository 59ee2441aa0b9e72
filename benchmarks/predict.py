"""How right predictions are: a grid of real runs, each predicted after its first step and measured on the following ones.

Every run is a process of its own: it opens a model from a config with random weights, makes a step, predicts (one block of
each kind is timed at the real tile, the plan simulated on the machine's profile), and makes more steps. Printed: predicted
and measured seconds per step and peak memory, the errors of each run, their average and the worst.

    python benchmarks/predict.py                 the grid, some eight minutes on two cores
    python benchmarks/predict.py --runs 4        the first four of it
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WIDTHS = {"S": (384, 6, 1024, 4096), "M": (768, 8, 2048, 8192), "L": (1024, 12, 3072, 16384)}
"""Hidden size, layers, width of the MLP, vocabulary."""


@dataclass(frozen=True)
class Run:
    """One run of the grid; `resident` is the part of the state that may stay in memory; each step may be committed."""

    size: str
    dtype: str
    home: str
    rows: int
    seq_len: int
    resident: float = 0.0
    commits: bool = False


def grid() -> list[Run]:
    """24 runs and more: sizes, types, homes, batches and lengths."""
    runs = [
        Run(size, dtype, home, rows, seq_len)
        for size, dtype, home, (rows, seq_len) in itertools.product(
            "SM", ("float32", "bfloat16"), ("disk", "host"), ((2, 256), (8, 256), (2, 1024))
        )
    ]
    runs += [Run("L", "float32", "disk", 4, 256), Run("L", "bfloat16", "disk", 4, 256)]
    runs += [Run("M", "float32", "disk", 4, 256, 0.5), Run("L", "float32", "disk", 8, 256, 0.3)]
    runs += [Run("M", "float32", home, 4, 256, commits=True) for home in ("disk", "host")]
    return runs


def one(run: Run, folder: Path, num_steps: int) -> dict[str, Any]:
    """Open, step, predict, step on."""
    import torch
    import transformers

    import outsize
    from outsize.hardware import kept

    hidden, layers, mlp, vocabulary = WIDTHS[run.size]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "model")
    num_parameters = 2 * vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * mlp)
    profile = kept(folder)
    assert profile is not None  # measured once, before the grid
    pins = outsize.Pins(resident_bytes=int(run.resident * 16 * num_parameters))
    model = outsize.load(
        folder / "model",
        disk=folder,
        home=run.home if not run.resident else None,
        dtype=run.dtype,
        pins=pins if run.home == "disk" else None,
        from_scratch=True,
    ).train()
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    if run.commits:
        outsize.checkpoint.resume(model, optimizer, folder / "run")
    generator = torch.Generator().manual_seed(0)
    times: list[float] = []
    prediction = None
    for _ in range(num_steps):
        ids = torch.randint(0, vocabulary, (run.rows, run.seq_len), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.commits:
            outsize.checkpoint.commit(model, optimizer, folder / "run")
        loss.item()
        times.append(time.perf_counter() - start)
        if prediction is None:
            prediction = outsize.predict(model, profile, commit_every=int(run.commits))
    assert prediction is not None
    report = outsize.report(model)
    return {
        "predicted_s": prediction.step_s,
        "measured_s": statistics.median(times[2:]),
        "predicted_bytes": prediction.host_bytes,
        "measured_bytes": report.host_peak_bytes,
        "bottleneck": str(prediction.simulation.bottleneck),
    }


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=None, help="the first so many of the grid (default: all)")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of each run, of which the first two do not count"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(
            "RESULT " + json.dumps(one(Run(**json.loads(arguments.one)), arguments.folder, arguments.steps))
        )
        return
    from outsize.hardware import load_or_measure

    bench_dir = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp"))
    print(load_or_measure(bench_dir, print).source)
    errors_s: list[float] = []
    errors_bytes: list[float] = []
    for run in grid()[: arguments.runs]:
        with tempfile.TemporaryDirectory(dir=bench_dir) as folder:
            command = [sys.executable, __file__, f"--one={json.dumps(asdict(run))}", f"--folder={folder}"]
            done = subprocess.run(
                [*command, f"--steps={arguments.steps}"], stdout=subprocess.PIPE, text=True, check=True
            )
        answer = json.loads(done.stdout.rpartition("RESULT ")[2])
        errors_s.append(answer["predicted_s"] / answer["measured_s"] - 1)
        errors_bytes.append(answer["predicted_bytes"] / answer["measured_bytes"] - 1)
        print(
            f"{run.size} {run.dtype:<8} {run.home}{f' {run.resident:.0%}' if run.resident else '':<5} "
            f"{run.rows} x {run.seq_len:<4} {'committed ' if run.commits else ''} step {answer['predicted_s']:6.2f} "
            f"of {answer['measured_s']:6.2f} s {errors_s[-1]:+6.1%}   memory {answer['predicted_bytes'] / 2**20:6.0f} of "
            f"{answer['measured_bytes'] / 2**20:6.0f} MiB {errors_bytes[-1]:+6.1%}   {answer['bottleneck']}",
            flush=True,
        )
    for what, errors in (("step time", errors_s), ("peak memory", errors_bytes)):
        sizes = [abs(error) for error in errors]
        print(
            f"{what}: {len(errors)} runs, error {statistics.mean(sizes):.1%} on average, {max(sizes):.1%} at worst"
        )


if __name__ == "__main__":
    main()
