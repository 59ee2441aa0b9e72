import errno

import pytest

from outsize.errors import CorruptionError, StorageError, StorageFullError
from outsize.tier.transfer import Verb
from tests.doubles.faulty import Fault, FaultKind, FaultyTier
from tests.doubles.memory import MemoryTier
from tests.tier.helpers import pages

SIZE = 16384


def make(*faults: Fault) -> tuple[FaultyTier, MemoryTier, memoryview]:
    inner = MemoryTier(SIZE)
    data = pages(SIZE, seed=1)
    inner.start_write(0, data, "data").wait()
    return FaultyTier(inner, faults), inner, data


def stored(inner: MemoryTier) -> bytes:
    back = pages(SIZE)
    inner.start_read(0, back, "check").wait()
    return bytes(back)


def test_only_the_nth_match_is_struck():
    tier, _, data = make(Fault(FaultKind.EIO, Verb.READ, label="L07", nth=2))
    back = pages(SIZE)
    for label in ("L07.weight", "L08.weight"):
        tier.start_read(0, back, label).wait()
    tier.start_write(0, data, "L07.weight").wait()
    transfer = tier.start_read(0, back, "L07.state[0]")
    assert transfer.is_done()
    with pytest.raises(StorageError, match=r"read of L07.state\[0\] at byte 0: Input/output error") as caught:
        transfer.wait()
    assert caught.value.errno == errno.EIO
    tier.start_read(0, back, "L07.weight").wait()
    assert tier.num_faults == 1
    assert bytes(back) == bytes(data)


def test_every_match_is_struck_without_nth():
    tier, inner, data = make(Fault(FaultKind.ENOSPC, Verb.WRITE))
    for _ in range(2):
        with pytest.raises(StorageFullError):
            tier.start_write(0, pages(SIZE), "w").wait()
    assert stored(inner) == bytes(data)
    assert tier.num_faults == 2


@pytest.mark.parametrize("verb", list(Verb))
def test_short_moves_half_and_says_so(verb: Verb):
    tier, inner, data = make(Fault(FaultKind.SHORT, verb))
    buffer = pages(SIZE)
    start = tier.start_read if verb is Verb.READ else tier.start_write
    with pytest.raises(StorageError, match="8192 of 16384 bytes"):
        start(0, buffer, "x").wait()
    if verb is Verb.READ:
        assert bytes(buffer) == bytes(data[:8192]) + bytes(8192)
    else:
        assert stored(inner) == bytes(8192) + bytes(data[8192:])


def test_short_of_one_page_moves_nothing():
    tier, inner, data = make(Fault(FaultKind.SHORT, Verb.WRITE))
    with pytest.raises(StorageError, match="0 of 4096"):
        tier.start_write(0, pages(4096), "x").wait()
    assert stored(inner) == bytes(data)


@pytest.mark.parametrize("verb", list(Verb))
@pytest.mark.parametrize("kind", [FaultKind.BIT_FLIP, FaultKind.CORRUPTION])
def test_one_bit_arrives_flipped(verb: Verb, kind: FaultKind):
    tier, inner, data = make(Fault(kind, verb))
    buffer = pages(SIZE, seed=2)
    before = bytes(buffer)
    transfer = (tier.start_read if verb is Verb.READ else tier.start_write)(0, buffer, "x")
    if kind is FaultKind.CORRUPTION:
        with pytest.raises(CorruptionError, match="a digest differs"):
            transfer.wait()
        with pytest.raises(CorruptionError):
            transfer.wait()
    else:
        transfer.wait()
        transfer.wait()
    sent, arrived = (bytes(data), bytes(buffer)) if verb is Verb.READ else (before, stored(inner))
    assert [a ^ b for a, b in zip(sent, arrived, strict=True) if a != b] == [1]
    if verb is Verb.WRITE:
        assert bytes(buffer) == before


def test_close_closes_the_inner_tier():
    tier, inner, data = make()
    tier.close()
    with pytest.raises(RuntimeError, match="closed"):
        inner.start_read(0, data, "x")
