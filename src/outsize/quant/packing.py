"""Encoding by a compiled library (`pack.c`): the bits of `formats.py`, in a third of the time of torch's operators.

Between torch's operators each thread waits for all others, which on a busy machine takes longer than the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from outsize.native import library, on_all_threads

_SOURCE = Path(__file__).with_name("pack.c")

Packer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
"""Fills codes and scales from a contiguous matrix `[N, K]` in fp32 or bf16 on the host; true stands for int4."""


class _Packing(ctypes.Structure):
    """The arguments of `pack`, as in `pack.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "codes", "scales", "next")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("is_bfloat16", "is_int4")),
    ]


@cache
def packer() -> Packer | None:
    """The compiled library; None where it cannot be built, with one warning."""
    built = library(_SOURCE, "weights are encoded")
    if built is None:
        return None
    num_bytes = ctypes.c_int32.in_dll(built, "PACKING_BYTES").value
    assert num_bytes == ctypes.sizeof(_Packing), num_bytes
    return partial(_pack, built.pack)


def _pack(
    function: Any, weight_NK: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, is_int4: bool
) -> None:
    assert weight_NK.dtype in (torch.float32, torch.bfloat16), weight_NK.dtype
    for tensor in (weight_NK, codes, scales):
        assert tensor.is_contiguous() and tensor.device.type == "cpu", (tensor.stride(), tensor.device)
    taken = ctypes.c_int64(0)
    call = _Packing(
        weights=weight_NK.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        next=ctypes.addressof(taken),
        rows=weight_NK.shape[0],
        columns=weight_NK.shape[1],
        is_bfloat16=int(weight_NK.dtype is torch.bfloat16),
        is_int4=int(is_int4),
    )
    on_all_threads(function, call)
