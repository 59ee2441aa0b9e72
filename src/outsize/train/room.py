"""Space on a disk that is held for files that are written later.

The weights of a run are written last. Without room for them all steps would be lost, and room that is free at the first
step may be taken by the last one: by the run's own store, or by another process. So the room is taken before the first
step, as a file without a name, whose space returns with the process however it ends.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from outsize.config import format_bytes
from outsize.errors import StorageFullError
from outsize.files import FULL_ERRNOS, is_memory_backed
from outsize.tier.store import reserve


class Room:
    """Bytes held on the file system of `folder`; none at first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd: int | None = None

    def hold(self, num_bytes: int) -> None:
        """Hold `num_bytes`, and nothing else. Raises StorageFullError where they are not free.

        A file system that cannot reserve space, or that lives in memory, is only asked how much is free.
        """
        self.release()
        if free_bytes(self._folder) < num_bytes:
            raise self._full(num_bytes)
        if is_memory_backed(self._folder):
            return
        try:
            self._fd, name = tempfile.mkstemp(prefix=".room-", dir=self._folder)
            os.unlink(name)
            reserve(self._fd, num_bytes)
        except OSError as error:
            self.release()
            if error.errno not in FULL_ERRNOS:
                raise
            raise self._full(num_bytes) from error

    def release(self) -> None:
        """Give the space back, for the files that it was held for."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _full(self, num_bytes: int) -> StorageFullError:
        free = format_bytes(free_bytes(self._folder))
        return StorageFullError(
            f"{self._folder}: {format_bytes(num_bytes)} are needed, {free} are free",
            hint="free some space there, or name a folder on another disk",
        )


def free_bytes(folder: Path) -> float:
    """Bytes that this user may write on the file system of `folder`; infinite where it does not know its size."""
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize if info.f_blocks else math.inf
