"""How many threads a kernel takes: OpenMP keeps that for each thread that calls one.

`torch.set_num_threads` would do for the thread that calls it too, but then threads that begin later would take as many.
Kernels give the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


def limit_threads(num_threads: int) -> None:
    """Let kernels that this thread calls from now on take `num_threads`; where torch has no OpenMP nothing happens."""
    library = _openmp()
    if library is not None:
        torch.get_num_threads()  # torch sets its own number when a thread asks for the first time
        library.omp_set_num_threads(num_threads)


@contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Inside, kernels that this thread calls take `num_threads`."""
    before = torch.get_num_threads()
    limit_threads(num_threads)
    try:
        yield
    finally:
        limit_threads(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "omp_set_num_threads") else None
