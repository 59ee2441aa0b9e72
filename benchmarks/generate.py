"""Passes of a model whose weights stream from its own files, beside what bounds them and beside accelerate's disk offload.

    python benchmarks/generate.py --under "memcap {gib}"      with a command that puts a limit on memory

A Llama of 2.95 B parameters in bf16 with random weights is written once into OUTSIZE_BENCH_DIR. A pass takes one new token
of each of 1, 8 and 64 sequences, with a cache of 10 tokens before it. Timed in turn, each in a process of its own: reading
all of its bytes once past the page cache; the same passes with all weights in memory; Outsize with a quarter of the model's
size of memory, and with 60 %; accelerate (`pip install accelerate`) under the same limits. The bound is the larger of the
first two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BATCHES = (1, 8, 64)
NUM_PASSES = 4
CACHED = 10
PASS_TOKENS = 256
PARTS = (0.25, 0.6)


def write_model(folder: Path) -> None:
    """The model, shard by shard."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=56,
        intermediate_size=6144,
        vocab_size=32000,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for name in shapes:
        parts = name.split(".")
        group = f"layers{int(parts[2]) // 4}" if parts[1] == "layers" else "ends"
        files.setdefault(f"model-{group}.safetensors", {})[name] = None
    for file, tensors in files.items():
        for name in tensors:
            value = (
                torch.ones(shapes[name])
                if len(shapes[name]) == 1
                else torch.randn(shapes[name], generator=generator) * 0.02
            )
            tensors[name] = value.to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        tensors.update(dict.fromkeys(tensors))
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)


def prompts(batch: int) -> list[list[int]]:
    """So many prompts of CACHED tokens."""
    generator = random.Random(0)
    return [[generator.randrange(1, 32000) for _ in range(CACHED)] for _ in range(batch)]


def passes(model: Any) -> dict[str, float]:
    """Median seconds of a pass of a model of transformers with its own cache, by sequences."""
    import torch

    times = {}
    with torch.no_grad():
        for batch in BATCHES:
            ids = torch.tensor(prompts(batch))
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            found = []
            for _ in range(NUM_PASSES):
                start = time.perf_counter()
                cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
                found.append(time.perf_counter() - start)
            times[str(batch)] = statistics.median(found[1:])
            del cache
            gc.collect()
    return times


def run_outsize(folder: Path, gib: float | None) -> dict[str, float]:
    """Through the engine of `outsize.pipeline`; weights streamed, or all in memory."""
    import outsize
    from outsize.serve import Request
    from outsize.serve.engine import open_engine

    options: dict[str, Any] = {"host": f"{int(gib * 1024)}MiB"} if gib else {"home": "host"}
    model = outsize.load(folder, dtype="bfloat16", **options).requires_grad_(False)
    engine = open_engine(model, kv="240MiB", pass_tokens=PASS_TOKENS)
    times = {}
    for batch in BATCHES:
        streams = [
            engine.submit(Request(tuple(prompt), max_new_tokens=NUM_PASSES + 1)) for prompt in prompts(batch)
        ]
        found = []
        while not engine.is_idle:
            start = time.perf_counter()
            engine.step()
            found.append(time.perf_counter() - start)
        assert all(len(stream.completions[0].tokens) == NUM_PASSES + 1 for stream in streams)
        times[str(batch)] = statistics.median(found[-NUM_PASSES + 1 :])
    return times


def run_accelerate(folder: Path, gib: float | None) -> dict[str, float]:
    """Its disk offload, with as much of the model in memory as the limit allows beside the process."""
    import torch
    import transformers

    assert gib is not None
    room = max(0.05, gib - 0.75)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(room * 2**30)},
        offload_folder=folder.parent / "offloaded",
    )
    return passes(model.eval())


def run_read(folder: Path, gib: float | None) -> dict[str, float]:
    """All bytes of the files once, past the page cache."""
    from outsize.model.direct import FileReader, wait_read

    reader = FileReader()
    buffer = memoryview(bytearray(64 << 20))
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        for offset in range(0, size, len(buffer)):
            wait_read(reader.start_read(file, offset, buffer[: min(len(buffer), size - offset)]))
    return dict.fromkeys(map(str, BATCHES), time.perf_counter() - start)


RUNS = {"read": run_read, "outsize": run_outsize, "accelerate": run_accelerate}


def main() -> None:
    """Time everything in turn, and print ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--under", default="", help='a command that limits memory, such as "memcap {gib}"')
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--only", nargs="*", choices=("outsize", "accelerate"), default=("outsize", "accelerate")
    )
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--gib", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(RUNS[arguments.one](arguments.folder, arguments.gib)))
        return
    folder = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) / "outsize-bench-3b"
    if not folder.exists():
        write_model(folder)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    caps = [part * num_bytes / 2**30 for part in PARTS]
    print(f"{num_bytes / 2**30:.2f} GiB of weights, limits " + " and ".join(f"{cap:.2f} GiB" for cap in caps))

    def run(what: str, gib: float | None) -> dict[str, float]:
        for file in folder.glob("*.safetensors"):  # what others left in the page cache is within no limit
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        under = shlex.split(arguments.under.format(gib=f"{gib:.2f}")) if gib and arguments.under else []
        command = [*under, sys.executable, __file__, "--one", what, "--folder", str(folder)]
        command += ["--gib", f"{gib:.3f}"] if gib else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found = done.stdout.partition("RESULT ")[2].partition("\n")[0]
        return json.loads(found) if found else {}

    wanted: list[tuple[str, float | None]] = [("read", None), ("outsize", None)]
    wanted += [(what, cap) for cap in caps for what in arguments.only]
    found: dict[tuple[str, float | None], list[dict[str, float]]] = {key: [] for key in wanted}
    for _ in range(arguments.rounds):
        for key in wanted:
            found[key].append(run(*key))
    for batch in map(str, BATCHES):
        seconds = {
            key: statistics.median(each[batch] for each in answers if each)
            for key, answers in found.items()
            if any(answers)
        }
        bound = max(seconds["read", None], seconds["outsize", None])
        print(
            f"batch {batch}: read {seconds['read', None]:.2f} s, in memory {seconds['outsize', None]:.2f} s"
        )
        for (what, cap), taken in seconds.items():
            if cap:
                print(f"    {what:<10} in {cap:.2f} GiB: {taken:.2f} s, {bound / taken:.0%} of the bound")


if __name__ == "__main__":
    main()
