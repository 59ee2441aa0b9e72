"""A device that a second host memory plays, reached by copies on two threads, as late as one likes.

Nothing above the room `tier` can tell it from a real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from outsize.tier import Device, LinkStats, TaskTransfer, Transfer, Way
from outsize.tier.transfer import DoneTransfer, Listener, at


class TwinDevice(Device):
    """A second memory of the host, for tests: copies run on a thread per way, after `delay_s(way, label)`.

    Computing is synchronous, so every wait blocks. `limit_bytes` is its capacity.
    """

    torch_device = torch.device("cpu")

    def __init__(
        self, limit_bytes: int | None = None, delay_s: Callable[[Way, str], float] = lambda way, label: 0.0
    ) -> None:
        self._delay_s = delay_s
        self._limit_bytes = limit_bytes or 1 << 40
        self._threads = {way: ThreadPoolExecutor(1, thread_name_prefix=f"outsize-{way}") for way in Way}
        self._moved = dict.fromkeys(Way, 0)
        self._listener: Listener | None = None
        self._lock = threading.Lock()
        self.pinned: dict[int, str] = {}
        """Names of what is pinned, by address."""

    def start_copy(
        self,
        way: Way,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Sequence[Transfer] = (),
        label: str,
    ) -> Transfer:
        """A copy on the thread of its way."""
        assert target.dtype is source.dtype and target.shape == source.shape, label
        with self._lock:
            self._moved[way] += target.nbytes
        return TaskTransfer(self._threads[way].submit(self._copy, way, target, source, tuple(after), label))

    def _copy(
        self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Sequence[Transfer], label: str
    ) -> None:
        for transfer in after:
            transfer.wait()
        listener, start_s = self._listener, time.perf_counter()
        if delay := self._delay_s(way, label):
            time.sleep(delay)
        target.copy_(source)
        if listener is not None:
            listener(way, label, target.nbytes, at(start_s), at(time.perf_counter()))

    def mark(self) -> Transfer:
        """Over already."""
        return DoneTransfer()

    def zeros(self, num_bytes: int, name: str) -> torch.Tensor:
        """Memory that nobody but the copies above brings anything into."""
        return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")

    def pin(self, address: int, num_bytes: int, name: str) -> None:
        """Remember the name."""
        assert address not in self.pinned, f"{name}: pinned already, as {self.pinned[address]}"
        self.pinned[address] = name

    def unpin(self, address: int) -> None:
        """Forget it."""
        del self.pinned[address]

    def free_bytes(self) -> int:
        """The limit."""
        return self._limit_bytes

    def links(self) -> LinkStats:
        """What was copied so far."""
        return LinkStats(self._moved[Way.UP], self._moved[Way.DOWN])

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of each copy that is over."""
        self._listener = listener

    def finish(self) -> None:
        """Wait for both threads."""
        for thread in self._threads.values():
            thread.submit(lambda: None).result()
