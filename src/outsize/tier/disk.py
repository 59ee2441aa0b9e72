"""The disk tier: direct transfers on one store file, from a small pool of threads, with checksums.

A transfer is cut in pieces so that a large one keeps several threads, and the drive's queue, busy. The thread
that moves a piece also hashes it, while others move theirs: preadv, pwritev and XXH3 all release the GIL. The
digest is taken before the write, so that torn or failed writes are found by the next read as well.

Order is the caller's: a transfer that touches the bytes of another, or its buffer, is started only after
waiting for that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from outsize.block import Extent
from outsize.errors import CorruptionError, UsageError
from outsize.tier.digests import Check, DigestMap, ReadPiece, cut
from outsize.tier.stats import Meter, TierStats
from outsize.tier.store import StoreFile
from outsize.tier.transfer import Listener, TaskTransfer, Verb, checked_bytes

PIECE_BYTES = 4 << 20
"""Most bytes that one thread moves at once."""


IO_THREADS = 4
"""Threads that move bytes, where nobody measured how many are enough."""


def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="outsize-disk")


class DiskTier:
    """`num_bytes` of the disk that holds `folder`, in a file `folder/name`: scratch, unless it `is_kept`.

    Space is reserved at once. `verify` checks the digest of every read that covers what a write wrote;
    digests are kept in both cases. Raises ConfigError (the folder is missing, not writable, or in memory),
    StorageFullError (no room), StorageError (a store of this name is in use: the message names the process).
    """

    def __init__(
        self,
        folder: Path,
        num_bytes: int,
        *,
        name: str = "outsize.store",
        verify: bool = True,
        num_threads: int = IO_THREADS,
        anonymous: bool = False,
        is_kept: bool = False,
    ) -> None:
        self.num_bytes = num_bytes
        self.verify = verify
        self._file = StoreFile(Path(folder), name, num_bytes, anonymous=anonymous, is_kept=is_kept)
        self._digests = DigestMap()
        self._meter = Meter()
        self._num_threads = num_threads
        self._threads = _pool(num_threads)

    @property
    def path(self) -> Path:
        """The store file."""
        return self._file.path

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._file.data.is_direct

    def use_threads(self, num_threads: int) -> None:
        """Move bytes by so many threads from now on; what is under way is over first."""
        self._num_threads = num_threads
        self.finish()

    def finish(self) -> None:
        """Wait until nothing is under way: the threads end, and others begin."""
        threads, self._threads = self._threads, _pool(self._num_threads)
        threads.shutdown(wait=True)

    def stats(self) -> TierStats:
        """Bytes moved and seconds busy since the tier was opened."""
        return self._meter.stats()

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of each piece that a thread moved."""
        self._meter.listener = listener

    def start_read(self, offset: int, buffer: memoryview, label: str) -> TaskTransfer:
        """Start filling `buffer` from `offset`; the buffer must stay alive and untouched until `wait`.

        `wait` raises StorageError where the disk fails, CorruptionError where a digest does not match. What
        was never written, or is only a part of what one write wrote, comes unchecked.
        """
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        extent = Extent(offset, len(view))
        pieces = self._digests.cut(extent, PIECE_BYTES) if self.verify else cut(extent, PIECE_BYTES)
        return self._start(self._read, pieces, view, offset, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> TaskTransfer:
        """Start storing `buffer` at `offset`; the buffer must stay alive and unchanged until `wait`.

        `wait` raises StorageFullError or StorageError where the disk fails; the bytes are then undefined, and
        a verified read of them says so.
        """
        view = checked_bytes(Verb.WRITE, offset, buffer, label, self.num_bytes)
        return self._start(self._write, cut(Extent(offset, len(view)), PIECE_BYTES), view, offset, label)

    def sync(self) -> None:
        """Make durable what was written. Raises StorageError."""
        if not self._file.is_open:
            raise UsageError(f"{self.path} was closed before it was made durable")
        self._file.data.sync()

    def checks(self, extent: Extent) -> list[Check]:
        """The digests of what was written within `extent`, in order."""
        return self._digests.within(extent)

    def expect(self, check: Check) -> None:
        """Take a digest over from an earlier process."""
        self._digests.put(check)

    def close(self) -> None:
        """Wait for what is under way, then remove the store file, unless it is kept. Closing twice is allowed."""
        self._threads.shutdown(wait=True)
        self._file.close()

    def _start(
        self,
        run: Callable[[ReadPiece, memoryview, str], None],
        pieces: Sequence[ReadPiece],
        view: memoryview,
        offset: int,
        label: str,
    ) -> TaskTransfer:
        if not self._file.is_open:
            raise UsageError(f"{self.path}: {label} was started on a closed tier")

        def run_piece(piece: ReadPiece, part: memoryview) -> None:
            with part:  # released before the future resolves: its owner may free the memory from then on
                run(piece, part, label)

        return TaskTransfer(
            *(
                self._threads.submit(run_piece, piece, view[piece.start - offset : piece.stop - offset])
                for piece in pieces
            )
        )

    def _read(self, piece: ReadPiece, view: memoryview, label: str) -> None:
        with self._meter.busy(Verb.READ, len(view), label):
            self._file.data.read(piece.start, view, label)
            for check in piece.checks:
                if _digest(view[check.start - piece.start : check.stop - piece.start]) != check.digest:
                    raise CorruptionError(
                        f"{self.path}: {label}: bytes {check.start} to {check.stop} of the file are not "
                        "the bytes that were written",
                        hint="the drive or its memory is failing, or another program wrote to the file",
                    )

    def _write(self, piece: ReadPiece, view: memoryview, label: str) -> None:
        with self._meter.busy(Verb.WRITE, len(view), label):
            self._digests.put(Check(piece.start, piece.stop, _digest(view)))
            self._file.data.write(piece.start, view, label)


def _digest(view: memoryview) -> int:
    # Not `xxh3_64_intdigest`: before xxhash 4 it holds the GIL, the constructor does not.
    return int(xxhash.xxh3_64(view).intdigest())
