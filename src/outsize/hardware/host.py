"""Work for the processor and its memory: products, the update rule, copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import torch

from outsize.block import CHUNK, Plane
from outsize.config import ComputeType
from outsize.hardware.rate import Work
from outsize.optim import ADAMW, ALGORITHMS, Kernel, limited_threads

ROWS = 2048
"""Tokens that a block computes at once."""

WIDTHS = ((1024, 1024), (1024, 4096), (4096, 1024), (2048, 2048))
"""Inputs and outputs of the linear layers of a block."""

CHUNKS_PER_UNIT = 4

COPY_BYTES = 256 << 20
COPIES_PER_UNIT = 2

_HYPER = ALGORITHMS["AdamW"].hyper(
    {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}, step=10
)


def matmul(compute_type: ComputeType, most_s: float) -> Work:
    """Products `[ROWS, inputs] x [inputs, outputs]`, one size after the other; amounts are floating-point operations.

    Where one would take longer than `most_s`, it has fewer rows.
    """
    dtype = torch.float32 if compute_type is ComputeType.FLOAT32 else torch.bfloat16
    rows, widest = ROWS, max(WIDTHS, key=lambda width: width[0] * width[1])
    probe = _product(64, *widest, dtype)
    probe()
    start_s = time.perf_counter()
    probe()
    row_s = (time.perf_counter() - start_s) / 64
    while rows > 64 and rows * row_s > most_s:
        rows //= 2
    products = cycle([_product(rows, *width, dtype) for width in WIDTHS])
    return Work(lambda: next(products)())


def update_bytes(compute_type: ComputeType) -> int:
    """Bytes that AdamW moves per parameter: every plane is read, and all but the gradient written."""
    sizes = ADAMW.element_bytes(compute_type)
    return int(2 * sum(sizes.values()) - sizes[Plane.GRADIENT])


def update(
    kernel: Kernel, num_chunks: int, device: torch.device, wait: Callable[[], None] = lambda: None
) -> Work:
    """AdamW on planes of `num_chunks` chunks, chunk by chunk; amounts are bytes moved. `wait` waits for `device`."""
    planes = []
    for dtype in ADAMW.dtypes(kernel.compute_type).values():
        plane = torch.empty(num_chunks * CHUNK, dtype=dtype, device=device)
        # Small positive values do for every plane, second moments too.
        plane.fill_(3) if dtype is torch.int16 else plane.fill_(1e-3)
        planes.append(plane)
    starts = cycle(range(0, num_chunks * CHUNK, CHUNK))

    def run() -> float:
        for _ in range(CHUNKS_PER_UNIT):
            start = next(starts)
            weight, *state, gradient = (plane[start : start + CHUNK] for plane in planes)
            kernel(weight, state, gradient, _HYPER)
        wait()
        return float(CHUNKS_PER_UNIT * CHUNK * update_bytes(kernel.compute_type))

    return Work(run)


def with_threads(work: Work, num_threads: int) -> Work:
    """`work`, its kernels on `num_threads`."""

    def run() -> float:
        with limited_threads(num_threads):
            return work.run()

    return Work(run, work.finish)


def copy() -> Work:
    """Copies from memory to memory; amounts are bytes copied, each of which is read once and written once."""
    # Written, not zeros: the system would show one page of zeros everywhere.
    source, target = (
        torch.full((COPY_BYTES // 4,), value, dtype=torch.float32, device="cpu") for value in (1.0, 2.0)
    )
    parts = cycle(zip(target.chunk(COPIES_PER_UNIT), source.chunk(COPIES_PER_UNIT), strict=True))

    def run() -> float:
        into, out_of = next(parts)
        into.copy_(out_of)
        return float(into.nbytes)

    return Work(run)


def _product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Callable[[], float]:
    values = torch.full((rows, inputs), 0.5, dtype=dtype, device="cpu")
    weight = torch.full((outputs, inputs), 0.5, dtype=dtype, device="cpu")
    result = torch.empty(rows, outputs, dtype=dtype, device="cpu")

    def run() -> float:
        torch.mm(values, weight.t(), out=result)
        return 2.0 * rows * inputs * outputs

    return run
