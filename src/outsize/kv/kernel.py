"""The compiled attention over pages (`kernel.c`). Where it cannot be built `load` gives None, and torch attends."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from outsize.native import library, on_all_threads

_SOURCE = Path(__file__).with_name("kernel.c")

UNITS_PER_THREAD = 4
"""At least, where there is that much to do: threads end together."""


class Attention(ctypes.Structure):
    """The arguments of `attend`, as in `kernel.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "sinks", "items", "tables")),
        *((name, ctypes.c_void_p) for name in ("output", "next")),
        ("num_items", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "key_width", "value_width")),
        *((name, ctypes.c_int32) for name in ("window", "is_bfloat16")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("unit_heads", ctypes.c_int32),
    ]


class Kernel:
    """The built library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend

    def attend(
        self,
        query_THK: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        items: torch.Tensor,
        tables: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[T, H, V]` in fp32, from fp32 `query_THK`, `keys [pages, heads, K, PAGE]`, `values [pages, heads, PAGE, V]`.

        `items [n, 4]` and `tables` are int32, as in `kernel.c`. All tensors are contiguous, on the host.
        """
        num_tokens, heads, key_width = query_THK.shape
        output = torch.zeros(num_tokens, heads, values.shape[-1])  # zeros for tokens of no request
        taken, kv_heads = ctypes.c_int64(0), keys.shape[1]
        num_units = UNITS_PER_THREAD * torch.get_num_threads()
        unit_heads = min(max(1, items.shape[0] * kv_heads // num_units), kv_heads)
        call = Attention(
            query=query_THK.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            items=items.data_ptr(),
            tables=tables.data_ptr(),
            output=output.data_ptr(),
            next=ctypes.addressof(taken),
            num_items=items.shape[0],
            heads=heads,
            kv_heads=kv_heads,
            key_width=key_width,
            value_width=values.shape[-1],
            window=window,
            is_bfloat16=int(keys.dtype is torch.bfloat16),
            scale=scale,
            softcap=softcap,
            unit_heads=unit_heads,
        )
        on_all_threads(self._attend, call)
        return output


@cache
def load() -> Kernel | None:
    """The kernel, built where the cache has none; None where it cannot be, said once."""
    built = library(_SOURCE, "attention runs")
    return None if built is None else Kernel(built)
