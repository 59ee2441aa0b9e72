"""Passes and starts of a streamed model in bf16, and packed from the same folder: `weights="int4"` and "int8".

    python benchmarks/packed.py --under "memcap {gib}"      with a command that puts a limit on memory

A model of Qwen3's shape, 1.7 B parameters in bf16 with random weights, is written once into OUTSIZE_BENCH_DIR, or
`--folder` names one. Each run is a process with a budget of `--gib`: one sequence, a prompt of 10 tokens, then decode
passes. In turn: bf16; each format with its cache removed (the first step of the first start packs); each format again,
which finds the cache. Files are dropped from the page cache before each run. Medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

NUM_PASSES = 6
FORMATS = ("int4", "int8")


def write_model(folder: Path) -> None:
    """The model, a few layers to a file."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.Qwen3Config(
        hidden_size=2048,
        num_hidden_layers=28,
        intermediate_size=6144,
        vocab_size=151936,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.Qwen3ForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        group = f"layers{int(parts[2]) // 4}" if parts[1] == "layers" else "ends"
        files.setdefault(f"model-{group}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)


def steps_of(engine: Any, model: Any) -> Iterator[tuple[float, int]]:
    """Step until nothing is left to do: seconds of each step, and the bytes that it read."""
    import outsize

    before = 0
    while not engine.is_idle:
        start = time.perf_counter()
        engine.step()
        seconds, read = time.perf_counter() - start, outsize.report(model).bytes_read
        yield seconds, read - before
        before = read


def one(folder: Path, weights: str, gib: float) -> dict[str, Any]:
    """Seconds of the first step and of the later ones, and MiB that a later one read."""
    import outsize
    from outsize.serve import Request
    from outsize.serve.engine import open_engine
    from outsize.store import memory

    options = {} if weights == "bf16" else {"weights": weights}
    model = outsize.load(folder, dtype="bfloat16", host=f"{int(gib * 1024)}MiB", **options)  # type: ignore[arg-type]
    engine = open_engine(model.requires_grad_(False), kv="64MiB", pass_tokens=64)
    stream = engine.submit(Request(tuple(range(1, 11)), max_new_tokens=NUM_PASSES + 1))
    steps = list(steps_of(engine, model))
    return {
        "first": steps[0][0],
        "later": [seconds for seconds, _ in steps[1:]],
        "read": steps[-1][1] >> 20,
        "peak": memory.peak_bytes() >> 20,
        "tokens": stream.completions[0].tokens,
    }


def main() -> None:
    """Run all in turn, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--under", default="", help='a command that limits memory, such as "memcap {gib}"')
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp"))
    folder = arguments.folder or root / "outsize-bench-qwen3-1.7b"
    if arguments.one:
        print("RESULT " + json.dumps(one(folder, arguments.one, arguments.gib)))
        return
    if not folder.exists():
        write_model(folder)
    cache = root / "outsize-bench-cache"

    def run(weights: str) -> dict[str, Any]:
        for file in (*folder.glob("*.safetensors"), *cache.glob("packed/*/*.safetensors")):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [*shlex.split(arguments.under.format(gib=arguments.gib)), sys.executable, __file__]
        command += ["--one", weights, "--folder", str(folder), "--gib", str(arguments.gib)]
        environment = {**os.environ, "OUTSIZE_CACHE": str(cache)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.partition("RESULT ")[2].partition("\n")[0])
        print(f"{weights}: {found}", file=sys.stderr)
        return found

    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        shutil.rmtree(cache / "packed", ignore_errors=True)
        runs.setdefault("bf16", []).append(run("bf16"))
        for weights in FORMATS:
            runs.setdefault(f"{weights}, first start", []).append(run(weights))
            runs.setdefault(f"{weights}, second start", []).append(run(weights))
    for weights in FORMATS:
        tokens = [
            each["tokens"] for what, found in runs.items() if what.startswith(weights) for each in found
        ]
        assert all(each == tokens[0] for each in tokens), weights
    for what, found in runs.items():
        first = statistics.median(each["first"] for each in found)
        later = statistics.median(statistics.median(each["later"]) for each in found)
        print(
            f"{what:<20} first step {first:6.2f} s, a pass {later:5.2f} s, reads {found[0]['read']:,} MiB, "
            f"peak {max(each['peak'] for each in found):,} MiB"
        )


if __name__ == "__main__":
    main()
