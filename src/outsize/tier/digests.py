"""Which bytes of a store have a known checksum, and how to cut a read so that all of those can be checked.

Every piece that was written leaves one extent with its XXH3 digest. Extents never overlap: a newer one
removes what it touches. A read is cut where the writes were cut, so that it may join many writes (a plane
written chunk by chunk) and each of its pieces is still checked by the thread that read it. Where a read takes
only a part of an extent, that part comes unchecked; so does what was never written. About 300 bytes of memory
per extent.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from outsize.block import Extent


@dataclass(frozen=True, slots=True)
class Check:
    """Bytes `[start, stop)` of the store must hash to `digest`."""

    start: int
    stop: int
    digest: int


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """Bytes `[start, stop)` of the store, read by one thread, and what is known of them."""

    start: int
    stop: int
    checks: tuple[Check, ...] = ()


def cut(extent: Extent, piece_bytes: int) -> list[ReadPiece]:
    """`extent` in pieces of `piece_bytes`, the last one shorter, with no checks."""
    end = extent.offset + extent.num_bytes
    return [ReadPiece(at, min(at + piece_bytes, end)) for at in range(extent.offset, end, piece_bytes)]


class DigestMap:
    """Digests by extent, shared by the threads of a tier."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._checks: dict[int, Check] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def put(self, check: Check) -> None:
        """Make `check` what is known of its bytes; forget every extent that it touches."""
        with self._lock:
            known = self._checks.get(check.start)
            if known is None or known.stop != check.stop:
                first = bisect_right(self._starts, check.start) - 1
                if first < 0 or self._checks[self._starts[first]].stop <= check.start:
                    first += 1
                last = bisect_left(self._starts, check.stop)
                for start in self._starts[first:last]:
                    del self._checks[start]
                del self._starts[first:last]
                insort(self._starts, check.start)
            self._checks[check.start] = check

    def within(self, extent: Extent) -> list[Check]:
        """What is known of extents that lie wholly inside `extent`, in order."""
        end = extent.offset + extent.num_bytes
        with self._lock:
            first = bisect_left(self._starts, extent.offset)
            last = bisect_left(self._starts, end)
            checks = [self._checks[start] for start in self._starts[first:last]]
        if checks and checks[-1].stop > end:
            checks.pop()
        return checks

    def cut(self, extent: Extent, piece_bytes: int) -> list[ReadPiece]:
        """`extent` in pieces of at most `piece_bytes`; a known extent is never cut, even if larger."""
        pieces: list[ReadPiece] = []
        group: list[Check] = []
        start = extent.offset

        def close_group() -> None:
            nonlocal start
            if group:
                pieces.append(ReadPiece(start, group[-1].stop, tuple(group)))
                start = group[-1].stop
                group.clear()

        for check in self.within(extent):
            is_gap = check.start > (group[-1].stop if group else start)
            if is_gap or check.stop - start > piece_bytes:
                close_group()
            if is_gap:
                pieces.extend(cut(Extent(start, check.start - start), piece_bytes))
                start = check.start
            group.append(check)
        close_group()
        end = extent.offset + extent.num_bytes
        if end > start:
            pieces.extend(cut(Extent(start, end - start), piece_bytes))
        return pieces
