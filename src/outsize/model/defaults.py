"""torch's defaults for new tensors, which belong to the user: they may change them around any call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.RLock()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, new tensors are fp32 and in the host's memory unless the code says otherwise, as in a new process.

    The default type is the whole process's, and transformers changes it too, with torch's init functions, while it
    constructs a model. So one thread at a time is inside: for code that constructs models, not for code that runs them.
    """
    with _lock, torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
