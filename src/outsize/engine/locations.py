"""Where the pieces of parameters are: in the blocks as they were cut, from the first call on in their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from outsize.block import Piece


@dataclass(frozen=True, slots=True)
class Location:
    """Entry `index` of `block` holds `piece` of a parameter."""

    block: str
    index: int
    piece: Piece

    @property
    def rows(self) -> tuple[int, int] | None:
        """The rows `[start, stop)` of the parameter; None for all of it."""
        return None if self.piece.is_whole else (self.piece.row_start or 0, self.piece.row_stop or 0)


@final
class Locations:
    """The locations of each parameter's pieces, in the order of rows."""

    def __init__(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.locate(pieces)

    def locate(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """From now on the pieces of each block are these, in this order."""
        self._of: dict[str, list[Location]] = {}
        for block, members in pieces.items():
            for index, piece in enumerate(members):
                self._of.setdefault(piece.parameter, []).append(Location(block, index, piece))
        for found in self._of.values():
            found.sort(key=lambda location: location.rows or (0, 0))

    def __getitem__(self, parameter: str) -> Sequence[Location]:
        return self._of[parameter]

    def row_blocks(self, table: str) -> list[tuple[str, int, int]]:
        """`(block, first row, row after the last)` of each block that holds rows of a table, in order."""
        return [(at.block, *(at.rows or (0, at.piece.shape[0]))) for at in self._of[table]]
