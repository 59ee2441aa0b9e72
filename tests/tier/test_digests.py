from hypothesis import given
from hypothesis import strategies as st

from outsize.block import Extent
from outsize.tier.digests import Check, DigestMap, ReadPiece, cut

spans = st.tuples(st.integers(0, 60), st.integers(1, 20))


def test_plain_cuts():
    assert cut(Extent(3, 5), 2) == [ReadPiece(3, 5), ReadPiece(5, 7), ReadPiece(7, 8)]


def test_small_writes_are_read_together_and_still_checked():
    digests = DigestMap()
    checks = [Check(start, start + 2, start) for start in range(0, 8, 2)]
    for check in checks:
        digests.put(check)
    assert digests.cut(Extent(0, 10), 4) == [
        ReadPiece(0, 4, tuple(checks[:2])),
        ReadPiece(4, 8, tuple(checks[2:])),
        ReadPiece(8, 10),
    ]


def test_a_part_of_an_extent_is_read_unchecked():
    digests = DigestMap()
    digests.put(Check(0, 8, 1))
    assert digests.cut(Extent(4, 8), 100) == [ReadPiece(4, 12)]


@given(st.lists(spans, max_size=30), spans, st.integers(1, 9))
def test_against_a_plain_list(writes: list[tuple[int, int]], read: tuple[int, int], piece_bytes: int):
    digests = DigestMap()
    known: list[Check] = []
    for number, (start, length) in enumerate(writes):
        check = Check(start, start + length, number)
        digests.put(check)
        known = [old for old in known if old.stop <= check.start or old.start >= check.stop] + [check]
    extent = Extent(*read)
    end = extent.offset + extent.num_bytes
    inside = sorted(
        (check for check in known if check.start >= extent.offset and check.stop <= end),
        key=lambda c: c.start,
    )
    assert len(digests) == len(known)
    assert digests.within(extent) == inside

    pieces = digests.cut(extent, piece_bytes)
    assert [piece.start for piece in pieces] == [extent.offset] + [piece.stop for piece in pieces[:-1]]
    assert pieces[-1].stop == end
    assert [check for piece in pieces for check in piece.checks] == inside
    for piece in pieces:
        assert piece.stop > piece.start
        assert piece.stop - piece.start <= piece_bytes or len(piece.checks) == 1
        assert all(piece.start <= check.start and check.stop <= piece.stop for check in piece.checks)
