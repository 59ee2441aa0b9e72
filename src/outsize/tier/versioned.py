"""A tier whose committed bytes are never written over: a map from cells to extents of another tier.

What is stored is addressed as in any tier. The address space is divided into **cells**, each written as a whole
between two captures; a cell lies in one **extent** of the inner tier. `capture` notes where cells lie now, for a commit,
and holds those extents: the next write to such a cell goes to a free extent of the same size, and the held one stays as
it is until every commit that holds it was released. A cell that no commit holds is overwritten in place. So a commit
copies nothing, and without commits nothing is different from the inner tier.

Extents of one size come in **slabs**: there is no fragmentation, and the space for so many commits is there or is not.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from outsize.block import Extent
from outsize.errors import StorageFullError
from outsize.tier.base import DurableTier, Transfer, wait_over
from outsize.tier.digests import Check
from outsize.tier.stats import TierStats
from outsize.tier.together import Together
from outsize.tier.transfer import Listener, Verb, checked_bytes


@dataclass(frozen=True, slots=True)
class Slab:
    """`count` extents of `extent_bytes` each, one after the other from `offset` of the inner tier."""

    offset: int
    extent_bytes: int
    count: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.extent_bytes * self.count

    def extents(self) -> Iterator[int]:
        """Where each extent begins."""
        return iter(range(self.offset, self.stop, self.extent_bytes))


@dataclass(frozen=True, slots=True)
class Stored:
    """A cell of the address space, and the offset of the inner tier where it lay when it was captured."""

    cell: Extent
    offset: int

    @property
    def extent(self) -> Extent:
        """Where its bytes are in the inner tier."""
        return Extent(self.offset, self.cell.num_bytes)


class VersionedTier:
    """`cells`, in order and without gaps between those that are read together, over the extents of `slabs` in `inner`.

    `placed` says where cells lie that an earlier process wrote (offset of the cell: offset in `inner`); `held` lists, once
    per commit, the extents that commits hold. All methods may be called by any thread; transfers that touch the same
    bytes are ordered by the caller, as with any tier.
    """

    def __init__(
        self,
        inner: DurableTier,
        cells: Sequence[Extent],
        slabs: Sequence[Slab],
        *,
        placed: Mapping[int, int] | None = None,
        held: Iterable[int] = (),
    ) -> None:
        self.num_bytes = max((cell.offset + cell.num_bytes for cell in cells), default=0)
        self._inner = inner
        self._cells = sorted(cells, key=lambda cell: cell.offset)
        self._starts = [cell.offset for cell in self._cells]
        self._places = dict(placed or {})
        self._holders = Counter(held)
        self._changed = threading.Condition()
        self._num_pending = 0
        taken = {*self._places.values(), *self._holders}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}
        for slab in slabs:
            for offset in slab.extents():
                self._sizes[offset] = slab.extent_bytes
                if offset not in taken:
                    self._free[slab.extent_bytes].append(offset)
        for free in self._free.values():
            free.reverse()  # the first extents are taken first: neighbours stay neighbours
        assert taken <= self._sizes.keys(), "an extent lies in no slab"

    # -- as any tier ---------------------------------------------------------------------------------------------

    def start_read(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start reading what was last written."""
        view = checked_bytes(Verb.READ, offset, buffer, label, self.num_bytes)
        return self._start(Verb.READ, self._parts(offset, len(view)), view, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """Start writing, to where the cell lies or, where that is held, to a free extent.

        Where there is none, this waits for a commit that is under way to release those it replaces. Raises
        StorageFullError where none is.
        """
        view = checked_bytes(Verb.WRITE, offset, buffer, label, self.num_bytes)
        parts = self._parts(offset, len(view))
        with self._changed:
            for cell, _, _, _ in parts:
                self._make_writable(cell, label)
        return self._start(Verb.WRITE, parts, view, label)

    def stats(self) -> TierStats:
        """The inner tier's figures."""
        return self._inner.stats()

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of what the inner tier moves."""
        self._inner.listen(listener)

    def finish(self) -> None:
        """Wait until nothing of the inner tier is under way."""
        self._inner.finish()

    def close(self) -> None:
        """Close the inner tier."""
        self._inner.close()

    # -- commits -------------------------------------------------------------------------------------------------

    def begin_commit(self) -> None:
        """A commit is under way that waits for no further write, and will `end_commit`: who finds no free extent waits
        for it."""
        with self._changed:
            self._num_pending += 1

    def end_commit(self) -> None:
        """A commit is over, and what it releases was released."""
        with self._changed:
            self._num_pending = max(
                0, self._num_pending - 1
            )  # one whose beginning was interrupted did not count
            self._changed.notify_all()

    def claim(self, extent: Extent, label: str) -> None:
        """Give the cells that `extent` touches their free extents now, for writes that come later.

        A version of a cell must have its place before the next version of any other cell is written: the next one might
        take the last free extent, and wait for a commit that waits for this one.
        """
        with self._changed:
            for cell, _, _, _ in self._parts(extent.offset, extent.num_bytes):
                self._make_writable(cell, label)

    def capture(self, extent: Extent) -> tuple[Stored, ...]:
        """Hold the cells within `extent` that were ever written, as they are now, for a commit."""
        first = bisect_left(self._starts, extent.offset)
        last = bisect_left(self._starts, extent.offset + extent.num_bytes)
        found = []
        with self._changed:
            for cell in self._cells[first:last]:
                if (place := self._places.get(cell.offset)) is not None:
                    found.append(Stored(cell, place))
                    self._holders[place] += 1
        return tuple(found)

    def release(self, offsets: Iterable[int]) -> None:
        """A commit that held these extents is gone for good; what nobody else needs is free."""
        with self._changed:
            current = set(self._places.values())
            for offset in offsets:
                self._holders[offset] -= 1
                assert self._holders[offset] >= 0, f"the extent at {offset} is released more often than held"
                if not self._holders[offset]:
                    del self._holders[offset]
                    if offset not in current:
                        self._free[self._sizes[offset]].append(offset)
            self._changed.notify_all()

    def sync(self) -> None:
        """Make everything durable whose transfer is over."""
        self._inner.sync()

    def checks(self, stored: Stored) -> list[Check]:
        """What is known of a captured cell's bytes, by offsets of the inner tier."""
        return self._inner.checks(stored.extent)

    def check_books(self) -> None:
        """Assert that every extent is free, or the place of one cell, or held: nothing leaks and nothing is owned twice."""
        with self._changed:
            free = [offset for offsets in self._free.values() for offset in offsets]
            current = list(self._places.values())
            assert len(set(free)) == len(free), "an extent is free twice"
            assert len(set(current)) == len(current), "two cells lie in one extent"
            used = {*current, *self._holders}
            assert not used & set(free), "an extent is free and used"
            assert used | set(free) == self._sizes.keys(), "an extent leaked"

    # -- helpers -------------------------------------------------------------------------------------------------

    def _make_writable(self, cell: Extent, label: str) -> None:
        """Give `cell` a place that no commit holds."""
        free = self._free[cell.num_bytes]
        while True:
            place = self._places.get(cell.offset)
            if place is not None and place not in self._holders:
                return
            if free:
                break
            if not self._num_pending:
                raise StorageFullError(
                    f"{label}: no extent of {cell.num_bytes} bytes is free in the store",
                    hint="more commits are kept than the store was laid out for: keep fewer, or open it again",
                )
            self._changed.wait()
        self._places[cell.offset] = free.pop()

    def _parts(self, offset: int, num_bytes: int) -> list[tuple[Extent, int, int, int]]:
        """`(cell, offset in it, begin, end)` of each part of a request, `begin` and `end` in the buffer."""
        parts = []
        index = bisect_right(self._starts, offset) - 1
        done = 0
        while done < num_bytes:
            assert 0 <= index < len(self._cells), f"bytes at {offset + done} are no cell's"
            cell = self._cells[index]
            inside = offset + done - cell.offset
            assert 0 <= inside < cell.num_bytes, f"bytes at {offset + done} are no cell's"
            length = min(cell.num_bytes - inside, num_bytes - done)
            parts.append((cell, inside, done, done + length))
            done += length
            index += 1
        return parts

    def _start(
        self, verb: Verb, parts: Sequence[tuple[Extent, int, int, int]], view: memoryview, label: str
    ) -> Transfer:
        start = self._inner.start_read if verb is Verb.READ else self._inner.start_write
        started: list[Transfer] = []
        try:
            for cell, inside, begin, end in parts:
                assert cell.offset in self._places, f"{label} is read and was never written"
                started.append(start(self._places[cell.offset] + inside, view[begin:end], label))
        except BaseException:
            wait_over(started)  # nothing may still write into the buffer when the caller has it back
            raise
        return started[0] if len(started) == 1 else Together(started)
