"""Counts the memory that tensors take, operation by operation.

Counting is exact where measuring is not: the same run gives the same figure, on tensors with or without values (torch's
meta device).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of tensors that operations make and that are still alive; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count what it made."""
        for given in tensors_in((args, kwargs)):
            self._add(given, 0)
        result = func(*args, **(kwargs or {}))
        for made in tensors_in(result):
            self._add(made, torch.Tensor.untyped_storage(made).nbytes())
        return result

    def _add(self, tensor: torch.Tensor, num_bytes: int) -> None:
        storage = torch.Tensor.untyped_storage(tensor)  # of placeholders as well, which refuse theirs
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._live -= self._known.pop(key)[1]

        self._known[key] = weakref.ref(storage, gone), num_bytes
        self._live += num_bytes
        self.peak = max(self.peak, self._live)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors anywhere in `values`: lists, tuples and dicts. It runs for each operation, and torch's tree is slower."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
