"""Several tiers side by side, as one: what lies next to each other is spread over all, so that all are busy at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from outsize.block import align
from outsize.tier.base import Tier, Transfer
from outsize.tier.stats import TierStats
from outsize.tier.transfer import Listener, Verb, checked_bytes

STRIPE_BYTES = 1 << 20
"""Bytes next to each other on one tier: a chunk of 2 to 16 MiB reaches several, in requests that are still large."""


def part_bytes(num_bytes: int, count: int) -> int:
    """What each of `count` tiers holds of `num_bytes`."""
    return align(-(-num_bytes // count), STRIPE_BYTES)


class StripedTier:
    """`num_bytes` over `tiers`, each of `part_bytes` or more; stripe `i` is the `i // n`-th of tier `i % n`.

    Errors are those of the tier concerned. Closing closes all.
    """

    def __init__(self, tiers: Sequence[Tier], num_bytes: int) -> None:
        assert tiers and all(tier.num_bytes >= part_bytes(num_bytes, len(tiers)) for tier in tiers)
        self.num_bytes = num_bytes
        self._tiers = tuple(tiers)

    def start_read(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start reading from all tiers concerned."""
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        return self._start(lambda tier: tier.start_read, offset, view, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start writing to all tiers concerned."""
        view = checked_bytes(Verb.WRITE, offset, buffer, label, self.num_bytes)
        return self._start(lambda tier: tier.start_write, offset, view, label)

    def _start(
        self,
        verb_of: Callable[[Tier], Callable[[int, memoryview, str], Transfer]],
        offset: int,
        view: memoryview,
        label: str,
    ) -> Transfer:
        together = _Together()
        try:
            for index, place, begin, end in self._parts(offset, len(view)):
                together.transfers.append(verb_of(self._tiers[index])(place, view[begin:end], label))
        except BaseException:
            together.settle()  # nothing may still write into the buffer when the caller has it back
            raise
        return together

    def _parts(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """`(tier, offset in it, begin, end)` of each part of a request, `begin` and `end` in the buffer."""
        done = 0
        while done < num_bytes:
            stripe, inside = divmod(offset + done, STRIPE_BYTES)
            length = min(STRIPE_BYTES - inside, num_bytes - done)
            row, index = divmod(stripe, len(self._tiers))
            yield index, row * STRIPE_BYTES + inside, done, done + length
            done += length

    def stats(self) -> TierStats:
        """Bytes of all; the busiest tier's seconds."""
        each = [tier.stats() for tier in self._tiers]
        return TierStats(
            sum(stats.bytes_read for stats in each),
            sum(stats.bytes_written for stats in each),
            max(stats.read_busy_s for stats in each),
            max(stats.write_busy_s for stats in each),
        )

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of what each tier moves."""
        for tier in self._tiers:
            tier.listen(listener)

    def close(self) -> None:
        """Close all, whatever goes wrong with one."""
        error: BaseException | None = None
        for tier in self._tiers:
            try:
                tier.close()
            except BaseException as failure:
                error = error or failure
        if error is not None:
            raise error


class _Together:
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
