"""Ranges of files past the page cache, at the speed of the drive.

What is wanted begins anywhere in a file, direct I/O only at multiples of a page. So a little more is read, in pieces side
by side, each into a buffer of the thread that reads it, and the wanted bytes are copied from there. The page cache would
hold the model once more, in memory that counts against the limit.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from outsize.block import ALIGNMENT
from outsize.errors import StorageError

PIECE_BYTES = 2 << 20
"""A large page of the system: a buffer is one run of memory, and a read of it one request to the drive."""
NUM_THREADS = 4
BUFFERS_BYTES = NUM_THREADS * PIECE_BYTES


class FileReader:
    """Reads ranges of files; several threads may ask at once. Takes memory for a piece in each of its threads.

    Where a file system has no direct I/O, the page cache is asked to keep nothing.
    """

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self.bytes_read = 0
        """That were asked for, so far."""
        self._own = threading.local()

    def start_read(self, path: Path, offset: int, buffer: memoryview) -> list[Future[None]]:
        """Start filling `buffer` from byte `offset` of a file, in pieces; for `wait_read`."""
        if not len(buffer):
            return []
        with self._lock:
            self.bytes_read += len(buffer)
            if path not in self._files:
                self._files[path] = _File.open(path)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="outsize-file")
            stop = offset + len(buffer)
            cuts = [offset, *range(offset - offset % PIECE_BYTES + PIECE_BYTES, stop, PIECE_BYTES), stop]
            return [
                self._threads.submit(
                    self._read, self._files[path], first, buffer[first - offset : last - offset]
                )
                for first, last in pairwise(cuts)
            ]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown()
                self._threads = None
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    def _read(self, file: _File, offset: int, target: memoryview) -> None:
        if not file.is_direct:
            file.fill(offset, target, len(target))
            os.posix_fadvise(file.descriptor, offset, len(target), os.POSIX_FADV_DONTNEED)
            return
        if not hasattr(self._own, "buffer"):
            self._own.buffer = _buffer()
        before = offset % ALIGNMENT
        needed = before + len(target)
        buffer = self._own.buffer[: -(-needed // ALIGNMENT) * ALIGNMENT]
        file.fill(offset - before, buffer, needed)
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(buffer[before:needed], np.uint8))


def _buffer() -> memoryview:
    """A large page, where the system gives one; of the address space around it nothing is touched."""
    memory = mmap.mmap(-1, 2 * PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % PIECE_BYTES
    return memoryview(memory)[start : start + PIECE_BYTES]


def wait_read(pieces: Iterable[Future[None]]) -> None:
    """Wait until all are over; raise the first StorageError: the file cannot be read, or ends before what is wanted."""
    errors = [piece.exception() for piece in pieces]
    for error in errors:
        if error is not None:
            raise error


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    descriptor: int
    is_direct: bool

    @classmethod
    def open(cls, path: Path) -> _File:
        """Direct, where the file system has that in units of `ALIGNMENT`."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT)
            try:
                with mmap.mmap(-1, ALIGNMENT) as page:
                    os.preadv(descriptor, [page], 0)
                return cls(path, descriptor, True)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise StorageError(f"cannot open {path}: {error.strerror}") from error
        return cls(path, os.open(path, flags), False)

    def fill(self, offset: int, buffer: memoryview, num_bytes: int) -> None:
        """Read `num_bytes` or more of what is from `offset` on into `buffer`. Raises StorageError."""
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise StorageError(
                    f"cannot read {self.path} at byte {offset + done}: {error.strerror}"
                ) from error
            done += count
            if not count or (done < num_bytes and self.is_direct and count % ALIGNMENT):
                raise StorageError(
                    f"{self.path} ends at byte {offset + done}, it has been cut since it was opened"
                )
