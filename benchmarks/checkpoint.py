"""What commits cost: steps with one after each beside steps with none, in turn, and `torch.save` of the same state.

    python benchmarks/checkpoint.py                    two models with all state on disk, step by step in turn
    python benchmarks/checkpoint.py --home host        the same with all state in memory, which is copied for each commit
    OUTSIZE_BENCH_DIR=/nvme/scratch python benchmarks/checkpoint.py --steps 10

Prints, as medians: the time of a step with and without a commit, the time that `commit` blocks, `torch.save` of weights and
moments from memory to the same disk (with and without fsync), and the time from a reopened store to the end of the first
step's forward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import outsize
from outsize.engine.runtime import runtime_of


def write_model(folder: Path, hidden: int, layers: int) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        vocab_size=8192,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "model")
    return folder / "model"


def open_model(model: Path, folder: Path, home: str) -> tuple[Any, Any]:
    opened = outsize.load(model, disk=folder, home=home, dtype="float32", from_scratch=True).train()
    return opened, outsize.AdamW(opened, lr=1e-5, max_grad_norm=1.0)


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def torch_save(folder: Path, num_bytes: int, *, sync: bool) -> float:
    """Seconds to save that much state, as a dictionary of tensors, from memory."""
    tensors = {str(index): torch.zeros(16 << 20) for index in range(num_bytes // (64 << 20))}
    start = time.perf_counter()
    torch.save(tensors, folder / "saved.pt")
    if sync:
        fd = os.open(folder / "saved.pt", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - start
    (folder / "saved.pt").unlink()
    return seconds


def reopen(folder: Path, home: str) -> None:
    """In a process of its own: from the store to the first step's forward."""
    start = time.perf_counter()
    model, optimizer = open_model(folder / "model", folder, home)
    resumed = outsize.checkpoint.resume(model, optimizer, folder / "run")
    assert resumed is not None
    ids = torch.randint(0, 8192, (1, 16))
    model(input_ids=ids, labels=ids)
    print(f"REOPENED {time.perf_counter() - start}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--home", choices=["disk", "host"], default="disk")
    parser.add_argument("--reopen", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reopen is not None:
        reopen(options.reopen, options.home)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as name:
        measure(Path(name), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    path = write_model(folder, options.hidden, options.layers)
    ids = torch.randint(0, 8192, (options.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    plain = open_model(path, folder, options.home)
    committing = open_model(path, folder, options.home)
    outsize.checkpoint.resume(*committing, folder / "run")
    times: dict[str, list[float]] = {"none": [], "every step": []}
    blocked: list[float] = []
    for index in range(options.steps + 2):
        pairs = [("none", plain), ("every step", committing)]
        for kind, (model, optimizer) in pairs if index % 2 else reversed(pairs):
            seconds = step(model, optimizer, ids)
            if kind == "every step":
                start = time.perf_counter()
                outsize.checkpoint.commit(model, optimizer, folder / "run")
                blocked.append(time.perf_counter() - start)
                seconds += blocked[-1]
            times[kind].append(seconds)
    outsize.checkpoint.finish(committing[0])
    state_bytes = sum(
        record.num_bytes - record.gradient_extent.num_bytes
        for record in runtime_of(committing[0]).backing.executor.store.records.values()
    )
    none, every = (times[kind][2:] for kind in times)
    ratios = [b / a for a, b in zip(none, every, strict=True)]
    for model, _ in (plain, committing):
        runtime_of(model).setup.close()
    saved = [torch_save(folder, state_bytes, sync=sync) for sync in (False, True, False, True)]
    reopened = subprocess.run(
        [sys.executable, __file__, "--reopen", str(folder), "--home", options.home],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    step_s, blocks_s = statistics.median(none), statistics.median(blocked[2:])
    print(
        f"state {state_bytes / 2**30:.2f} GiB of weights and moments, home {options.home}, {options.tokens} tokens a step"
    )
    print(
        f"step without commits {step_s:.3f} s, with one each {statistics.median(every):.3f} s; ratio "
        f"{statistics.median(ratios):.3f} (of pairs {min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(f"commit blocks {1e3 * blocks_s:.2f} ms: {blocks_s / step_s:.2%} of a step")
    plain_s, synced_s = min(saved[0::2]), min(saved[1::2])
    print(
        f"torch.save {plain_s:.2f} s, with fsync {synced_s:.2f} s: a commit blocks 1/{plain_s / blocks_s:.0f} "
        f"and 1/{synced_s / blocks_s:.0f} of that"
    )
    print(
        f"from a reopened store to the end of the first forward: {float(reopened.stdout.split()[-1]):.2f} s"
    )


if __name__ == "__main__":
    main()
