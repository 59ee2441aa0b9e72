"""The compiled attention over pages (`kernel.c`): built once with the machine's compiler, kept in the cache folder.

It is plain C, so building takes a second and needs none of torch's headers. Where there is no compiler, or
$OUTSIZE_EAGER=1, `load` gives None and attention runs in torch, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch

from outsize.config import cache_folder
from outsize.optim.compile import cpu_description, find_compiler

_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-x", "c++", "-O3", "-march=native", "-shared", "-fPIC", "-w")
_log = logging.getLogger(__name__)


class Attention(ctypes.Structure):
    """The arguments of `attend`, as in `kernel.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "sinks", "items", "tables")),
        *((name, ctypes.c_void_p) for name in ("output", "next")),
        ("num_items", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "key_width", "value_width")),
        *((name, ctypes.c_int32) for name in ("window", "is_bfloat16")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class Kernel:
    """The built library, and the threads that run it beside the caller."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend
        self._attend.argtypes = [ctypes.POINTER(Attention)]
        self._attend.restype = None
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="outsize-attention")

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
        taken = ctypes.c_int64(0)
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
            kv_heads=keys.shape[1],
            key_width=key_width,
            value_width=values.shape[-1],
            window=window,
            is_bfloat16=int(keys.dtype is torch.bfloat16),
            scale=scale,
            softcap=softcap,
        )
        num_helpers = min(torch.get_num_threads(), items.shape[0] * keys.shape[1]) - 1
        helpers = [self._threads.submit(self._attend, ctypes.byref(call)) for _ in range(num_helpers)]
        self._attend(ctypes.byref(call))
        wait(helpers)
        return output


@cache
def load() -> Kernel | None:
    """The kernel, built where the cache has none; None where it cannot be, said once."""
    if os.environ.get("OUTSIZE_EAGER", "") not in ("", "0"):
        return None
    compiler = find_compiler()
    if compiler is None:
        _log.warning("attention runs without a compiler, slower: install g++, or set CXX to a C++ compiler")
        return None
    key = "\0".join((_SOURCE.read_text(), *_FLAGS, compiler, cpu_description()))
    path = cache_folder() / "kernels" / f"attend-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        return Kernel(ctypes.CDLL(str(path)))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("attention runs uncompiled, slower: %s", error)
        return None


def _build(compiler: str, path: Path) -> None:
    """Compile to a file beside `path` and rename it: another process never finds half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], check=True, capture_output=True)
        built.replace(path)
