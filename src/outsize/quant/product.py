"""Rows times a matrix in few bits.

For few rows, torch's own products of codes, which read the fewest bytes; for many, where they fall behind, a part of the
matrix at a time becomes bfloat16 and is multiplied as ever. Elsewhere than on a CPU the latter alone. Activations are
bfloat16: with others torch's kernels are up to a hundred times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import library as registry

from outsize.config import Weights
from outsize.native import library, on_all_threads
from outsize.quant.formats import FORMATS, GROUP, LINE_ROWS, Encoded

FEW_ROWS = {Weights.INT8: 24, Weights.INT4: 48}
"""Up to here torch's products of codes are faster."""

PART_BYTES = 4 << 20
"""Of a matrix in bfloat16 that is there at once."""

_SOURCE = Path(__file__).with_name("widen.c")
_operators = registry.Library("outsize", "DEF")
_operators.define("product(Tensor rows, Tensor codes, Tensor scales, str weights) -> Tensor")


def product(
    rows_MK: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, weights: Weights
) -> torch.Tensor:
    """`[M, N]` in bfloat16: `rows_MK`, bfloat16, times the transposed matrix. One operation to whoever counts them."""
    result: torch.Tensor = torch.ops.outsize.product(rows_MK, codes, scales, str(weights))
    return result


def _product(rows_MK: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, weights: str) -> Any:
    rows_MK = rows_MK.contiguous()
    is_few = rows_MK.device.type == "cpu" and rows_MK.shape[0] <= FEW_ROWS[Weights(weights)]
    if weights == Weights.INT8:
        codes_NK = codes.view(torch.int8)
        if is_few:
            return torch.ops.aten._weight_int8pack_mm(rows_MK, codes_NK, scales)
        return _by_parts_int8(rows_MK, codes_NK, scales)
    packed_LKR = codes.view(torch.uint8).view(codes.shape[0], -1, LINE_ROWS // 2)
    if is_few and _torch_lays_out_alike():
        num_rows, num_columns = packed_LKR.shape[0] * LINE_ROWS, packed_LKR.shape[1]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows_MK, packed_LKR.view(num_rows, num_columns // 2), GROUP, scales.view(-1, num_rows, 2)
        )
    return _by_parts_int4(rows_MK, packed_LKR, scales)


def _product_without_values(
    rows_MK: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, weights: str
) -> torch.Tensor:
    return rows_MK.new_empty(rows_MK.shape[0], scales.shape[-1] // FORMATS[Weights(weights)].scales_per_row)


_operators.impl("product", _product, "CompositeExplicitAutograd")
_operators.impl("product", _product_without_values, "Meta")


def _by_parts_int8(rows_MK: torch.Tensor, codes_NK: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes are whole numbers, so exact in bfloat16; scales come last."""
    output_MN = rows_MK.new_empty(rows_MK.shape[0], codes_NK.shape[0])
    step = max(16, PART_BYTES // (2 * codes_NK.shape[1]))
    for start in range(0, codes_NK.shape[0], step):
        part_NK = codes_NK[start : start + step].to(rows_MK.dtype)
        torch.mul(rows_MK @ part_NK.t(), scales[start : start + step], out=output_MN[:, start : start + step])
    return output_MN


def _by_parts_int4(rows_MK: torch.Tensor, packed_LKR: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    num_lines, num_columns, _ = packed_LKR.shape
    output_MN = rows_MK.new_empty(rows_MK.shape[0], num_lines * LINE_ROWS)
    step = min(num_lines, max(1, PART_BYTES // (2 * num_columns * LINE_ROWS)))
    widen = _widen() if rows_MK.device.type == "cpu" else None
    space = rows_MK.new_empty(num_columns * step * LINE_ROWS)
    for start in range(0, num_lines, step):
        stop = min(start + step, num_lines)
        part_KN = space[: num_columns * (stop - start) * LINE_ROWS].view(num_columns, -1)
        if widen is not None:
            widen(packed_LKR, scales, start, stop, part_KN)
        else:
            part_KN.copy_(_widened(packed_LKR, scales, start, stop))
        output_MN[:, start * LINE_ROWS : stop * LINE_ROWS] = rows_MK @ part_KN
    return output_MN


def _widened(packed_LKR: torch.Tensor, scales: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Lines `[start, stop)` as `[K, N]`."""
    codes = packed_LKR[start:stop].reshape(stop - start, -1).view(torch.bfloat16)
    own = scales[:, 2 * start * LINE_ROWS : 2 * stop * LINE_ROWS].contiguous()
    return FORMATS[Weights.INT4].decode(Encoded(codes, own)).t()


class _Widening(ctypes.Structure):
    """The arguments of `widen`, as in `widen.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "out", "next")),
        *((name, ctypes.c_int64) for name in ("columns", "rows", "group", "line", "last_line")),
    ]


def _widen_into(
    function: Any,
    packed_LKR: torch.Tensor,
    scales: torch.Tensor,
    start: int,
    stop: int,
    part_KN: torch.Tensor,
) -> None:
    """`_widened` into `part_KN`, by the compiled `function`."""
    taken = ctypes.c_int64(0)
    call = _Widening(
        codes=packed_LKR.data_ptr(),
        scales=scales.data_ptr(),
        out=part_KN.data_ptr(),
        next=ctypes.addressof(taken),
        columns=packed_LKR.shape[1],
        rows=packed_LKR.shape[0] * LINE_ROWS,
        group=GROUP,
        line=start,
        last_line=stop,
    )
    on_all_threads(function, call)


@cache
def _widen() -> Callable[..., None] | None:
    """`_widen_into` with its function; None where that cannot be built."""
    built = library(_SOURCE, "weights of four bits are read")
    if built is None:
        return None
    num_bytes = ctypes.c_int32.in_dll(built, "WIDENING_BYTES").value
    assert num_bytes == ctypes.sizeof(_Widening), num_bytes
    return partial(_widen_into, built.widen)


@cache
def _torch_lays_out_alike() -> bool:
    """Whether torch's product of four bits is for codes as they lie here: on a CPU with AVX-512."""
    weight = torch.arange(LINE_ROWS * GROUP, dtype=torch.int32, device="cpu").view(LINE_ROWS, GROUP) * 7 % 16
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
    except (RuntimeError, AttributeError):
        return False  # a build of torch without it
    low, high = weight.view(2, LINE_ROWS // 2, GROUP).transpose(1, 2)
    return torch.equal(theirs.view(-1), (low | high << 4).to(torch.uint8).reshape(-1))
