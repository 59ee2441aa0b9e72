"""A file under one descriptor: opened past the page cache where the file system can, read and written completely.

Whoever holds an `OpenFile` holds the bytes: renaming or removing the file, or putting another in its place, changes
nothing for the holder. Writing to the file does; `check` tells.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np

from outsize.block import ALIGNMENT
from outsize.errors import FileChangedError, StorageError, StorageFullError, UsageError
from outsize.files.filesystem import direct_alignment

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor of `path`, and whether it bypasses the page cache, in units of `ALIGNMENT`. Raises OSError."""
    alignment = direct_alignment(path)
    if alignment and ALIGNMENT % alignment == 0:
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags | os.O_CLOEXEC), False


@final
class OpenFile:
    """A file that is open; several threads may read and write. The descriptor is closed with the object, or by `close`."""

    def __init__(self, path: Path, descriptor: int, is_direct: bool) -> None:
        self.path = path
        self.is_direct = is_direct
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path, flags: int = os.O_RDONLY) -> OpenFile:
        """Open `path`. Raises OSError."""
        return cls(path, *open_direct(path, flags))

    @property
    def descriptor(self) -> int:
        """The descriptor. Raises UsageError where it is closed: its number may be another file's by now."""
        if not self._close.alive:
            raise UsageError(f"{self.path} was closed")
        return self._descriptor

    @property
    def num_bytes(self) -> int:
        """The size of the file when it was opened."""
        return self._status.st_size

    @property
    def times(self) -> tuple[int, int]:
        """When the file was last written to, and when it last changed, in nanoseconds, as it was opened."""
        return self._status.st_mtime_ns, self._status.st_ctime_ns

    def close(self) -> None:
        """Close the descriptor. Closing twice is allowed."""
        self._close()

    def read(self, offset: int, view: memoryview, label: str, num_bytes: int | None = None) -> None:
        """Fill `view`, or at least its first `num_bytes`; of a direct file, offset and address must be aligned.

        Raises StorageError naming `label`, also where the file ends before.
        """
        self._move(os.preadv, "read", offset, view, label, len(view) if num_bytes is None else num_bytes)

    def write(self, offset: int, view: memoryview, label: str) -> None:
        """Write all of `view`. Raises StorageFullError or StorageError naming `label`; the bytes are then undefined."""
        self._move(os.pwritev, "write", offset, view, label, len(view))

    def sync(self) -> None:
        """Make durable what was written. Raises StorageError."""
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise self._failure("write", 0, "all that was written (fdatasync)", error) from error

    def read_once(
        self, offset: int, target: memoryview, label: str, buffer: memoryview | None = None
    ) -> None:
        """Fill `target` from any offset of a file that nobody should write to, and leave nothing in the page cache.

        A direct file is read through `buffer`, which is aligned and large enough for the pages around the range; None:
        one is allocated. Raises FileChangedError where the file has changed since it was opened, or else StorageError.
        """
        try:
            if self.is_direct:
                self._read_aligned(offset, target, label, buffer)
            else:
                self.read(offset, target, label)
                self.drop_pages(offset, len(target))
        finally:
            # After the read: a write sets the time first, so what was read is as it was, or this raises.
            self.check_contents()

    def _read_aligned(self, offset: int, target: memoryview, label: str, buffer: memoryview | None) -> None:
        before = offset % ALIGNMENT
        needed = before + len(target)
        num_bytes = -(-needed // ALIGNMENT) * ALIGNMENT
        buffer = memoryview(mmap.mmap(-1, num_bytes)) if buffer is None else buffer[:num_bytes]
        self.read(offset - before, buffer, label, needed)
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(buffer[before:needed], np.uint8))

    def drop_pages(self, offset: int, num_bytes: int) -> None:
        """Let the page cache forget a range that was read; of a direct file it holds nothing."""
        if not self.is_direct:
            os.posix_fadvise(self.descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def check_contents(self) -> None:
        """Raise FileChangedError where the file was cut short or written to since it was opened."""
        then, now = self._status, os.fstat(self.descriptor)
        if now.st_size < then.st_size:
            raise FileChangedError(
                f"{self.path} was cut short since it was opened: {now.st_size} bytes, {then.st_size} before",
                hint="restore the file, and open the model again",
            )
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise FileChangedError(
                f"{self.path} was written to since it was opened",
                hint="restore the file unless only its time changed, and open the model again",
            )

    def check(self) -> None:
        """Raise FileChangedError where `check_contents` does, or the path leads to another file, or to none.

        In the latter case the holder still reads the bytes of the file that was opened; nobody else will.
        """
        self.check_contents()
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise FileChangedError(
                f"{self.path} was removed or moved since it was opened: {error.strerror}",
                hint="put the file back, or open the model where it is now",
            ) from error
        if not os.path.samestat(found, self._status):
            raise FileChangedError(
                f"{self.path} was replaced by another file since it was opened",
                hint="put the file that was opened back, or open the model again",
            )

    def _move(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        verb: str,
        offset: int,
        view: memoryview,
        label: str,
        num_bytes: int,
    ) -> None:
        """Move all of `view`, or at least `num_bytes`; a short count is continued from the last multiple of `unit`."""
        unit = ALIGNMENT if self.is_direct else 1
        done = 0
        while done < num_bytes:
            try:
                count = call(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failure(verb, offset + done, label, error) from error
            step = count if done + count >= num_bytes else count // unit * unit
            if step == 0:
                cause = OSError(errno.EIO, f"only {count} of {num_bytes - done} bytes were moved")
                raise self._failure(verb, offset + done, label, cause)
            done += step

    def _failure(self, verb: str, offset: int, label: str, cause: OSError) -> StorageError:
        message = f"{self.path}: {verb} of {label} failed at byte {offset} of the file: {cause.strerror}"
        if cause.errno in FULL_ERRNOS:
            hint = f"free space in {self.path.parent}, or pass another folder"
            failure: StorageError = StorageFullError(message, hint=hint)
        else:
            failure = StorageError(message)
        failure.errno = cause.errno
        return failure
