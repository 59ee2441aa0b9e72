"""What a computation depends on beside its arguments: random numbers, autocast and inference mode."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outsize.store.recovery import undone_by
from outsize.tier import Device


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Inside, a caller's `torch.inference_mode()` is `torch.no_grad()`: tensors that are made can be used after it too.

    Serves as a decorator as well.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was changed in place; 0 for tensors made in inference mode, which do not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of a forward, for its recomputation; `kind` is the type of the device that computes."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: Device) -> Autocast:
        """The state now."""
        kind = device.torch_device.type
        kind = "cpu" if kind == "meta" else kind
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restore(self) -> torch.autocast:
        """A context with this state; casts of weights are not cached, since a slot is reused for other weights."""
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True, slots=True)
class RngState:
    """The state of the random numbers of a forward, the host's and the device's, for its recomputation."""

    device: Device
    host_state: Tensor
    device_state: Tensor | None

    @classmethod
    def current(cls, device: Device) -> RngState:
        """The state now."""
        return cls(device, torch.get_rng_state(), device.rng_state())

    def is_now(self) -> bool:
        """Whether nothing was drawn since."""
        now = RngState.current(self.device)
        return torch.equal(self.host_state, now.host_state) and (
            self.device_state is None
            or now.device_state is None
            or torch.equal(self.device_state, now.device_state)
        )

    def put_back(self) -> None:
        """Go on from this state."""
        torch.set_rng_state(self.host_state)
        if self.device_state is not None:
            self.device.set_rng_state(self.device_state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, random numbers begin at this state; afterwards they go on where they were."""
        now = RngState.current(self.device)
        with undone_by(now.put_back):
            self.put_back()
            yield


def rewinding(device: Device) -> Callable[[], None]:
    """Return a function that sets the generators of torch, `random` and numpy back to their state of now."""
    torch_state, python_state, numpy_state = (
        RngState.current(device),
        random.getstate(),
        np.random.get_state(),
    )

    def rewind() -> None:
        torch_state.put_back()
        random.setstate(python_state)
        np.random.set_state(numpy_state)

    return rewind
