"""Page-aligned buffers with known bytes."""

import mmap
import random


def pages(num_bytes: int, seed: int | None = None) -> memoryview:
    """A page-aligned buffer: zero, or random bytes for a seed."""
    view = memoryview(mmap.mmap(-1, num_bytes))
    if seed is not None:
        view[:] = random.Random(seed).randbytes(num_bytes)
    return view
