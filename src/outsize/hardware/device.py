"""Work for a CUDA device: products, copies both ways, its own memory, the update rule there.

Units are waited for by events of the stream they ran on, so that one kind of work never waits for another's.
"""

from __future__ import annotations

from itertools import cycle

import torch

from outsize.config import ComputeType
from outsize.hardware.rate import Work
from outsize.tier import CudaDevice, Region, Way

COPY_BYTES = 256 << 20
ROWS = 8192
"""Tokens that a block computes at once: more than on a processor."""
WIDTHS = ((1024, 4096), (2048, 2048), (4096, 1024), (4096, 4096))
PRODUCTS_PER_UNIT = 16


def matmul(device: CudaDevice, compute_type: ComputeType) -> Work:
    """Products of a block's sizes; amounts are floating-point operations."""
    dtype = torch.float32 if compute_type is ComputeType.FLOAT32 else torch.bfloat16
    place = device.torch_device
    sizes = cycle(
        [
            (
                torch.randn(ROWS, inputs, dtype=torch.float32, device="cpu").to(place, dtype),
                torch.randn(outputs, inputs, dtype=torch.float32, device="cpu").to(place, dtype),
            )
            for inputs, outputs in WIDTHS
        ]
    )

    def run() -> float:
        values, weight = next(sizes)
        for _ in range(PRODUCTS_PER_UNIT):
            torch.mm(values, weight.t())
        device.mark().wait()
        return 2.0 * PRODUCTS_PER_UNIT * values.shape[0] * weight.numel()

    return Work(run)


def link(device: CudaDevice, way: Way, region: Region) -> Work:
    """Copies one way between the device and a pinned region of COPY_BYTES; amounts are bytes."""
    here = region.tensor(torch.uint8, COPY_BYTES)
    there = device.zeros(COPY_BYTES, f"copy {way}")
    target, source = (there, here) if way is Way.UP else (here, there)

    def run() -> float:
        device.start_copy(way, target, source, label=f"measured copy {way}").wait()
        return float(COPY_BYTES)

    return Work(run)


def memory(device: CudaDevice) -> Work:
    """Copies within the device's memory; amounts are bytes read and bytes written."""
    source, target = (device.zeros(COPY_BYTES, "copy") for _ in range(2))

    def run() -> float:
        for _ in range(4):
            target.copy_(source)
        device.mark().wait()
        return 4.0 * 2 * COPY_BYTES

    return Work(run)
