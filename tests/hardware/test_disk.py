import os
from itertools import pairwise

import pytest

from outsize.block import ALIGNMENT
from outsize.errors import CorruptionError
from outsize.hardware import disk
from outsize.tier import DiskTier, HostArena, Verb


@pytest.fixture
def tier(disk_folder):
    tier = DiskTier(disk_folder, disk.FILE_BYTES)
    yield tier
    tier.close()


def test_places_cover_a_half_without_gaps():
    places = disk._places(disk.HALF_BYTES)
    assert places[0][0] == disk.HALF_BYTES and sum(places[-1]) == disk.FILE_BYTES
    assert all(sum(one) == other[0] for one, other in pairwise(places))
    assert {num_bytes for _, num_bytes in places} == {2 << 20, 4 << 20, 12 << 20}
    assert not any(value % ALIGNMENT for place in places for value in place)


def test_reads_are_of_what_was_written_and_checked(tier):
    arena = HostArena(2 * disk.BUFFERS_BYTES)
    write = disk.transfers(tier, Verb.WRITE, 0, arena)
    disk.fill(write)
    assert tier.stats().bytes_written >= disk.HALF_BYTES
    read = disk.transfers(tier, Verb.READ, 0, arena)
    assert read.run() == 2 * sum(disk.TRANSFERS_BYTES)
    read.finish()
    assert tier.stats().bytes_read == 2 * sum(disk.TRANSFERS_BYTES)
    with tier.path.open("r+b") as file:
        file.write(b"not what was written")
        os.fsync(file.fileno())
    read = disk.transfers(tier, Verb.READ, 0, HostArena(disk.BUFFERS_BYTES))
    with pytest.raises(CorruptionError):
        read.run()
        read.finish()
