"""A request to a tier, checked once, and the transfer that answers it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
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
    """Tasks of worker threads as one transfer, which is over when all of them are, failed ones included.

    Waiting for the rest after a failure keeps threads from writing into a buffer that its owner has back already. What ends
    a task is its future alone: a task that fails at any line, of an interrupt or for want of memory, is over as well.
    """

    def __init__(self, *tasks: Future[None]) -> None:
        self._tasks = tasks

    def wait(self) -> None:
        """Block until the last task is over; raise the error of the first one that failed, at every call."""
        wait(self._tasks)
        for task in self._tasks:
            task.result()

    def follow(self) -> None:
        """As `wait`: computing does not run ahead of the host."""
        self.wait()

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return all(task.done() for task in self._tasks)


class DoneTransfer:
    """A transfer that was over when it started."""

    def wait(self) -> None:
        """Return at once."""

    def follow(self) -> None:
        """Return at once."""

    def is_done(self) -> bool:
        """Always True."""
        return True
