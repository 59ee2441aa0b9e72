"""Arguments of the running call: where blocks compute, and as they came, on the host.

What only the host has to look at (which rows of a table, which labels count) is never asked of a device, which would wait.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from outsize.tier import sent

Args: TypeAlias = tuple[Any, ...]
"""Arguments of a call by position."""

Kwargs: TypeAlias = dict[str, Any]
"""Arguments of a call by name."""


class Arguments:
    """Moves a call's tensors to `device`, and knows those that came from the host until `forget`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_copies: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """The call is over."""
        self._host_copies.clear()

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments where blocks compute; what they were on the host is kept while the call runs."""
        self._host_copies.clear()
        if self._device.type == "cpu":
            return args, kwargs

        def move(tensor: Tensor) -> Tensor:
            moved = self.on_device(tensor)
            if moved is not tensor and tensor.device.type == "cpu":
                self._host_copies[id(moved)] = (moved, tensor)
            return moved

        moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, move, (args, kwargs))
        return moved

    def on_device(self, tensor: Tensor) -> Tensor:
        """`tensor` where blocks compute; what comes from the host is sent ahead, and nothing waits for it."""
        return sent(tensor, self._device)

    def on_host(self, tensor: Tensor) -> Tensor:
        """`tensor` where the host can read it: an argument of the running call as it came, else a copy, which is waited
        for."""
        if tensor.device.type == "cpu":
            return tensor
        known = self.known_on_host(tensor)
        return known if known is not None else tensor.cpu()

    def known_on_host(self, tensor: Tensor) -> Tensor | None:
        """`tensor` as it came from the host, where it is an argument of the running call or another view of one."""
        own = tensor if tensor._base is None else tensor._base
        moved, known = self._host_copies.get(id(own), (None, None))
        if known is None or moved is not own or known.shape.numel() != tensor.numel():
            return None
        if not moved.is_inference() and moved._version:
            return None  # the model changed its copy
        return known.view(tensor.shape) if tensor.is_contiguous() and known.is_contiguous() else None
