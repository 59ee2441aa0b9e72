"""Step time against the same model in memory.

Two processes take turns, step by step, in one run: plain PyTorch (activation checkpointing per layer, fused AdamW,
clipping, everything in memory, fp32) and Outsize (disk as home, clipping and checksums on, fp32). Printed: the median of
each, and the median of the ratios pair by pair; Outsize's own report goes to standard error.

    python benchmarks/step.py --tokens 4096 --steps 6
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


def config(num_layers: int = 24) -> Any:
    """Qwen3 of 0.44 B parameters where there are 24 layers: hidden 1024, vocabulary 32,000, untied."""
    import transformers

    return transformers.Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=num_layers,
        vocab_size=32000,
        tie_word_embeddings=False,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        architectures=["Qwen3ForCausalLM"],
    )


def steps(model: Any, optimizer: Any, clip: Any, rows: int, seq_len: int) -> None:
    """Make one step per line of standard input, and print its duration and loss."""
    import torch

    generator = torch.Generator().manual_seed(0)
    print("ready", flush=True)
    for _ in sys.stdin:
        ids = torch.randint(0, 32000, (rows, seq_len), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step_s": time.perf_counter() - start, "loss": loss.item()}), flush=True)


def plain(rows: int, seq_len: int) -> None:
    """The reference: everything in memory."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config()).train()
    assert model.dtype is torch.float32
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps(
        model,
        optimizer,
        lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        rows,
        seq_len,
    )


def offloaded(rows: int, seq_len: int, folder: Path, home: str) -> None:
    """The same model under Outsize; `home` is disk, host, or auto."""
    import outsize

    config().save_pretrained(folder / "model")
    num_state_bytes = 443_079_680 * 16
    model = outsize.load(
        folder / "model",
        disk=folder,
        home=home if home != "auto" else None,
        dtype="float32",
        pins=None
        if home == "host"
        else outsize.Pins(resident_bytes=num_state_bytes // 4 if home == "auto" else 0),
        from_scratch=True,
    )
    model.train()
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    steps(model, optimizer, lambda model: None, rows, seq_len)
    print(outsize.report(model), file=sys.stderr, flush=True)


def start(kind: str, arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    """One of the two processes, ready to step."""
    process = subprocess.Popen(
        [
            sys.executable,
            __file__,
            f"--kind={kind}",
            f"--folder={folder}",
            f"--rows={arguments.rows}",
            f"--tokens={arguments.tokens}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until_ready(process)
    return process


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Wait for the line of a process that can step. Exits if the process ended."""
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit("a process ended early")


def step(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let one process make a step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    """Take turns, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--rows", type=int, default=0, help="sequences per step (default: sequences of 512)")
    parser.add_argument("--steps", type=int, default=6, help="counted steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that, not counted")
    parser.add_argument(
        "--homes", default="disk", help="comma-separated: disk, auto (a quarter resident), host"
    )
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or arguments.tokens // 512
    seq_len = arguments.tokens // arguments.rows
    if arguments.kind:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if arguments.kind == "plain":
            plain(arguments.rows, seq_len)
        else:
            offloaded(arguments.rows, seq_len, arguments.folder, arguments.kind)
        return
    homes = arguments.homes.split(",")
    with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as name:
        folders = {home: Path(name) / home for home in homes}
        for folder in folders.values():
            folder.mkdir()
        processes = {"plain": start("plain", arguments, Path(name))}
        processes |= {home: start(home, arguments, folders[home]) for home in homes}
        times: dict[str, list[float]] = {kind: [] for kind in processes}
        for index in range(arguments.steps + arguments.warmup):
            for kind, process in processes.items():
                answer = step(process)
                print(
                    f"step {index} {kind:<6} {answer['step_s']:7.2f} s  loss {answer['loss']:.4f}", flush=True
                )
                if index >= arguments.warmup:
                    times[kind].append(answer["step_s"])
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    for kind, figures in times.items():
        ratios = [own / plain for own, plain in zip(figures, times["plain"], strict=True)]
        print(
            f"{arguments.tokens} tokens  {kind:<6} median {statistics.median(figures):.2f} s  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
