"""A request to a tier, checked once, and the transfer that answers it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum

import numpy as np

from outsize.block import ALIGNMENT


class Verb(StrEnum):
    """The two things a tier does with bytes."""

    READ = "read"
    WRITE = "write"


Moment = Callable[[], float]
"""A point in time: called, it gives the seconds of `time.perf_counter`, and waits where the point is yet to come."""

Listener = Callable[[str, str, int, Moment, Moment], None]
"""Told of what was moved: the verb or way, the label, bytes, start and end. Called by any thread; it must not block."""


def at(seconds: float) -> Moment:
    """The point in time that is known already."""
    return lambda: seconds


def checked_bytes(verb: Verb, offset: int, buffer: memoryview, label: str, tier_bytes: int) -> memoryview:
    """`buffer` as bytes, after asserting that the request is aligned and lies inside a tier of `tier_bytes`.

    The plan guarantees all of this; O_DIRECT would answer a bare "Invalid argument" in its place.
    """
    assert buffer.c_contiguous, f"{verb} {label}: the buffer is not contiguous"
    view = buffer.cast("B")
    num_bytes = len(view)
    assert num_bytes > 0, f"{verb} {label}: the buffer is empty"
    assert offset % ALIGNMENT == 0 and num_bytes % ALIGNMENT == 0, (
        f"{verb} {label}: offset {offset} and length {num_bytes} must be multiples of {ALIGNMENT}"
    )
    assert offset >= 0 and offset + num_bytes <= tier_bytes, (
        f"{verb} {label}: bytes {offset} to {offset + num_bytes} lie outside a tier of {tier_bytes}"
    )
    assert verb is Verb.WRITE or not view.readonly, f"{verb} {label}: the buffer is read-only"
    address = int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
    assert address % ALIGNMENT == 0, f"{verb} {label}: the buffer begins at {address:#x}, not at a page"
    return view


class TaskTransfer:
    """The task of a worker thread as a transfer."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Wait, and raise what the task raised."""
        self._future.result()

    def follow(self) -> None:
        """As `wait`: computing does not run ahead of the host."""
        self._future.result()

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._future.done()


class DoneTransfer:
    """A transfer that was over when it started."""

    def wait(self) -> None:
        """Return at once."""

    def follow(self) -> None:
        """Return at once."""

    def is_done(self) -> bool:
        """Always True."""
        return True


class PieceTransfer:
    """A transfer that is over when all of its `num_pieces` pieces are, failed ones included.

    Waiting for the rest after a failure keeps threads from writing into a buffer that its owner has back
    already.
    """

    def __init__(self, num_pieces: int) -> None:
        assert num_pieces > 0
        self._remaining = num_pieces
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: BaseException | None = None

    def finish_piece(self, error: BaseException | None) -> None:
        """Count one piece as over; the first `error` is what `wait` raises."""
        with self._lock:
            self._remaining -= 1
            if self._error is None:
                self._error = error
            is_last = self._remaining == 0
        if is_last:
            self._over.set()

    def wait(self) -> None:
        """Block until the last piece is over; raise the first error met, at every call."""
        self._over.wait()
        if self._error is not None:
            raise self._error

    def follow(self) -> None:
        """As `wait`."""
        self.wait()

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._over.is_set()
