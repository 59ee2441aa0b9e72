"""A tier in memory, for tests: it stores what a disk tier would, without a disk."""

from __future__ import annotations

import mmap

from outsize.errors import UsageError
from outsize.tier.stats import TierStats
from outsize.tier.transfer import DoneTransfer, Listener, Verb, checked_bytes


class MemoryTier:
    """`num_bytes` of memory, taken as they are first written; transfers are over when they are started."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._memory: mmap.mmap | None = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def start_read(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Fill `buffer` from `offset`; what was never written is zero."""
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        view[:] = memoryview(self._live(label))[offset : offset + len(view)]
        return DoneTransfer()

    def start_write(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Store `buffer` at `offset`."""
        view = checked_bytes(Verb.WRITE, offset, buffer, label, self.num_bytes)
        memoryview(self._live(label))[offset : offset + len(view)] = view
        return DoneTransfer()

    def stats(self) -> TierStats:
        """Nothing is counted."""
        return TierStats()

    def listen(self, listener: Listener | None) -> None:
        """Nothing is told: no transfer takes time."""

    def finish(self) -> None:
        """Nothing to wait for: transfers are over when they are started."""

    def close(self) -> None:
        """Give the memory back. Closing twice is allowed."""
        self._memory = None

    def _live(self, label: str) -> mmap.mmap:
        if self._memory is None:
            raise UsageError(f"memory tier: {label} was started on a closed tier")
        return self._memory
