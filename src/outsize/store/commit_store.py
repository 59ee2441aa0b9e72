"""What the engine needs of a store that keeps commits of records beyond the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from outsize.block import Extent, Group, Piece, Record
from outsize.model import Source
from outsize.plan import IN_MEMORY, Placement
from outsize.tier import VersionedTier


@dataclass(frozen=True, slots=True)
class Layout:
    """The address space of all records, one after the other, in cells; `bases` is where each record begins.

    `scratch` cells hold gradients, which no commit keeps.
    """

    bases: Mapping[str, int]
    kept: tuple[Extent, ...]
    scratch: tuple[Extent, ...]

    @classmethod
    def of(cls, records: Sequence[Record], placement: Placement | None = None) -> Layout:
        """Lay out every record, wherever its planes live, as a commit keeps all of them.

        Without a placement there are no gradients.
        """
        bases: dict[str, int] = {}
        kept: list[Extent] = []
        scratch: list[Extent] = []
        base = 0
        for record in records:
            bases[record.name] = base
            kept += [Extent(base + cell.offset, cell.num_bytes) for cell in record.cells()]
            gradient = record.gradient_extent
            if gradient is not None and not (
                placement is None or placement.home(record.name, Group.GRADIENT) in IN_MEMORY
            ):
                scratch.append(Extent(base + gradient.offset, gradient.num_bytes))
            base += record.num_bytes
        return cls(bases, tuple(kept), tuple(scratch))

    def num_bytes(self, commits: int) -> int:
        """Bytes that the store takes on disk: the working state and `commits` commits."""
        each = sum(cell.num_bytes for cell in self.kept)
        return (1 + commits) * each + sum(cell.num_bytes for cell in self.scratch)


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that was opened; `restored` are the blocks that it holds already."""

    tier: VersionedTier
    restored: frozenset[str]


class CommitStore(Protocol):
    """A store that keeps the last `commits` commits."""

    commits: int

    def holds(self, piece: Piece) -> bool:
        """Whether the commit that was resumed stores `piece`, whose values may then be others than those of the model."""

    def open(
        self,
        records: Sequence[Record],
        layout: Layout,
        source: Source | None,
        *,
        limits: Sequence[int | None],
        verify: bool,
        num_threads: int,
    ) -> Opened:
        """Lay the store out for `records`, and bring what it holds into that layout.

        What the store does not hold of a block that it holds comes from `source`. `limits` are the bytes allowed on each
        disk, None for all; `num_threads` move bytes.
        """

    def is_closing(self) -> None:
        """Finish or give up the commit under way; the disk is about to be closed."""

    def close(self) -> None:
        """Release the store for other processes; the disk is closed. Closing twice is allowed."""
