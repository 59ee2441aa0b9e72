"""Several tiers side by side, as one: what lies next to each other is spread over all, so that all are busy at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from outsize.block import Extent, align
from outsize.tier.base import DurableTier, Tier, Transfer, wait_over
from outsize.tier.digests import Check
from outsize.tier.stats import TierStats
from outsize.tier.together import Together
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
        started: list[Transfer] = []
        try:
            for index, place, begin, end in self._parts(offset, len(view)):
                started.append(verb_of(self._tiers[index])(place, view[begin:end], label))
        except BaseException:
            wait_over(started)  # nothing may still write into the buffer when the caller has it back
            raise
        return Together(started)

    def _parts(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """`(tier, offset in it, begin, end)` of each part of a request, `begin` and `end` in the buffer."""
        done = 0
        while done < num_bytes:
            stripe, inside = divmod(offset + done, STRIPE_BYTES)
            length = min(STRIPE_BYTES - inside, num_bytes - done)
            row, index = divmod(stripe, len(self._tiers))
            yield index, row * STRIPE_BYTES + inside, done, done + length
            done += length

    def sync(self) -> None:
        """Make durable what was written, on all."""
        for tier in self._durable():
            tier.sync()

    def checks(self, extent: Extent) -> list[Check]:
        """The digests of what was written within `extent`, in order; none spans two stripes."""
        found = []
        for index, place, begin, end in self._parts(extent.offset, extent.num_bytes):
            shift = extent.offset + begin - place
            for check in self._durable()[index].checks(Extent(place, end - begin)):
                found.append(Check(check.start + shift, check.stop + shift, check.digest))
        return found

    def expect(self, check: Check) -> None:
        """Take a digest over from an earlier process."""
        ((index, place, _, end),) = self._parts(check.start, check.stop - check.start)
        self._durable()[index].expect(Check(place, place + end, check.digest))

    def _durable(self) -> tuple[DurableTier, ...]:
        return cast(tuple[DurableTier, ...], self._tiers)

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

    def finish(self) -> None:
        """Wait until nothing is under way on any."""
        for tier in self._tiers:
            tier.finish()

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
