"""Where records live that are kept beyond the process: what a session asks of a checkpoint's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from outsize.block import Extent, Plane, Record
from outsize.plan import Placement
from outsize.tier import VersionedTier


@dataclass(frozen=True, slots=True)
class Layout:
    """The address space of all records, one after the other, in cells; `bases` is where each record begins. `scratch`
    cells hold gradients, which no commit keeps."""

    bases: Mapping[str, int]
    kept: tuple[Extent, ...]
    scratch: tuple[Extent, ...]

    @classmethod
    def of(cls, records: Sequence[Record], placement: Placement | None = None) -> Layout:
        """Every record has its place, whatever lives in memory: a commit keeps all of them. Without a placement there are
        no gradients."""
        bases: dict[str, int] = {}
        kept: list[Extent] = []
        scratch: list[Extent] = []
        base = 0
        for record in records:
            bases[record.name] = base
            kept += [Extent(base + cell.offset, cell.num_bytes) for cell in record.cells()]
            gradient = record.gradient_extent
            if gradient is not None and not (
                placement is None
                or placement.is_resident(record.name, Plane.GRADIENT)
                or placement.is_hosted(record.name, Plane.GRADIENT)
            ):
                scratch.append(Extent(base + gradient.offset, gradient.num_bytes))
            base += record.num_bytes
        return cls(bases, tuple(kept), tuple(scratch))

    def num_bytes(self, commits: int) -> int:
        """What the store takes on disk: what is being worked on, and so many commits."""
        each = sum(cell.num_bytes for cell in self.kept)
        return (1 + commits) * each + sum(cell.num_bytes for cell in self.scratch)


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is open for these records; `restored` are blocks that it holds already."""

    tier: VersionedTier
    restored: frozenset[str]


class CommitStore(Protocol):
    """A store that keeps commits; `commits` is how many."""

    commits: int

    def open(
        self,
        records: Sequence[Record],
        layout: Layout,
        *,
        limits: Sequence[int | None],
        verify: bool,
        num_threads: int,
    ) -> Opened:
        """Lay the store out for `records` and bring what it holds into that form.

        `limits` are bytes of each disk that was named, None where it may be filled; `num_threads` move bytes.
        """

    def is_closing(self) -> None:
        """The session is about to close the disk: what is being committed is over first, or given up."""

    def close(self) -> None:
        """The disk is closed; another process may have the store. Closing twice is allowed."""
