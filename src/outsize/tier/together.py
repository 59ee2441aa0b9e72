"""Several transfers as one."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.tier.base import Transfer, wait_all


class Together:
    """Transfers that are one; over when all are, failed ones included."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self._transfers = tuple(transfers)

    def wait(self) -> None:
        """Wait for all; raise the first error met."""
        wait_all(self._transfers)

    def follow(self) -> None:
        """As `wait`."""
        self.wait()

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return all(transfer.is_done() for transfer in self._transfers)
