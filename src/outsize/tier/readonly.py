"""A file that is only read, as a tier: what a commit is verified and exported from, beside the process that writes it."""

from __future__ import annotations

from pathlib import Path

from outsize.block import Extent
from outsize.errors import StorageError, UsageError
from outsize.files import OpenFile
from outsize.tier.digests import Check
from outsize.tier.stats import TierStats
from outsize.tier.transfer import DoneTransfer, Listener, Verb, checked_bytes


class ReadOnlyTier:
    """The bytes of the file at `path`; no digest is known.

    Raises StorageError where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = OpenFile.open(path)
        except OSError as error:
            raise StorageError(
                f"{path}: the data of the store cannot be read: {error.strerror}",
                hint="a data file on a drive of its own must be where store.json says",
            ) from error
        self.num_bytes = self._file.num_bytes

    def start_read(self, offset: int, buffer: memoryview, label: str) -> DoneTransfer:
        """Read now. Raises StorageError."""
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        self._file.read(offset, view, label)
        self._file.drop_pages(offset, len(view))
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
        self._file.close()
