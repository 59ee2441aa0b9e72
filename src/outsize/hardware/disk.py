"""Work for the disk: transfers of the sizes that training makes, as many under way at once, through the disk tier.

The file is filled with noise first, since what was never written is read without a disk, and since some drives compress.
It is small, and both halves are passed over again and again: a drive that writes slower after minutes, when a fast part
of it is full, is measured too fast, and so is one whose host keeps files in its own memory.
"""

from __future__ import annotations

import os
from collections import deque
from itertools import cycle

from outsize.block import CHUNK
from outsize.hardware.rate import Work
from outsize.plan.place import CHUNK_BUFFERS
from outsize.tier import HostArena, Region, Tier, Transfer, Verb

TRANSFERS_BYTES = (12 * CHUNK, 4 * CHUNK, 2 * CHUNK)
"""One chunk of AdamW's state, of fp32 weights or gradients, and of bf16 weights."""

TRANSFERS_PER_UNIT = 6
SPANS = 15
"""Sets of transfers in each half of the file."""

HALF_BYTES = SPANS * sum(TRANSFERS_BYTES)
FILE_BYTES = 2 * HALF_BYTES
BUFFERS_BYTES = CHUNK_BUFFERS * max(TRANSFERS_BYTES)
"""Memory of one direction."""


def transfers(tier: Tier, verb: Verb, first_byte: int, arena: HostArena) -> Work:
    """Reads, or writes, of the half of the file at `first_byte`; amounts are bytes.

    As in training, the next transfer starts when the oldest of `CHUNK_BUFFERS` is over: they stay under way from one unit
    to the next. Their buffers are BUFFERS_BYTES of `arena`, and go with the work.
    """
    buffers = cycle([_noise(arena, f"{verb} {index}") for index in range(CHUNK_BUFFERS)])
    places = cycle(_places(first_byte))
    start = tier.start_read if verb is Verb.READ else tier.start_write
    under_way: deque[Transfer] = deque()

    def run() -> float:
        amount = 0
        for _ in range(TRANSFERS_PER_UNIT):
            if len(under_way) == CHUNK_BUFFERS:
                under_way.popleft().wait()
            place, num_bytes = next(places)
            under_way.append(start(place, next(buffers).buffer[:num_bytes], f"measured {verb}"))
            amount += num_bytes
        return float(amount)

    def finish() -> None:
        while under_way:
            under_way.popleft().wait()

    return Work(run, finish)


def fill(work: Work) -> None:
    """Write all of one half, so that nothing measured later is a first write, or a read of nothing."""
    for _ in range(-(-SPANS * len(TRANSFERS_BYTES) // TRANSFERS_PER_UNIT)):
        work.run()
    work.finish()


def _places(first_byte: int) -> list[tuple[int, int]]:
    """Offset and size of every transfer, in order."""
    found, place = [], first_byte
    for _ in range(SPANS):
        for num_bytes in TRANSFERS_BYTES:
            found.append((place, num_bytes))
            place += num_bytes
    return found


def _noise(arena: HostArena, name: str) -> Region:
    region = arena.allocate(max(TRANSFERS_BYTES), name)
    region.buffer[:] = os.urandom(region.num_bytes)
    return region
