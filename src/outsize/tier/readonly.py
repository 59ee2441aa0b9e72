"""A file that is only read, as a tier: what a commit is verified and exported from, beside the process that writes it."""

from __future__ import annotations

import os
from pathlib import Path

from outsize.block import Extent
from outsize.errors import StorageError, UsageError
from outsize.tier.digests import Check
from outsize.tier.stats import TierStats
from outsize.tier.transfer import DoneTransfer, Listener, Verb, checked_bytes


class ReadOnlyTier:
    """The bytes of the file at `path`, through the page cache, of which nothing is kept; no digest is known.

    Raises StorageError where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                f"{path}: the data of the store cannot be read: {error.strerror}",
                hint="a data file on a drive of its own must be where store.json says",
            ) from error
        self.num_bytes = os.fstat(self._fd).st_size

    def start_read(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Read now. Raises StorageError."""
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise StorageError(
                    f"{self.path}: read of {label} failed at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                raise StorageError(f"{self.path}: the file ends before {label}, at byte {offset + done}")
            done += count
        os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        return DoneTransfer()

    def start_write(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Refused."""
        raise UsageError(f"{self.path} is only read; {label} cannot be written")

    def sync(self) -> None:
        """Nothing was written."""

    def checks(self, extent: Extent) -> list[Check]:
        """Nothing is known."""
        return []

    def expect(self, check: Check) -> None:
        """Readers check what they read."""

    def stats(self) -> TierStats:
        """Nothing is counted."""
        return TierStats()

    def listen(self, listener: Listener | None) -> None:
        """Nothing is told."""

    def finish(self) -> None:
        """Nothing to wait for: a read is over when it is started."""

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
