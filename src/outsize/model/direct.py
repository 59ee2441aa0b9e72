"""Reads ranges of weight files, past the page cache, at the speed of the drive.

A tensor begins anywhere in a file, direct I/O only at multiples of a page. So a little more is read, in pieces side by
side, each into a buffer of the thread that reads it, and the wanted bytes are copied from there. The page cache would hold
the model once more, in memory that counts against the limit.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import numpy as np

from outsize.files import OpenFile

PIECE_BYTES = 2 << 20
"""A large page of the system: a buffer is one run of memory, and a read of it one request to the drive."""
NUM_THREADS = 4
BUFFERS_BYTES = NUM_THREADS * PIECE_BYTES


class FileReader:
    """Reads ranges of files; several threads may ask at once. Takes memory for a piece in each of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self.bytes_read = 0
        """Bytes that were asked for so far."""
        self._own = _Own()

    def start_read(
        self, file: OpenFile, offset: int, target: memoryview, label: str = "weights"
    ) -> list[Future[None]]:
        """Start filling `target` from byte `offset` of `file`, in pieces; for `wait_read`."""
        if not len(target):
            return []
        with self._lock:
            self.bytes_read += len(target)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="outsize-file")
            stop = offset + len(target)
            cuts = [offset, *range(offset - offset % PIECE_BYTES + PIECE_BYTES, stop, PIECE_BYTES), stop]
            return [
                self._threads.submit(self._read, file, first, target[first - offset : last - offset], label)
                for first, last in pairwise(cuts)
            ]

    def close(self) -> None:
        """End the threads; a later read starts others."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown()
                self._threads = None

    def _read(self, file: OpenFile, offset: int, target: memoryview, label: str) -> None:
        if file.is_direct and self._own.buffer is None:
            self._own.buffer = _buffer()
        file.read_once(offset, target, label, self._own.buffer)


class _Own(threading.local):
    """What each thread has of its own."""

    buffer: memoryview | None = None


def _buffer() -> memoryview:
    """A large page, where the system gives one; of the address space around it nothing is touched."""
    memory = mmap.mmap(-1, 2 * PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % PIECE_BYTES
    return memoryview(memory)[start : start + PIECE_BYTES]


def wait_read(pieces: Iterable[Future[None]]) -> None:
    """Wait until all are over, then raise the first StorageError or FileChangedError."""
    errors = [piece.exception() for piece in pieces]
    for error in errors:
        if error is not None:
            raise error
