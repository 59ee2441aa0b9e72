import mmap
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import ALIGNMENT, Extent
from outsize.errors import StorageFullError
from outsize.tier import Slab, VersionedTier
from tests.doubles import MemoryTier

SIZES = (1, 2, 1, 3)
"""Of the cells, in pages."""


class Durable(MemoryTier):
    def sync(self):
        pass

    def checks(self, extent):
        return []

    def expect(self, check):
        pass


def cells_of(sizes):
    cells, offset = [], 0
    for size in sizes:
        cells.append(Extent(offset, size * ALIGNMENT))
        offset += size * ALIGNMENT
    return cells


def slabs_for(sizes, copies):
    slabs, offset = [], 0
    for size in sorted(set(sizes)):
        slab = Slab(offset, size * ALIGNMENT, sizes.count(size) * copies)
        slabs.append(slab)
        offset = slab.stop
    return slabs


def tier_with(copies, sizes=SIZES, **options):
    slabs = slabs_for(sizes, copies)
    inner = Durable(max(slab.stop for slab in slabs))
    return VersionedTier(inner, cells_of(sizes), slabs, **options), inner


def page(value, count=1):
    memory = mmap.mmap(-1, ALIGNMENT * count)
    memory[:] = bytes([value]) * len(memory)
    return memoryview(memory)


def read(tier, extent):
    memory = memoryview(mmap.mmap(-1, extent.num_bytes))
    tier.start_read(extent.offset, memory, "test").wait()
    return bytes(memory)


def write(tier, cell, value):
    tier.start_write(cell.offset, page(value, cell.num_bytes // ALIGNMENT), "test").wait()


def test_what_no_commit_holds_is_written_over_in_place():
    tier, _ = tier_with(1)
    for value in (1, 2, 3):
        for cell in cells_of(SIZES):
            write(tier, cell, value)
    assert read(tier, Extent(0, 7 * ALIGNMENT)) == bytes([3]) * 7 * ALIGNMENT
    tier.check_books()


def test_what_a_commit_holds_stays_as_it_was():
    tier, inner = tier_with(2)
    cell = cells_of(SIZES)[1]
    write(tier, cell, 1)
    (stored,) = tier.capture(cell)
    write(tier, cell, 2)
    write(tier, cell, 3)
    assert read(inner, stored.extent) == bytes([1]) * cell.num_bytes
    assert read(tier, cell) == bytes([3]) * cell.num_bytes
    tier.release([stored.offset])
    tier.check_books()


def test_a_cell_may_be_written_in_parts_once_it_has_moved():
    tier, _ = tier_with(2)
    cell = cells_of(SIZES)[3]
    write(tier, cell, 1)
    tier.capture(cell)
    for index, value in enumerate((7, 8, 9)):
        tier.start_write(cell.offset + index * ALIGNMENT, page(value), "test").wait()
    assert read(tier, cell) == b"".join(bytes([value]) * ALIGNMENT for value in (7, 8, 9))


def test_what_was_claimed_has_its_place_when_the_store_is_full(tmp_path):
    tier, _ = tier_with(2, sizes=(1, 1))
    first, second = cells_of((1, 1))
    for cell in (first, second):
        write(tier, cell, 1)
        tier.capture(cell)
    tier.claim(second, "test")
    write(tier, first, 2)
    tier.capture(first)
    with pytest.raises(StorageFullError):
        write(tier, first, 3)
    write(tier, second, 2)
    assert read(tier, second) == bytes([2]) * ALIGNMENT
    tier.check_books()


def test_a_full_store_says_so_where_no_commit_is_under_way():
    tier, _ = tier_with(1)
    cell = cells_of(SIZES)[1]
    write(tier, cell, 1)
    tier.capture(cell)
    with pytest.raises(StorageFullError, match="no extent"):
        write(tier, cell, 2)


def test_a_full_store_waits_for_the_commit_that_releases():
    tier, _ = tier_with(2)
    cell = cells_of(SIZES)[1]
    write(tier, cell, 1)
    (first,) = tier.capture(cell)
    tier.begin_commit()
    write(tier, cell, 2)
    tier.capture(cell)
    waiting = threading.Thread(target=write, args=(tier, cell, 3))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    tier.release([first.offset])
    tier.end_commit()
    waiting.join(5)
    assert not waiting.is_alive()
    assert read(tier, cell) == bytes([3]) * cell.num_bytes
    tier.check_books()


def test_a_commit_that_fails_ends_the_waiting():
    tier, _ = tier_with(1)
    cell = cells_of(SIZES)[1]
    write(tier, cell, 1)
    tier.capture(cell)
    tier.begin_commit()
    failures = []

    def attempt():
        try:
            write(tier, cell, 2)
        except StorageFullError as error:
            failures.append(error)

    waiting = threading.Thread(target=attempt)
    waiting.start()
    tier.end_commit()
    waiting.join(5)
    assert len(failures) == 1


def test_another_process_finds_what_was_placed_and_held():
    tier, inner = tier_with(2)
    cells = cells_of(SIZES)
    for cell in cells:
        write(tier, cell, 5)
    held = [stored for cell in cells for stored in tier.capture(cell)]
    again = VersionedTier(
        inner,
        cells,
        slabs_for(SIZES, 2),
        placed={stored.cell.offset: stored.offset for stored in held},
        held=[stored.offset for stored in held],
    )
    again.check_books()
    write(again, cells[0], 6)
    assert read(again, cells[0]) == bytes([6]) * ALIGNMENT
    assert read(again, cells[1]) == bytes([5]) * 2 * ALIGNMENT
    assert read(inner, held[0].extent) == bytes([5]) * ALIGNMENT


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, len(SIZES) - 1), st.integers(1, 255)),
        st.tuples(st.just("capture"), st.just(0), st.just(0)),
        st.tuples(st.just("release"), st.integers(0, 3), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_every_commit_keeps_what_it_captured(steps):
    commits_kept = 3
    tier, inner = tier_with(1 + commits_kept)
    cells = cells_of(SIZES)
    current: dict[int, int] = {}
    commits: list[tuple[dict[int, int], list]] = []
    for verb, which, value in steps:
        if verb == "write":
            write(tier, cells[which], value)
            current[which] = value
        elif verb == "capture" and len(commits) < commits_kept:
            commits.append((dict(current), list(tier.capture(Extent(0, 7 * ALIGNMENT)))))
        elif verb == "release" and commits:
            _, held = commits.pop(which % len(commits))
            tier.release([stored.offset for stored in held])
        tier.check_books()
        for which_cell, last in current.items():
            assert read(tier, cells[which_cell]) == bytes([last]) * cells[which_cell].num_bytes
        for values, held in commits:
            assert len(held) == len(values)
            for stored in held:
                index = cells.index(stored.cell)
                assert read(inner, stored.extent) == bytes([values[index]]) * stored.cell.num_bytes
