"""Passes of a model whose weights stream from its own files, beside what bounds them and beside accelerate's disk offload.

    python benchmarks/generate.py --under "memcap {gib}"      with a command that puts a limit on memory

A Llama of 2.95 B parameters in bf16 with random weights is written once into OUTSIZE_BENCH_DIR. A pass takes one new token
of each of 1, 8 and 64 sequences, with a cache of 10 tokens before it. Timed in turn, each in a process of its own: the
passes with all weights in memory; with a quarter of the model's size of memory, and with 60 %; the same of the model
written in 8 and in 4 bits; accelerate (`pip install accelerate`) under the same limits.

The disk of a shared machine is fast in one minute and slow in the next: before and after each pass of ours the bytes of the
model's layers are read by themselves, past the page cache, into memory that holds one block. The bound of a pass is the
larger of the bytes it read at that pace, and the pass with all weights in memory.
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
    times, pace = {}, Pace(model)
    for batch in BATCHES:
        streams = [
            engine.submit(Request(tuple(prompt), max_new_tokens=NUM_PASSES + 1)) for prompt in prompts(batch)
        ]
        found, floors = [], []
        before = pace.bytes_per_s()
        while not engine.is_idle:
            num_bytes = outsize.report(model).bytes_read
            start = time.perf_counter()
            engine.step()
            found.append(time.perf_counter() - start)
            num_bytes = outsize.report(model).bytes_read - num_bytes
            after = pace.bytes_per_s()
            floors.append(num_bytes / statistics.mean((before, after)))
            before = after
        assert all(len(stream.completions[0].tokens) == NUM_PASSES + 1 for stream in streams)
        times[str(batch)] = statistics.median(found[-NUM_PASSES + 1 :])
        times[f"{batch} reading"] = statistics.median(floors[-NUM_PASSES + 1 :])
    return times


class Pace:
    """How fast the blocks of a model can be read, now."""

    def __init__(self, model: Any) -> None:
        import torch

        from outsize.engine.runtime import runtime_of

        runtime = runtime_of(model)
        self.source, self.blocks = runtime.backing.source, runtime.model.cut.blocks
        size = max(block.num_elements for block in self.blocks)
        self.space = torch.empty(size, dtype=torch.bfloat16)
        self.turn = 0

    def bytes_per_s(self) -> float:
        """Of the next third of the blocks."""
        third = self.blocks[self.turn % 3 :: 3]
        self.turn += 1
        num_bytes, start = 0, time.perf_counter()
        for block in third:
            parts = self.space[: block.num_elements].split([piece.num_elements for piece in block.pieces])
            self.source.read(
                block, [part.view(piece.shape) for part, piece in zip(parts, block.pieces, strict=True)]
            )
            num_bytes += 2 * block.num_elements
        return num_bytes / (time.perf_counter() - start)


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


def in_few_bits(folder: Path, weights: str) -> Path:
    """The model in few bits, written where it is not there yet."""
    import outsize

    made = folder.with_name(f"{folder.name}-{weights}")
    if not made.exists():
        outsize.save(outsize.load(folder, weights=weights), made)
    return made


def run_int8(folder: Path, gib: float | None) -> dict[str, float]:
    """Of 8 bits."""
    return run_outsize(in_few_bits(folder, "int8"), gib)


def run_int4(folder: Path, gib: float | None) -> dict[str, float]:
    """Of 4 bits."""
    return run_outsize(in_few_bits(folder, "int4"), gib)


RUNS = {
    "outsize": run_outsize,
    "int8": run_int8,
    "int4": run_int4,
    "accelerate": run_accelerate,
}
LIMITED = ("outsize", "int8", "int4", "accelerate")


def main() -> None:
    """Time everything in turn, and print ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--under", default="", help='a command that limits memory, such as "memcap {gib}"')
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=LIMITED, default=LIMITED)
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
    for weights in {"int8", "int4"} & set(arguments.only):
        in_few_bits(folder, weights)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    caps = [part * num_bytes / 2**30 for part in PARTS]
    print(f"{num_bytes / 2**30:.2f} GiB of weights, limits " + " and ".join(f"{cap:.2f} GiB" for cap in caps))

    def run(what: str, gib: float | None) -> dict[str, float]:
        for file in folder.parent.glob(
            f"{folder.name}*/*.safetensors"
        ):  # what others left in the page cache is within no limit
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        under = shlex.split(arguments.under.format(gib=f"{gib:.2f}")) if gib and arguments.under else []
        command = [*under, sys.executable, __file__, "--one", what, "--folder", str(folder)]
        command += ["--gib", f"{gib:.3f}"] if gib else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found = done.stdout.partition("RESULT ")[2].partition("\n")[0]
        return json.loads(found) if found else {}

    wanted: list[tuple[str, float | None]] = [("outsize", None)]
    wanted += [(what, cap) for cap in caps for what in arguments.only]
    found: dict[tuple[str, float | None], list[dict[str, float]]] = {key: [] for key in wanted}
    for _ in range(arguments.rounds):
        for key in wanted:
            found[key].append(run(*key))
    for batch in map(str, BATCHES):
        in_memory = statistics.median(each[batch] for each in found["outsize", None])
        print(f"{batch} sequences, in memory {in_memory:.2f} s")
        for (what, cap), answers in found.items():
            taken = [each for each in answers if each]
            if not cap or not taken:
                continue
            line = (
                f"    {what:<10} in {cap:.2f} GiB: {statistics.median(each[batch] for each in taken):.2f} s"
            )
            if what != "accelerate":
                bounds = [max(each[f"{batch} reading"], in_memory) / each[batch] for each in taken]
                line += f", {statistics.median(bounds):.0%} of the bound"
            pairs = [
                theirs[batch] / ours[batch]
                for theirs, ours in zip(answers, found["outsize", cap], strict=True)
                if theirs and ours and what != "outsize"
            ]
            line += f", {statistics.median(pairs):.2f} times ours in bf16" if pairs else ""
            print(line)


if __name__ == "__main__":
    main()
