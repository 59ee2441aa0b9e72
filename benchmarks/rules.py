"""Bandwidth of the update rules beside a compiled `a += s * b`: `python benchmarks/rules.py`.

All kernels are built the same way and run in turn, in calls of one chunk, in memory and in cache. Medians are
printed; the ratio is the median over turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from outsize.block import CHUNK
from outsize.config import ComputeType
from outsize.optim import ADAMW, ALGORITHMS, compile_rule, start_compile
from outsize.optim.build import package

HYPER = ALGORITHMS["AdamW"].hyper(
    {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}, step=10
)
IN_CACHE = 1 << 17

Call = Callable[[list[Tensor]], object]
Case = tuple[Call, ComputeType | None, int]
"""How to run a kernel, its planes' compute type (None: triad), and bytes moved per element."""


def build_triad(folder: str) -> Call:
    def triad(total: Tensor, other: Tensor, scalars: Tensor) -> None:
        total.copy_(total + scalars[0] * other)

    path = Path(folder) / "triad.pt2"
    package(triad, [torch.zeros(4096), torch.zeros(4096), torch.zeros(1)], path)
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    scalars = torch.tensor([1e-6])
    return lambda planes: loader.run([*planes, scalars])


def make_planes(compute_type: ComputeType, num_elements: int) -> list[Tensor]:
    planes = []
    for plane, dtype in ADAMW.dtypes(compute_type).items():
        values = torch.randn(num_elements) * 1e-2
        if dtype is torch.int16:
            planes.append(torch.randint(-(1 << 15), 1 << 15, (num_elements,), dtype=dtype))
        else:
            planes.append(values.abs_().to(dtype) if plane == "moment2" else values.to(dtype))
    return planes


def time_call(call: Call, planes: list[Tensor], num_elements: int, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        for first in range(0, num_elements, CHUNK):
            call([plane[first : first + CHUNK] for plane in planes])
    return (time.perf_counter() - start) / repeats


def measure(calls: dict[str, Case], num_elements: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per pass, one list per call, taken in turn."""
    planes = {
        name: [torch.randn(num_elements) for _ in range(2)]
        if kind is None
        else make_planes(kind, num_elements)
        for name, (_, kind, _) in calls.items()
    }
    repeats = max(1, (1 << 23) // num_elements)
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (call, _, _) in calls.items():
            seconds = time_call(call, planes[name], num_elements, repeats)
            if turn:
                times[name].append(seconds)
    return times


def show(title: str, calls: dict[str, Case], times: dict[str, list[float]], num_elements: int) -> None:
    print(f"\n{title}\n\n| kernel | bytes/element | GB/s | of triad |\n|---|---|---|---|")
    for name, (_, _, num_bytes) in calls.items():
        bandwidth = num_bytes * num_elements / statistics.median(times[name]) / 1e9
        pairs = zip(times["triad"], times[name], strict=True)
        ratio = statistics.median(num_bytes / 12 * base / own for base, own in pairs)
        print(f"| {name} | {num_bytes} | {bandwidth:.1f} | {ratio:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megaelements", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    started = [start_compile(ADAMW, compute_type) for compute_type in ComputeType]
    kernels = [*(s.wait() for s in started), *(compile_rule(ADAMW, t, eager=True) for t in ComputeType)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        calls: dict[str, Case] = {"triad": (build_triad(folder), None, 12)}
    for kernel in kernels:
        sizes = ADAMW.element_bytes(kernel.compute_type)
        num_bytes = 2 * sum(sizes.values()) - sizes["gradient"]
        calls[f"{ADAMW.name} {kernel.compute_type} {kernel.backend}"] = (
            lambda planes, kernel=kernel: kernel(planes[0], planes[1:-1], planes[-1], HYPER),
            kernel.compute_type,
            num_bytes,
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for title, num_elements in (
        ("In memory", arguments.megaelements << 20),
        (f"In cache ({IN_CACHE} elements a call)", IN_CACHE),
    ):
        show(title, calls, measure(calls, num_elements, arguments.rounds), num_elements)


if __name__ == "__main__":
    main()
