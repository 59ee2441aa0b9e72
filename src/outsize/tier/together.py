"""Several transfers as one."""

from __future__ import annotations

from outsize.tier.base import Transfer


class Together:
    """Transfers that are one; over when all are, failed ones included."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def wait(self) -> None:
        """Wait for all; raise the first error met."""
        error = self.settle()
        if error is not None:
            raise error

    def settle(self) -> BaseException | None:
        """Wait for all, and return the first error met."""
        error: BaseException | None = None
        for transfer in self.transfers:
            try:
                transfer.wait()
            except BaseException as failure:
                error = error or failure
        return error

    def follow(self) -> None:
        """As `wait`."""
        self.wait()

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return all(transfer.is_done() for transfer in self.transfers)
