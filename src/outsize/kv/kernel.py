"""The compiled attention over pages (`kernel.c`), which reads fp32 and bf16.

`load` gives None for any other type, and where the library cannot be built; torch then attends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from outsize.kv.pages import PAGE_TOKENS
from outsize.native import library, on_all_threads

_SOURCE = Path(__file__).with_name("kernel.c")

UNITS_PER_THREAD = 4
"""As large as the largest, at least, where there is that much to do: threads end together."""

MOST_STATES = 1024
"""Queries of a unit, which are books on its thread's stack."""

_IS_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}
"""For each type of keys and values that the library reads."""


class Attention(ctypes.Structure):
    """The arguments of `attend`, as in `kernel.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "sinks", "items", "tables")),
        *((name, ctypes.c_void_p) for name in ("output", "next")),
        *((name, ctypes.c_int64) for name in ("num_items", "page_stride")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "key_width", "value_width")),
        *((name, ctypes.c_int32) for name in ("window", "is_bfloat16")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("unit_heads", ctypes.c_int32),
    ]


class Units:
    """Work that is dealt out: `items [n, 4]`, int32, as in `kernel.c`. The longest come first: threads end together."""

    def __init__(self, items: Sequence[tuple[int, int, int, int]]) -> None:
        work = [rows * (position + rows) for _, rows, _, position in items]
        self.items = torch.tensor(sorted(items, key=lambda item: -item[3]), dtype=torch.int32, device="cpu")
        self.most_rows = max(rows for _, rows, _, _ in items)
        self.balance = sum(work) / max(work)
        """How many there would be if all were as large as the largest."""

    def heads_at_once(self, kv_heads: int, group: int) -> int:
        """Heads of keys, of `group` heads each, that one unit goes through."""
        num_units = UNITS_PER_THREAD * torch.get_num_threads()
        fair, most = int(kv_heads * self.balance / num_units), MOST_STATES // (self.most_rows * group)
        return max(1, min(fair, most, kv_heads))


class Kernel:
    """The built library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        layout = [ctypes.c_int32.in_dll(library, name).value for name in ("PAGE_TOKENS", "ATTENTION_BYTES")]
        assert layout == [PAGE_TOKENS, ctypes.sizeof(Attention)], layout
        self._attend = library.attend

    def attend(
        self,
        query_THK: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        units: Units,
        tables: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[T, H, V]` in fp32, from fp32 `query_THK`, `keys [pages, heads, K, PAGE]`, `values [pages, heads, PAGE, V]`.

        `keys` and `values` are both fp32 or both bf16, with the same stride from page to page; `tables` are int32, as in
        `kernel.c`. All tensors are on the host, and contiguous within a page.
        """
        for tensor in (query_THK, keys[0], values[0], tables):
            assert tensor.is_contiguous() and tensor.device.type == "cpu", (tensor.stride(), tensor.device)
        assert keys.stride(0) == values.stride(0), (keys.stride(), values.stride())
        assert keys.dtype is values.dtype and query_THK.dtype is torch.float32, (keys.dtype, values.dtype)
        num_tokens, heads, key_width = query_THK.shape
        output = torch.zeros(
            num_tokens, heads, values.shape[-1], dtype=torch.float32, device="cpu"
        )  # zeros for tokens of no request
        taken, kv_heads = ctypes.c_int64(0), keys.shape[1]
        call = Attention(
            query=query_THK.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            items=units.items.data_ptr(),
            tables=tables.data_ptr(),
            output=output.data_ptr(),
            next=ctypes.addressof(taken),
            num_items=len(units.items),
            page_stride=keys.stride(0),
            heads=heads,
            kv_heads=kv_heads,
            key_width=key_width,
            value_width=values.shape[-1],
            window=window,
            is_bfloat16=_IS_BFLOAT16[keys.dtype],
            scale=scale,
            softcap=softcap,
            unit_heads=units.heads_at_once(kv_heads, heads // kv_heads),
        )
        on_all_threads(self._attend, call)
        return output


def load(dtype: torch.dtype) -> Kernel | None:
    """The kernel for keys and values of type `dtype`; None where it does not read them or cannot be built."""
    return _built() if dtype in _IS_BFLOAT16 else None


@cache
def _built() -> Kernel | None:
    """The kernel, built where the cache has none; None where that fails, with one warning."""
    built = library(_SOURCE, "attention runs")
    return None if built is None else Kernel(built)
