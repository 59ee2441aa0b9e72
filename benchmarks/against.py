"""Steps and streamed passes of this checkout against another one, in turn, step by step.

    git worktree add /tmp/before COMMIT
    python benchmarks/against.py --other /tmp/before/src --tokens 1024
    python benchmarks/against.py --other /tmp/before/src --passes

Each checkout is a process of its own, which makes one step (of the model of benchmarks/step.py: 0.44 B parameters in fp32,
disk as home) or one decode pass (the same model in bf16, all weights streamed) when it is asked to; `--host` is its budget.
Printed: the median of each, the median of the ratios pair by pair, peak memory, bytes read by a step, and the time from the
start of the command to the end of the first step.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import config, wait_until_ready
from step import step as ask

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _load(folder: Path, layers: int, **options: Any) -> Any:
    import outsize

    config(layers).save_pretrained(folder / "model")
    if "from_scratch" in inspect.signature(outsize.load).parameters:
        options["from_scratch"] = True
    return outsize.load(folder / "model", disk=folder, **options)


def train(folder: Path, layers: int, tokens: int, host: str) -> None:
    """Make a step for each line of standard input."""
    import torch

    import outsize

    pins = outsize.Pins(resident_bytes=0)
    model = _load(folder, layers, home="disk", dtype="float32", host=host, pins=pins).train()
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        ids = torch.randint(0, 32000, (max(1, tokens // 512), min(tokens, 512)), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    answer(step, model)


def decode(folder: Path, layers: int, host: str) -> None:
    """Make a decode pass for each line of standard input."""
    import torch
    from transformers import Qwen3ForCausalLM

    import outsize
    from outsize.serve import Request
    from outsize.serve.engine import open_engine

    torch.manual_seed(0)
    Qwen3ForCausalLM(config(layers)).bfloat16().save_pretrained(folder / "weights")
    model = outsize.load(folder / "weights", dtype="bfloat16", host=host, pins=outsize.Pins(resident_bytes=0))
    engine = open_engine(model.requires_grad_(False), kv="64MiB", pass_tokens=64)
    engine.submit(Request(tuple(range(1, 11)), max_new_tokens=100))

    def step() -> float:
        engine.step()
        return 0.0

    answer(step, model)


def answer(step: Any, model: Any) -> None:
    """Report each step that standard input asks for: seconds, result, peak of the process."""
    import outsize

    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = step()
        report = outsize.report(model)
        values = {"s": time.perf_counter() - start, "result": result, "peak": report.host_peak_bytes}
        print(json.dumps({**values, "read": report.bytes_read}), flush=True)


def main() -> None:
    """Take turns, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, required=True, help="the folder src of another checkout")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a training step")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model")
    parser.add_argument("--passes", action="store_true", help="decode passes instead of training steps")
    parser.add_argument("--host", default="3GiB", help="the budget of each process")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the counted ones")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        if arguments.passes:
            decode(arguments.one, arguments.layers, arguments.host)
        else:
            train(arguments.one, arguments.layers, arguments.tokens, arguments.host)
        return
    sources = {"this": Path(__file__).parents[1] / "src", "other": arguments.other}
    with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as name:
        processes: dict[str, subprocess.Popen[str]] = {}
        first: dict[str, float] = {}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in sources}
        for kind, source in sources.items():
            (folder := Path(name) / kind).mkdir()
            command = [sys.executable, __file__, f"--one={folder}", f"--other={arguments.other}"]
            command += [f"--tokens={arguments.tokens}", f"--host={arguments.host}"]
            command += [f"--layers={arguments.layers}"]
            command += ["--passes"] * arguments.passes
            begun = time.perf_counter()
            process = processes[kind] = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(source)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            wait_until_ready(process)
            ask(process)
            first[kind] = time.perf_counter() - begun
        for index in range(arguments.warmup + arguments.pairs):
            for kind, process in processes.items():
                values = ask(process)
                if index >= arguments.warmup:
                    found[kind].append(values)
        for process in processes.values():
            process.communicate()
    for kind, each in found.items():
        read = (each[-1]["read"] - each[0]["read"]) / max(1, len(each) - 1)
        print(
            f"{kind:<6} {statistics.median(one['s'] for one in each):7.3f} s, first after {first[kind]:.1f} s, "
            f"reads {read / 2**20:,.0f} MiB, peak {each[-1]['peak'] / 2**20:,.0f} MiB"
        )
    pairs = zip(found["this"], found["other"], strict=True)
    same = all(a["result"] == b["result"] for a, b in zip(found["this"], found["other"], strict=True))
    print(
        f"ratio pair by pair: {statistics.median(a['s'] / b['s'] for a, b in pairs):.3f}, results equal: {same}"
    )


if __name__ == "__main__":
    main()
