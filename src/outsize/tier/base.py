"""What every tier can do: start a transfer, and wait for it. Starting and waiting are two verbs.

A tier is addressed by byte offset; buffers are page-aligned memoryviews. `label` says in the plan's words
what moves (`L07.state[3]`), so that an error can name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from outsize.block import Extent
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
    """Wait for all, whatever is raised meanwhile; then raise what went wrong first.

    The caller may give away what the transfers used once this raises, so no transfer may still be under way.
    """
    error: BaseException | None = None
    for transfer in transfers:
        failure = _wait_out(transfer)
        error = error or failure
    if error is not None:
        raise error


def wait_over(transfers: Iterable[Transfer]) -> None:
    """Wait until all are over and raise nothing: for cleaning up after an error that is raised anyway."""
    for transfer in transfers:
        _wait_out(transfer)


def _wait_out(transfer: Transfer) -> BaseException | None:
    """Wait until `transfer` is over; what was raised first.

    An interrupt ends a wait and not the transfer, which is waited for again. A second interrupt gives up.
    """
    try:
        transfer.wait()
    except Exception as error:
        return error
    except BaseException as interrupt:
        with suppress(Exception):
            transfer.wait()
        return interrupt
    return None


def follow_all(transfers: Sequence[Transfer]) -> None:
    """Let computing come after all; where anything is raised, wait for all and raise it."""
    try:
        for transfer in transfers:
            transfer.follow()
    except BaseException:
        wait_over(transfers)
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

    def finish(self) -> None:
        """Wait until nothing is under way, whether it fails or not; nothing may be started meanwhile."""

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
