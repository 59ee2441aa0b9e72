"""Bringing blocks of a commit into another form: other parameters frozen, or another compute type.

Masters and moments are exact in both forms, so nothing is lost either way; what was frozen has no moments, and begins with
zeros where it trains now. The commit that is read stays as it is: what is written goes to free extents.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.checkpoint.manifest import StoredBlock
from outsize.model import Source
from outsize.optim import CODED_GROUP_BYTES, GROUP, deinterleave, split
from outsize.tier import VersionedTier


class Reader(Protocol):
    """Where blocks are read from, in fp32 and natural order: a commit, or another format."""

    def find(self, piece: Piece) -> tuple[StoredBlock, Entry] | None:
        """Where a piece is; None where it is not."""

    def master(self, block: StoredBlock, entry: Entry) -> torch.Tensor:
        """The fp32 master weights of an entry, `[num_elements]`."""

    def moment(self, block: StoredBlock, entry: Entry, plane: Plane) -> torch.Tensor:
        """A moment of an entry in natural order."""


class _WithBase:
    """A reader that takes from the model's own files what the commit does not store: it was frozen before."""

    def __init__(self, reader: Reader, source: Source | None) -> None:
        self._source = source
        self.find = reader.find
        self.moment = reader.moment
        self._master = reader.master

    def master(self, entry: Entry) -> torch.Tensor:
        """The fp32 master weights of an entry, `[num_elements]`."""
        piece, place = entry.piece, self.find(entry.piece)
        if place is not None:
            return self._master(*place)
        assert self._source is not None, f"nobody has {piece.parameter}"
        exact = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
        self._source.read(Block(piece.parameter, (piece,)), [exact])
        return exact.view(-1)


def convert(
    reader: Reader,
    records: Sequence[Record],
    bases: Mapping[str, int],
    tier: VersionedTier,
    source: Source | None = None,
) -> set[str]:
    """Write `records` to `tier` in their form, and say their names.

    They hold what the commit has of them; what was frozen then and trains now comes from `source`. Memory is that of a
    plane of a block, and an entry.
    """
    values = _WithBase(reader, source)
    for record in records:
        for plane in (Plane.WEIGHT, *(record.state if record.num_trainable else ())):
            _write(values, record, plane, bases[record.name], tier)
    return {record.name for record in records}


def _write(reader: _WithBase, record: Record, plane: Plane, base: int, tier: VersionedTier) -> None:
    """Write one plane, put together in memory."""
    size = record.element_bytes[plane]
    with mmap.mmap(-1, record.plane_bytes(plane)) as memory:
        for entry in record.entries:
            if entry.trainable or (plane is Plane.WEIGHT and not record.is_in_files(entry)):
                _fill(reader, record, entry, plane, memory)
        with memoryview(memory) as view:
            for index, (start, _, extent) in enumerate(record.plane_parts(plane)):
                begin = int(start * size)
                with view[begin : begin + extent.num_bytes] as part:
                    tier.start_write(base + extent.offset, part, f"{record.name}.{plane}[{index}]").wait()


def _fill(reader: _WithBase, record: Record, entry: Entry, plane: Plane, memory: mmap.mmap) -> None:
    is_split = record.element_bytes[Plane.WEIGHT] == 2
    if plane is Plane.WEIGHT:
        master = reader.master(entry)
        values = split(master)[0] if is_split else master
        _tensor(memory, values.dtype, record.num_elements)[entry.start : entry.stop] = values
        return
    if plane is Plane.REMAINDER:
        values = split(reader.master(entry))[1]
        _tensor(memory, torch.int16, record.num_trainable)[entry.start : entry.stop] = values
        return
    block, old = reader.find(entry.piece) or (None, entry)
    if block is None or not old.trainable or plane not in block.record.state:
        return  # zeros, as a mapping begins
    moment = reader.moment(block, old, plane)
    if record.element_bytes[plane] == 4:
        padded = torch.zeros(-(-moment.numel() // GROUP) * GROUP, dtype=torch.float32, device="cpu")
        padded[: moment.numel()] = moment
        stored = deinterleave(padded) if is_split else padded
        _tensor(memory, torch.float32, record.num_trainable)[entry.start : entry.start + padded.numel()] = (
            stored
        )
        return
    if is_split:
        codes = deinterleave(moment[:, :GROUP].reshape(-1)).view(-1, GROUP)
        moment = torch.cat([codes, moment[:, GROUP:]], 1)
    first = entry.start // GROUP * CODED_GROUP_BYTES
    total = record.num_trainable // GROUP * CODED_GROUP_BYTES
    _tensor(memory, torch.uint8, total)[first : first + moment.numel()] = moment.reshape(-1)


def _tensor(memory: mmap.mmap, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=num_elements)
