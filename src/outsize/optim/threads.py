"""How many threads a kernel takes: OpenMP keeps that for each thread that calls one.

`torch.set_num_threads` would do for the thread that calls it too, but then threads that begin later would take as many.
Kernels give the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from outsize.native import openmp


def limit_threads(num_threads: int) -> None:
    """Let kernels that this thread calls from now on take `num_threads`; where torch has no OpenMP nothing happens."""
    set_number = getattr(openmp(), "omp_set_num_threads", None)
    if set_number is not None:
        torch.get_num_threads()  # torch sets its own number when a thread asks for the first time
        set_number(num_threads)


@contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Inside, kernels that this thread calls take `num_threads`."""
    before = torch.get_num_threads()
    limit_threads(num_threads)
    try:
        yield
    finally:
        limit_threads(before)
