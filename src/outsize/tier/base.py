"""What every tier can do: start a transfer, and wait for it. Starting and waiting are two verbs.

A tier is addressed by byte offset; buffers are page-aligned memoryviews. `label` says in the plan's words
what moves (`L07.state[3]`), so that an error can name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from outsize.block import Extent
from outsize.errors import OutsizeError
from outsize.tier.digests import Check
from outsize.tier.stats import TierStats
from outsize.tier.transfer import Listener


class Transfer(Protocol):
    """A transfer that was started."""

    def wait(self) -> None:
        """Block until the bytes are in place; raise StorageError naming the label where they are not."""

    def follow(self) -> None:
        """Let what this thread computes next come after it: without blocking where the device can, else as `wait`."""

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""


def wait_all(transfers: Iterable[Transfer]) -> None:
    """Wait for all, those too that come after one that failed; then raise what went wrong first.

    Whoever was told of an error may give away what the transfers used: nothing must be under way any more.
    """
    error: OutsizeError | None = None
    for transfer in transfers:
        try:
            transfer.wait()
        except OutsizeError as failure:
            error = error or failure
    if error is not None:
        raise error


def follow_all(transfers: Sequence[Transfer]) -> None:
    """Let computing come after all; where one failed, wait for the others and raise what went wrong first."""
    try:
        for transfer in transfers:
            transfer.follow()
    except OutsizeError:
        with suppress(OutsizeError):
            wait_all(transfers)
        raise


class Tier(Protocol):
    """A place for bytes. Offsets and lengths are multiples of `outsize.block.ALIGNMENT`."""

    num_bytes: int

    def start_read(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start filling `buffer` from `offset`; the buffer must stay alive and untouched until `wait`."""

    def start_write(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start storing `buffer` at `offset`; the buffer must stay alive and unchanged until `wait`."""

    def stats(self) -> TierStats:
        """What was moved since the tier was opened."""

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of everything that is moved from now on; None: nobody."""

    def close(self) -> None:
        """Wait for what is under way and give everything back. Closing twice is allowed."""


class DurableTier(Tier, Protocol):
    """A tier whose bytes outlive the process, once they were synchronised."""

    def sync(self) -> None:
        """Make everything durable whose transfer is over. Raises StorageError where the disk does not promise that."""

    def checks(self, extent: Extent) -> list[Check]:
        """What is known of the bytes of `extent`: digests of what was written there, in order."""

    def expect(self, check: Check) -> None:
        """Take `check` as what was written there, in an earlier process."""
