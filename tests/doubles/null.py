"""The null tier stores nothing and takes no time: planner and executor run on it at any size."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.errors import UsageError
from outsize.tier.stats import TierStats
from outsize.tier.transfer import DoneTransfer, Listener, Verb, checked_bytes


@dataclass(frozen=True, slots=True)
class LoggedTransfer:
    """One transfer that a null tier was asked for.

    >>> print(LoggedTransfer(Verb.READ, "L07.weight", 4096, 8192))
    read L07.weight 8192 at 4096
    """

    verb: Verb
    label: str
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.verb} {self.label} {self.num_bytes} at {self.offset}"


class NullTier:
    """A tier of `num_bytes` that keeps no byte: reads leave buffers as they are; `log` has all requests."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.log: list[LoggedTransfer] = []
        self._is_open = True

    def start_read(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Log the request; the buffer is left unchanged."""
        return self._note(Verb.READ, offset, buffer, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Log the request; the bytes go nowhere."""
        return self._note(Verb.WRITE, offset, buffer, label)

    def stats(self) -> TierStats:
        """Bytes asked for; no time was taken."""
        moved = {verb: sum(entry.num_bytes for entry in self.log if entry.verb is verb) for verb in Verb}
        return TierStats(bytes_read=moved[Verb.READ], bytes_written=moved[Verb.WRITE])

    def listen(self, listener: Listener | None) -> None:
        """Nothing is told: no transfer takes time."""

    def finish(self) -> None:
        """Nothing to wait for: transfers are over when they are started."""

    def close(self) -> None:
        """Refuse requests from now on; the log stays."""
        self._is_open = False

    def _note(self, verb: Verb, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        if not self._is_open:
            raise UsageError(f"null tier: {label} was started on a closed tier")
        view = checked_bytes(verb, offset, buffer, label, self.num_bytes)
        self.log.append(LoggedTransfer(verb, label, offset, len(view)))
        return DoneTransfer()
