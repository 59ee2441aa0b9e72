"""Single entries of streamed blocks that fill what no whole block fits into."""

import pytest

from outsize import Pins
from outsize.block import Block, Group, Piece, Plane, Record, align
from outsize.config import Home
from outsize.plan import place
from outsize.plan.place import with_pieces

SIZES = (40_000, 20_000, 9_000)
"""Elements of the entries of a block."""


def records(trainable=False, count=6):
    return [
        Record.lay_out(
            Block(f"L{i:02}", tuple(Piece(f"{i}.{j}", (size,)) for j, size in enumerate(SIZES))),
            [trainable] * len(SIZES),
            (Plane.MOMENT1,) if trainable else (),
            {Plane.WEIGHT: 2, Plane.GRADIENT: 2, Plane.MOMENT1: 4},
        )
        for i in range(count)
    ]


def placed(arena_bytes, own=None, home=None, **pins):
    return place(own or records(), {Home.DEVICE: arena_bytes}, home=home, has_disk=True, pins=Pins(**pins))


LEAST = align(2 * (40_000 + 64 * 313 + 9_024)) * 2


@pytest.mark.parametrize("arena_bytes", range(LEAST, LEAST + 700_000, 37_000))
def test_what_is_left_is_less_than_the_smallest_entry(arena_bytes):
    placement = placed(arena_bytes)
    assert placement.bytes_in(Home.DEVICE) <= arena_bytes
    streams = any(group.blocks for group in placement.slots[Group.WEIGHT])
    assert arena_bytes - placement.bytes_in(Home.DEVICE) < align(2 * SIZES[-1]) or not streams
    assert all(placement.home(name, Group.WEIGHT) is not Home.DEVICE for name, _ in placement.pieces)


def test_pieces_take_no_more_than_was_left_and_add_up():
    before = placed(LEAST + 100_000)
    after = with_pieces(before, records(), 90_000)
    assert before.pieces < after.pieces
    assert after.pieces_bytes == sum(align(2 * SIZES[index]) for _, index in after.pieces)
    assert 0 < after.pieces_bytes - before.pieces_bytes <= 90_000
    assert (
        after.bytes_in(Home.DEVICE) - before.bytes_in(Home.DEVICE) == after.pieces_bytes - before.pieces_bytes
    )
    assert with_pieces(after, records(), 0) == after


def test_a_limit_on_what_stays_holds_for_pieces_too():
    free = placed(LEAST + 200_000)
    assert free.pieces
    same = placed(1 << 40, resident_bytes=free.resident_bytes + free.pieces_bytes)
    assert same == free
    assert not placed(LEAST + 200_000, resident_bytes=0).pieces
    assert not placed(LEAST + 200_000, home=Home.DISK).pieces


def test_what_trains_and_what_no_visit_needs_has_no_pieces():
    own = records(trainable=True)
    least = place(own, {Home.DEVICE: 1 << 40}, home=Home.DISK, has_disk=True, pins=Pins()).bytes_in(
        Home.DEVICE
    )
    assert not place(own, {Home.DEVICE: least + 30_000}, home=None, has_disk=True, pins=Pins()).pieces
    idle = frozenset(record.name for record in records())
    assert not place(
        records(), {Home.DEVICE: LEAST + 90_000}, home=None, has_disk=True, idle=idle, pins=Pins()
    ).pieces
