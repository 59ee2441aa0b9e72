"""The plan that is chosen against an exhaustive sweep: every combination of slots and of what stays in memory, run.

    python benchmarks/plan.py                small models under a hard budget, bound by the disk
    PYTHONPATH=. python benchmarks/plan.py --deep 80
                                             time only the planner, for 80 blocks of 25 M parameters; nothing is allocated
    OUTSIZE_BENCH_DIR=/nvme/scratch python benchmarks/plan.py

The profile of the machine is taken from the cache, or measured first. Each plan runs in a process of its own; the chosen
one runs between the others, and at the end in turn with the fastest of them. The last line says by how much it is slower
than the best that was found.
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
from pathlib import Path
from typing import Any

SLOTS = ((1, 1), (2, 1), (3, 2))
PARTS = (0, 1 / 2, 1)
"""Of the blocks whose weights, gradients and state stay in memory."""
CASES = ({"hidden": 512, "layers": 8, "seq_len": 32}, {"hidden": 512, "layers": 16, "seq_len": 64})
ROOM = 0.45
"""Of all planes, beside what the process itself and the least arena take."""

NUM_STEPS = 6
NUM_FINALISTS = 5
"""The fastest runs of the sweep, run again beside the chosen plan: the least of a hundred times is mostly luck."""
NUM_ROUNDS = 4


def open_model(case: dict[str, Any], folder: Path, **options: Any) -> Any:
    """A Llama of this size, whose planes live on the disk as far as they do not stay."""
    import transformers

    import outsize

    config = transformers.LlamaConfig(
        hidden_size=case["hidden"],
        num_hidden_layers=case["layers"],
        intermediate_size=4 * case["hidden"],
        vocab_size=4096,
        num_attention_heads=case["hidden"] // 64,
        num_key_value_heads=case["hidden"] // 64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "model")
    return outsize.load(folder / "model", disk=folder, dtype="float32", from_scratch=True, **options).train()


def one(case: dict[str, Any], folder: Path, host: str, pins: dict[str, Any] | None) -> dict[str, Any]:
    """The median of some steps under these pins, or under the plan that is chosen."""
    import torch

    import outsize
    from outsize.engine.runtime import runtime_of
    from outsize.hardware import kept

    if pins is not None:
        pins["resident"] = tuple(pins["resident"])
    options = {"pins": outsize.Pins(**pins)} if pins is not None else {"profile": kept(folder)}
    model = open_model(case, folder, host=host, **options)
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    ids = torch.randint(0, 4096, (1, case["seq_len"]), generator=torch.Generator().manual_seed(0))
    times = []
    try:
        for _ in range(NUM_STEPS):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
    except outsize.OutsizeError as error:
        return {"refused": str(error)}
    choices = runtime_of(model).budget.choices
    chosen = str(choices[0].pins) if choices else ""
    return {"step_s": statistics.median(times[3:]), "chosen": chosen}


def run(case: dict[str, Any], bench_dir: Path, host: str, pins: dict[str, Any] | None) -> dict[str, Any]:
    """As `one`, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=bench_dir) as folder:
        job = json.dumps({"case": case, "host": host, "pins": pins})
        done = subprocess.run(
            [sys.executable, __file__, f"--one={job}", f"--folder={folder}"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    answer: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT ")[2])
    return answer


def sweep(case: dict[str, Any], bench_dir: Path) -> float:
    """Run everything; by how much the chosen plan is slower than the best, as a ratio."""
    import outsize

    with tempfile.TemporaryDirectory(dir=bench_dir) as folder:
        open_model(case, Path(folder))
        least = outsize.preview(
            Path(folder) / "model",
            disk=folder,
            home="disk",
            dtype="float32",
            seq_len=case["seq_len"],
            pins=outsize.Pins(weight_slots=1, gradient_slots=1),
        )
    room_bytes = int(ROOM * 16 * least.num_parameters)
    host = f"{(least.host_bytes + (128 << 20) + room_bytes) >> 20}MiB"
    parts = [round(part * least.num_blocks) for part in PARTS]
    tried = [
        {"weight_slots": weights, "gradient_slots": gradients, "resident": resident}
        for weights, gradients in SLOTS
        for resident in itertools.product(parts, repeat=3)
    ]
    chosen, found = [], []
    for index, pins in enumerate(tried):
        if index % 36 == 0:
            chosen.append(run(case, bench_dir, host, None))
        answer = run(case, bench_dir, host, pins)
        if "step_s" in answer:
            found.append((answer["step_s"], pins))
    found.sort(key=lambda pair: pair[0])
    finalists = [(pins, [step_s]) for step_s, pins in found[:NUM_FINALISTS]]
    for _ in range(NUM_ROUNDS):
        chosen.append(run(case, bench_dir, host, None))
        for pins, times in finalists:
            times.append(run(case, bench_dir, host, pins)["step_s"])
    best_s, best = min(
        ((statistics.median(times[1:]), pins) for pins, times in finalists), key=lambda pair: pair[0]
    )
    chosen_s = statistics.median(answer["step_s"] for answer in chosen[-NUM_ROUNDS:])
    print(
        f"{case} host={host}: chosen {chosen_s:.3f} s ({chosen[0]['chosen']}); {len(found)} others that fit: best "
        f"{best_s:.3f} s ({best}), median {statistics.median(f[0] for f in found):.3f} s, "
        f"worst {found[-1][0]:.3f} s; ratio to the best {chosen_s / best_s:.3f}",
        flush=True,
    )
    return chosen_s / best_s


def deep(num_blocks: int) -> None:
    """Print the seconds that planning takes for deep models, by the share of them that the budget holds."""
    from tests.plan.test_planner import HOST, CostModel, blocks, costs, limited, planner

    records = blocks(num_blocks)
    num_bytes = sum(record.num_bytes for record in records.values())
    for share in (0.3, 0.6):
        for forward_s in (1.0, 0.1, 0.01):
            own = costs(list(records), forward_s, 2 * forward_s)
            model = CostModel(HOST, lambda tile_rows, own=own: own)
            wall_s, own_s = time.perf_counter(), time.process_time()
            choices = planner(records, limited(int(share * num_bytes) + (2 << 30))).plan(model)[-1]
            wall_s, own_s = time.perf_counter() - wall_s, time.process_time() - own_s
            print(
                f"{num_blocks} blocks, {share:.0%} in memory, {forward_s} s for a forward: {len(choices)} plans in "
                f"{wall_s:.2f} s, {own_s:.2f} s of the processor",
                flush=True,
            )


def main() -> None:
    """Sweep all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=None, help="the first so many (default: all)")
    parser.add_argument("--deep", type=int, help="time only the planner, for a model of this many blocks")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        job = json.loads(arguments.one)
        print("RESULT " + json.dumps(one(job["case"], arguments.folder, job["host"], job["pins"])))
        return
    if arguments.deep:
        deep(arguments.deep)
        return
    from outsize.hardware import load_or_measure

    bench_dir = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp"))
    load_or_measure(bench_dir, print)
    ratios = [sweep(case, bench_dir) for case in CASES[: arguments.cases]]
    print(f"at worst {max(ratios):.3f} of the best that was found, in {len(ratios)} sweeps")


if __name__ == "__main__":
    main()
