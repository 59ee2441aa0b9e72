"""How much a tier moved, and for how long it was busy with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from outsize.tier.transfer import Listener, Verb, at


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters since the tier was opened.

    Bytes count what was moved in full; times are seconds during which at least one such operation was under
    way (not summed over threads), so that bytes over seconds is the bandwidth reached, checksums included.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    read_busy_s: float = 0.0
    write_busy_s: float = 0.0


class _Line:
    """One direction: bytes moved, and the union of the intervals in which something was under way."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.active = 0
        self.busy_s = 0.0
        self.since_s = 0.0

    def busy_until(self, now_s: float) -> float:
        return self.busy_s + (now_s - self.since_s if self.active else 0.0)


class Meter:
    """Counts for `TierStats`, from any number of threads; tells `listener`, where there is one, of all that is counted."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self._lock = threading.Lock()
        self._lines = {verb: _Line() for verb in Verb}

    @contextmanager
    def busy(self, verb: Verb, num_bytes: int, label: str = "") -> Iterator[None]:
        """Count the time of the body, and `num_bytes` if it does not raise."""
        line, listener = self._lines[verb], self.listener
        start_s = time.perf_counter() if listener is not None else 0.0
        with self._lock:
            if line.active == 0:
                line.since_s = time.perf_counter()
            line.active += 1
        moved = 0
        try:
            yield
            moved = num_bytes
        finally:
            with self._lock:
                line.num_bytes += moved
                line.active -= 1
                if line.active == 0:
                    line.busy_s += time.perf_counter() - line.since_s
            if listener is not None and moved:
                listener(verb, label, moved, at(start_s), at(time.perf_counter()))

    def stats(self) -> TierStats:
        """The counters now, what is under way included in the times."""
        with self._lock:
            now_s = time.perf_counter()
            read, write = self._lines[Verb.READ], self._lines[Verb.WRITE]
            return TierStats(read.num_bytes, write.num_bytes, read.busy_until(now_s), write.busy_until(now_s))
