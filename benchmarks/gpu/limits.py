"""What one GPU does with the host and the disk behind it: rates, memory against the plan, the largest and the longest.

Each part runs in a process of its own, random weights, no network; one line per figure, and what it is measured against.

    python benchmarks/gpu/limits.py                          all parts, with the sizes of the promises
    python benchmarks/gpu/limits.py --parts rates,moving     update rules and links alone; copies and memory of real steps
    python benchmarks/gpu/limits.py --trial                  a trial of the script itself, in small

    rates     the update rule on the host and on the device, against copies in the same memory
    moving    8 B parameters on the host, the device capped: what copies reach in a step against the link alone; memory
              of the device and of the process against what the plan says
    largest   10.5 B parameters, the device capped, state on host and disk: bytes per parameter, one step
    longest   8 B parameters, the whole device: one sequence of 256 Ki tokens
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from train import config, machine

PARTS = ("rates", "moving", "largest", "longest")


def say(name: str, figure: str, against: str = "") -> None:
    print(f"{name:<44} {figure:>22}  {against}", flush=True)


def bytes_text(count: float) -> str:
    return f"{count / 2**30:.3f} GiB"


def rates(folder: Path, is_trial: bool) -> None:
    """Rules against copies."""
    from outsize.hardware import device, measure

    if is_trial:
        device.ROWS, device.WIDTHS, device.COPY_BYTES = 64, ((64, 128),), 1 << 20
    profile = measure(folder, seconds=1 if is_trial else 40, say=lambda line: None)
    assert profile.device_update and profile.device_memory, "no device"
    say(
        "update rule on the host",
        f"{profile.update / 1e9:.1f} GB/s",
        f"{profile.update / profile.host_copy:.1%} of a copy, {profile.update_threads} threads",
    )
    say(
        "update rule on the device",
        f"{profile.device_update / 1e9:.1f} GB/s",
        f"{profile.device_update / profile.device_memory:.1%} of a copy",
    )
    for name, rate in (("up", profile.up), ("down", profile.down)):
        say(f"link {name}, alone", f"{(rate or 0) / 1e9:.1f} GB/s")
    for one, others in profile.contention.items():
        say(f"{one} beside others keeps", " ".join(f"{other} {part:.2f}" for other, part in others.items()))


def opened(folder: Path, size: str, **options: Any) -> tuple[Any, Any, Any]:
    """A model of a size with random weights and what makes a step of `[rows, seq_len]` ids."""
    import torch

    import outsize

    config(size).save_pretrained(folder / "model")
    model = outsize.load(
        folder / "model", disk=folder, dtype="bfloat16", from_scratch=True, **options
    ).train()
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)

    def step(rows: int, seq_len: int) -> float:
        ids = torch.randint(0, config(size).vocab_size, (rows, seq_len), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss.detach()).item(), "the loss is not finite"
        return time.perf_counter() - start

    return model, optimizer, step


def memory(model: Any) -> None:
    """Peaks against what the plan says."""
    import outsize

    report = outsize.report(model)
    planned = {"device": 0, "host": 0}
    for row in report.rows:
        if row.tier in planned:
            planned[row.tier] += row.num_bytes
    for tier, peak in (("device", report.device_peak_bytes), ("host", report.host_peak_bytes)):
        say(
            f"{tier} memory, peak",
            bytes_text(peak),
            f"{bytes_text(planned[tier])} planned: {peak / max(1, planned[tier]):.1%}",
        )
    state = sum(row.num_bytes for row in report.rows if row.what in ("weights", "optimizer state"))
    for name, num_bytes in (
        ("weights and optimizer state", state),
        ("the same and gradients", report.state_bytes),
    ):
        each = num_bytes / report.num_parameters
        say(
            name,
            bytes_text(num_bytes),
            f"{each:.2f} bytes for each of {report.num_parameters / 1e9:.2f} B parameters",
        )


def moving(folder: Path, is_trial: bool) -> None:
    """Copies and memory of real steps."""
    import torch

    import outsize

    figures = machine(512 if is_trial else 8192, 1 << (24 if is_trial else 30))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    size, seq_len = ("tiny", 64) if is_trial else ("8b", 4096)
    model, _, step = opened(folder, size, device="1GiB" if is_trial else "24GiB", home="host")
    for _ in range(3):
        step(2, seq_len)
    with outsize.record(model) as recording:
        seconds = step(2, seq_len)
    say(f"a step of {2 * seq_len:,} tokens", f"{seconds:.3f} s")
    moved: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for span in recording.timeline.spans:
        if span.resource in ("up", "down") and span.num_bytes >= (1 << 10 if is_trial else 1 << 20):
            moved[span.resource][0] += span.num_bytes
            moved[span.resource][1] += span.end_s - span.start_s
    for way, (num_bytes, busy_s) in moved.items():
        rate = num_bytes / busy_s
        say(
            f"copies {way} in a step",
            f"{rate / 1e9:.1f} GB/s",
            f"{rate / figures[way]:.1%} of the link alone, {rate / (figures['both'] / 2):.1%} of it both ways",
        )
    memory(model)


def largest(folder: Path, is_trial: bool) -> None:
    """More state than memory."""
    size = "tiny" if is_trial else "10b"
    host = {} if is_trial else {"host": "104GiB"}
    model, _, step = opened(
        folder, size, device="1GiB" if is_trial else "24GiB", home="disk" if is_trial else None, **host
    )
    for _ in range(2):
        seconds = step(2, 64 if is_trial else 4096)
    say("the largest model, a step", f"{seconds:.2f} s")
    memory(model)


def longest(folder: Path, is_trial: bool) -> None:
    """One sequence."""
    size, seq_len = ("tiny", 1 << 10) if is_trial else ("8b", 1 << 18)
    model, _, step = opened(folder, size)
    seconds = step(1, seq_len)
    say(
        f"one sequence of {seq_len:,} tokens, first step",
        f"{seconds:.1f} s",
        f"{seq_len / seconds:,.0f} tokens/s",
    )
    memory(model)


def main() -> None:
    """Each part in a process of its own; one that fails is named, and the others run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, in this order (%(default)s)"
    )
    parser.add_argument("--trial", action="store_true", help="everything in small")
    parser.add_argument("--seconds", type=float, default=280, help="for each part (%(default)s)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run = {"rates": rates, "moving": moving, "largest": largest, "longest": longest}[arguments.part]
        run(arguments.folder, arguments.trial)
        return
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as folder:
            command = [sys.executable, __file__, f"--part={part}", f"--folder={folder}"]
            try:
                done = subprocess.run(
                    command + ["--trial"] * arguments.trial, check=False, timeout=arguments.seconds
                )
                status = f"ended with status {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                status = f"was not done in {arguments.seconds:.0f} s"
            if status:
                print(f"{part}: {status}", flush=True)


if __name__ == "__main__":
    main()
