"""Blocks and records: the unit of everything.

A **block** names the parameters (or rows of a parameter) that move together. A **record** is the same block with its
bytes laid out: a few planes, each aligned to 4 KiB, the trainable entries first, so that state and gradients cover a
prefix of the weights. Entries that keep their home in the model's own files come last, and have no place on disk. State
streams in **chunks** of fixed size, interleaved on disk so that one chunk of all state planes is one read:

    | weight ............ | m1[0] m2[0] r[0] | m1[1] m2[1] r[1] | ... | gradient ......... |

Offsets inside a plane never depend on where the plane lives: that is what makes placement invisible to the numbers.

A record may be one rank's **shard** of a block: a range of elements that begins and ends where chunks do. Elements keep
their numbers in the block; the shard's planes and extents hold those of the range and begin at its start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import prod

from outsize.config import ComputeType

ALIGNMENT = 4096
"""Bytes; every plane and every transfer starts and ends on a multiple of it (O_DIRECT)."""

ENTRY_ALIGNMENT = 64
"""Elements; a parameter's first element sits on a cache line in every plane, whatever the type."""

CHUNK = 1 << 20
"""Elements of a plane that are updated, and transferred, at once."""


NORM_ELEMENTS = 1 << 20
"""Elements of a plane whose squares are summed as one; CHUNK is a multiple of it. Norms depend on it, and not on CHUNK."""


def align(value: int | Fraction, alignment: int = ALIGNMENT) -> int:
    """`value` rounded up to a multiple of `alignment`."""
    return -(-value // alignment) * alignment


class Group(StrEnum):
    """The planes of a record that share a home: they stay in one place between visits, and move from there."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    STATE = "state"
    """All planes of optimizer state, the remainder of split weights among them."""
    INPUT = "input"
    """What visits of the block are given; in no record."""


class Plane(StrEnum):
    """One part of a record, or what a visit of the block is given."""

    WEIGHT = "weight"
    REMAINDER = "remainder"
    MOMENT1 = "moment1"
    MOMENT2 = "moment2"
    MOMENT3 = "moment3"
    PREVIOUS = "previous"
    """The gradient of the step before."""
    GRADIENT = "gradient"
    INPUT = "input"
    """Tensors that a forward is given and its backward needs; in no record."""

    @property
    def group(self) -> Group:
        """The group that the plane belongs to."""
        return _GROUP_OF[self]


_GROUP_OF = {
    plane: Group(plane.value) if plane.value in {group.value for group in Group} else Group.STATE
    for plane in Plane
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter, or rows `[row_start, row_stop)` of one, that belongs to a block.

    `parameter` is the parameter's first name in the model; `shape` is the shape of the piece.
    """

    parameter: str
    shape: tuple[int, ...]
    row_start: int | None = None
    row_stop: int | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the piece."""
        return prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the piece is the whole parameter."""
        return self.row_start is None


@dataclass(frozen=True, slots=True)
class Block:
    """An ordered group of pieces that moves as one; `name` is short, such as `L07`, and unique in a model."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def num_elements(self) -> int:
        """Elements of all pieces, without padding."""
        return sum(piece.num_elements for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Entry:
    """A piece with its place: elements `[start, stop)` of every plane of the record."""

    piece: Piece
    start: int
    stop: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a tier; both figures are multiples of 4 KiB."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Record:
    """A block, or a shard of one, with its bytes laid out. Build with `Record.lay_out`.

    `state` lists the state planes in the order in which a chunk interleaves them; `element_bytes` gives the size of an
    element per plane (a fraction for state where groups of `ENTRY_ALIGNMENT` elements share some bytes). `num_elements` and
    `num_trainable` count those of the whole block, padding included, and `num_stored` those that updates and commits store:
    entries behind them are frozen and keep their home in the model's own files. `shard` has the elements whose planes this
    record holds. Offsets of extents are relative to the record; the engine adds the record's base.
    """

    block: Block
    entries: tuple[Entry, ...]
    state: tuple[Plane, ...]
    element_bytes: Mapping[Plane, int | Fraction]
    num_elements: int
    num_trainable: int
    num_stored: int
    shard: range

    @classmethod
    def lay_out(
        cls,
        block: Block,
        trainable: Sequence[bool],
        state: Sequence[Plane],
        element_bytes: Mapping[Plane, int | Fraction],
        in_files: Collection[Piece] = (),
    ) -> Record:
        """Place the block's pieces, trainable ones first, those `in_files` last; `trainable` holds one flag per piece."""
        entries: list[Entry] = []

        def place(pieces: Iterable[tuple[Piece, bool]], start: int) -> int:
            for piece, flag in pieces:
                entries.append(Entry(piece, start, start + piece.num_elements, flag))
                start = align(start + piece.num_elements, ENTRY_ALIGNMENT)
            return start

        pieces = list(zip(block.pieces, trainable, strict=True))
        trained = place((each for each in pieces if each[1]), 0)
        stored = place((each for each in pieces if not each[1] and each[0] not in in_files), trained)
        if len(entries) < len(pieces):
            # The last page that is read from the disk must not reach into what is read from files.
            stored = align(stored, ALIGNMENT // int(element_bytes[Plane.WEIGHT]))
        end = place((each for each in pieces if not each[1] and each[0] in in_files), stored)
        return cls(block, tuple(entries), tuple(state), dict(element_bytes), end, trained, stored, range(end))

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name

    @property
    def compute_type(self) -> ComputeType:
        """The type of its weights, which is fp32 for some blocks of a model in bf16."""
        return ComputeType.FLOAT32 if self.element_bytes[Plane.WEIGHT] == 4 else ComputeType.BFLOAT16

    def plane_range(self, plane: Plane) -> range:
        """The elements of `plane` that the shard holds: of weights any, of the other planes those that train."""
        return _within(self.shard, self.num_elements if plane is Plane.WEIGHT else self.num_trainable)

    def stored_range(self, plane: Plane) -> range:
        """The elements of `plane` that have a place on the shard's disk."""
        return _within(self.shard, self.num_stored if plane is Plane.WEIGHT else self.num_trainable)

    def is_in_files(self, entry: Entry) -> bool:
        """Whether an entry keeps its home in the model's own files, so that nothing ever writes it."""
        return not entry.trainable and entry.start >= self.num_stored

    def plane_elements(self, plane: Plane) -> int:
        """The number of elements of `plane` that the shard holds."""
        return len(self.plane_range(plane))

    def plane_bytes(self, plane: Plane) -> int:
        """Bytes of the shard's part of `plane` when it stands alone, aligned."""
        return align(self.plane_elements(plane) * self.element_bytes[plane])

    def chunks(self, plane: Plane = Plane.GRADIENT) -> Iterator[tuple[int, int]]:
        """Element ranges `[start, stop)` of the chunks that cover what the shard stores of `plane`."""
        held = self.stored_range(plane)
        for start in held[::CHUNK]:
            yield start, min(start + CHUNK, held.stop)

    def chunk_extent(self, plane: Plane, start: int, stop: int) -> Extent:
        """Where elements `[start, stop)` of the weight or gradient plane lie on disk; `start` begins a chunk."""
        assert plane in (Plane.WEIGHT, Plane.GRADIENT) and start % CHUNK == 0, (plane, start)
        size = self.element_bytes[plane]
        base = 0 if plane is Plane.WEIGHT else self.kept_bytes
        return Extent(base + int((start - self.shard.start) * size), align((stop - start) * size))

    def state_extent(self, start: int, stop: int) -> Extent:
        """Where all state planes of the chunk `[start, stop)` lie on disk, as one run."""
        assert start % CHUNK == 0, start
        index = (start - self.shard.start) // CHUNK
        return Extent(self._state_offset + index * self.state_bytes(CHUNK), self.state_bytes(stop - start))

    def state_bytes(self, num_elements: int) -> int:
        """Bytes of one chunk of `num_elements` over all state planes, each part aligned."""
        return sum(align(num_elements * self.element_bytes[plane]) for plane in self.state)

    def plane_parts(self, plane: Plane) -> Iterator[tuple[int, int, Extent]]:
        """`(start, stop, extent)` of each chunk of a plane on disk; of state, beside its neighbours of the other planes."""
        if plane in (Plane.WEIGHT, Plane.GRADIENT):
            for start, stop in self.chunks(plane):
                yield start, stop, self.chunk_extent(plane, start, stop)
            return
        for start, stop in self.chunks():
            place = self.state_extent(start, stop).offset
            for other in self.state[: self.state.index(plane)]:
                place += align((stop - start) * self.element_bytes[other])
            yield start, stop, Extent(place, align((stop - start) * self.element_bytes[plane]))

    def cells(self) -> Iterator[Extent]:
        """What a commit keeps of the record, in the runs that are written as a whole: weights and state, not gradients."""
        for _, _, extent in self.plane_parts(Plane.WEIGHT):
            yield extent
        if self.state:
            for start, stop in self.chunks():
                yield self.state_extent(start, stop)

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of what a commit keeps: all but the gradient, which comes last."""
        full, rest = divmod(self.plane_elements(Plane.GRADIENT), CHUNK)
        return self._state_offset + full * self.state_bytes(CHUNK) + (self.state_bytes(rest) if rest else 0)

    @property
    def gradient_extent(self) -> Extent | None:
        """Where the gradient plane lies on disk; None where nothing trains."""
        size = self.plane_bytes(Plane.GRADIENT)
        return Extent(self.kept_bytes, size) if size else None

    @cached_property
    def group_bytes(self) -> Mapping[Group, int]:
        """Memory of each group of planes; 0 where the record has none."""
        return {
            Group.WEIGHT: self.plane_bytes(Plane.WEIGHT),
            Group.GRADIENT: self.plane_bytes(Plane.GRADIENT),
            Group.STATE: sum(self.plane_bytes(plane) for plane in self.state),
        }

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the whole record on disk."""
        return self.kept_bytes + self.plane_bytes(Plane.GRADIENT)

    @cached_property
    def chunk_bytes(self) -> tuple[int, int, int]:
        """Bytes of the largest chunk on disk of the weights, of the gradient, and of all state planes."""
        weights, trained = (
            min(CHUNK, len(self.stored_range(plane))) for plane in (Plane.WEIGHT, Plane.GRADIENT)
        )
        return (
            align(weights * self.element_bytes[Plane.WEIGHT]),
            align(trained * self.element_bytes[Plane.GRADIENT]),
            self.state_bytes(trained),
        )

    @cached_property
    def _state_offset(self) -> int:
        return align(len(self.stored_range(Plane.WEIGHT)) * self.element_bytes[Plane.WEIGHT])


def _within(shard: range, total: int) -> range:
    return range(min(shard.start, total), min(shard.stop, total))


def shards(record: Record, count: int) -> list[Record]:
    """A whole record cut into `count` shards whose sizes differ by at most a chunk; some may be empty."""
    num_chunks = -(-record.num_elements // CHUNK)
    cuts = [min(CHUNK * (num_chunks * i // count), record.num_elements) for i in range(count + 1)]
    return [replace(record, shard=range(start, stop)) for start, stop in pairwise(cuts)]


def entry_parts(record: Record, entry: Entry, size: int) -> Iterator[tuple[int, int]]:
    """Element ranges of a trainable entry that the shard holds, cut at multiples of `size`."""
    held = record.plane_range(Plane.GRADIENT)
    first, last = max(entry.start, held.start), min(entry.stop, held.stop)
    for start in range(first // size * size, last, size) if first < last else ():
        yield max(start, first), min(start + size, last)
