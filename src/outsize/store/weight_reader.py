"""Reads weights from the model's source until an update has stored them, on a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Lock

import torch

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.config import Home
from outsize.model import READ_BUFFERS_BYTES, Source
from outsize.optim import split
from outsize.plan.path import Leg
from outsize.store import memory
from outsize.store.path import Staging
from outsize.store.planes import BlockPlanes, Planes, weight_dtype
from outsize.store.update_job import UpdateJob
from outsize.tier import TaskTransfer, Transfer, Way

SPLIT_ELEMENTS = 1 << 18
"""Elements whose fp32 values are split into weight and remainder at once."""

SPLIT_BYTES = 18
"""Memory that splitting takes, per element."""

SENT_ELEMENTS = 1 << 23
"""Elements that are read at once on their way to a device where they stay."""


class WeightReader:
    """Reads weights from `source`: into host memory, or through it to a device."""

    def __init__(self, planes: Planes, source: Source) -> None:
        self.source: Source | None = source
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="outsize-source")
        self._planes = planes
        self._staging = Staging(planes.staging_buffers)
        self._splitting = Lock()
        self._large_part: tuple[Entry, int, torch.Tensor] | None = None
        """The last part of an entry that is larger than a split, its first element, and its remainders."""
        self._filled: set[tuple[str, int]] = set()
        """Single entries in memory (`Planes.pieces`) that hold their weights."""

    def start_read(self, block: BlockPlanes, plane: torch.Tensor, first: int) -> Transfer:
        """Start reading the entries from element `first` on into a weight `plane` in host memory."""
        return TaskTransfer(self.thread.submit(self._fill, block.record, plane, first))

    def start_send(self, block: BlockPlanes, loading: Transfer | None, first: int) -> Transfer:
        """Start copying the entries from element `first` on to the device.

        If their home is host memory, `loading` reads them into it.
        """
        after = block.weight_slot.after if block.weight_slot is not None else ()
        return TaskTransfer(self.thread.submit(self._send, block, block.weights(), loading, after, first))

    def start_stage(self, job: UpdateJob) -> Transfer:
        """Start reading weights into a staging buffer, for their first update."""
        return TaskTransfer(self.thread.submit(self._stage, job))

    def free_pieces(self, keys: Sequence[tuple[str, int]]) -> None:
        """Free the memory of single entries, when what is being read is read."""
        self.thread.submit(self._free_pieces, keys).result()

    def _free_pieces(self, keys: Sequence[tuple[str, int]]) -> None:
        self._filled.difference_update(keys)
        self._planes.free_pieces(keys)

    def reset(self) -> None:
        """Take all staging buffers back; nothing may be using one."""
        self._staging.reset()

    def read_rows(self, block: BlockPlanes, index: int, rows: torch.Tensor) -> torch.Tensor:
        """Sorted `rows` of entry `index` from the source, in host memory. Raises StorageError."""
        source, dtype = self._open_source(block.record), block.dtypes[Plane.WEIGHT]
        piece = block.record.entries[index].piece
        is_rounded = _is_rounded(source, piece, dtype)
        shape = (rows.numel(), *piece.shape[1:])
        found = torch.empty(shape, dtype=torch.float32 if is_rounded else dtype, device="cpu")
        cuts = [0, *(torch.nonzero(rows.diff() != 1)[:, 0] + 1).tolist(), rows.numel()]
        runs, parts = [], []
        for first, last in pairwise(cuts):
            start = (piece.row_start or 0) + int(rows[first])
            runs.append(Piece(piece.parameter, (last - first, *piece.shape[1:]), start, start + last - first))
            parts.append(found[first:last])
        source.read(Block(block.name, tuple(runs)), parts)
        return split(found.view(-1))[0].view(found.shape) if is_rounded else found

    def _open_source(self, record: Record) -> Source:
        assert self.source is not None, f"{record.name}: the source is gone"
        return self.source

    def _send(
        self,
        block: BlockPlanes,
        place: torch.Tensor,
        loading: Transfer | None,
        after: Sequence[Transfer],
        first: int,
    ) -> None:
        """Copy the entries from element `first` on to the device, through their home in host memory or a staging buffer."""
        start_copy, label = self._planes.device.start_copy, f"{block.name}.weight"
        hosted = block.at_home(Plane.WEIGHT, Home.HOST)
        if hosted is not None:
            assert loading is not None, block.name
            loading.wait()  # a task of this thread, over by now; raises what went wrong
            start_copy(Way.UP, place, hosted, after=after, label=label).wait()
            return
        if block.home(Plane.WEIGHT) is Home.DEVICE:
            self._fill_in_parts(block.record, place, first)
            return
        region = self._staging.take()
        try:
            plane = region.tensor(place.dtype, place.numel())
            self._fill(block.record, plane, first)
            start_copy(Way.UP, place[first:], plane[first:], after=after, label=label).wait()
        finally:
            self._staging.give(region, ())

    def _stage(self, job: UpdateJob) -> None:
        region = self._staging.take()
        job.done = partial(self._staging.give, region)
        record = job.planes.record
        plane, first = region.tensor(weight_dtype(record), record.num_elements), record.shard.start
        job.weight, job.weight_buffer = plane[first:], region.buffer[first * plane.itemsize :]
        self._fill(record, plane, 0)

    def _fill_in_parts(self, record: Record, plane: torch.Tensor, first: int) -> None:
        """Fill a weight plane of a device from element `first` on, through a small part of host memory."""
        source = self._open_source(record)
        for entry in record.entries:
            for piece, at in _parts(source, entry.piece, SENT_ELEMENTS) if entry.start >= first else ():
                scratch = torch.empty(piece.num_elements, dtype=plane.dtype, device="cpu")
                part = replace(entry, piece=piece, start=0, stop=piece.num_elements)
                self._read_entries(record, [part], scratch)
                start = entry.start + at
                plane[start : start + piece.num_elements].copy_(scratch)

    def _fill(self, record: Record, plane: torch.Tensor, first: int) -> None:
        """Fill a weight plane from element `first` on, with entries that are in memory or from the source."""
        pieces, dtype = self._planes.pieces, weight_dtype(record)
        kept = [
            (entry, key, pieces[key].tensor(dtype, entry.piece.num_elements))
            for index, entry in enumerate(record.entries)
            if (key := (record.name, index)) in pieces
        ]
        known = [entry for entry, key, _ in kept if key in self._filled]
        for entry, _, values in kept:
            if entry in known:
                plane[entry.start : entry.stop] = values
        wanted = [entry for entry in record.entries if entry.start >= first and entry not in known]
        self._read_entries(record, wanted, plane)
        for entry, key, values in kept:
            if entry not in known:
                values.copy_(plane[entry.start : entry.stop])
                self._filled.add(key)

    def _read_entries(self, record: Record, entries: Sequence[Entry], plane: torch.Tensor) -> None:
        source = self._open_source(record)
        as_read: list[tuple[Piece, torch.Tensor]] = []
        is_converted = False
        for entry in entries:
            view = plane[entry.start : entry.stop].view(entry.piece.shape)
            is_converted |= source.stored_dtype(entry.piece) is not plane.dtype
            if _is_rounded(source, entry.piece, plane.dtype):
                self._fill_rounded(record, entry.piece, view.view(-1))
            else:
                as_read.append((entry.piece, view))
        pieces = tuple(piece for piece, _ in as_read)
        source.read(Block(record.name, pieces), [view for _, view in as_read])
        if is_converted:
            memory.give_back()  # what casts and conversions took is not needed again soon

    def _fill_rounded(self, record: Record, piece: Piece, weights: torch.Tensor) -> None:
        with self._splitting:
            for part, first in _parts(self._open_source(record), piece, SPLIT_ELEMENTS):
                for start, rounded, _ in self._split(record, part):
                    weights[first + start : first + start + rounded.numel()] = rounded

    def fill_remainder(self, record: Record, start: int, stop: int, remainder: torch.Tensor) -> None:
        """Fill `remainder` with elements `[start, stop)` of the remainder plane of a block that was never stored.

        It is zero, and nothing is read, where the source holds weights in the compute type.
        """
        source, dtype = self._open_source(record), weight_dtype(record)
        remainder.zero_()
        for entry in record.entries:
            first, last = max(entry.start, start), min(entry.stop, stop)
            if entry.trainable and first < last and _is_rounded(source, entry.piece, dtype):
                with self._splitting:
                    part = remainder[first - start : last - start]
                    self._copy_remainder(record, entry, first - entry.start, last - entry.start, part)

    def _copy_remainder(
        self, record: Record, entry: Entry, start: int, stop: int, target: torch.Tensor
    ) -> None:
        """Fill `target` with the remainders of elements `[start, stop)` of `entry`."""
        source = self._open_source(record)
        for piece, at in _parts(source, entry.piece, SPLIT_ELEMENTS, start, stop):
            for first, rest in self._remainders(record, entry, piece, at):
                low, high = max(start, first), min(stop, first + rest.numel())
                if low < high:
                    target[low - start : high - start] = rest[low - first : high - first]
        if stop == entry.piece.num_elements and self._large_part is not None:
            self._large_part = None
            memory.give_back()

    def _remainders(
        self, record: Record, entry: Entry, piece: Piece, at: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The remainders of `piece`, which begins at element `at` of `entry`, each with its first element in the entry.

        Those of a large part are kept for the chunks that follow: it is read once.
        """
        if not _is_large(self._open_source(record), piece):
            for first, _, rest in self._split(record, piece):
                yield at + first, rest
            return
        if self._large_part is None or self._large_part[:2] != (entry, at):
            self._large_part = None
            dtype = self._planes[record.name].dtypes[Plane.REMAINDER]
            values = torch.empty(piece.num_elements, dtype=dtype, device="cpu")
            for first, _, rest in self._split(record, piece):
                values[first : first + rest.numel()] = rest
            self._large_part = entry, at, values
        yield at, self._large_part[2]

    def _split(self, record: Record, piece: Piece) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Read `piece` in fp32; weights and remainders of some of its elements at once, with the first of them.

        The caller holds `_splitting`: what this takes is counted once.
        """
        exact = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
        self._open_source(record).read(Block(record.name, (piece,)), [exact])
        values = exact.view(-1)
        for first in range(0, values.numel(), SPLIT_ELEMENTS):
            yield first, *split(values[first : first + SPLIT_ELEMENTS])


def reading_bytes(source: Source, records: Sequence[Record], link: Sequence[Leg] = ()) -> int:
    """Memory that reading a block from `source` takes beside its target.

    Entries are read one at a time. An entry that has to be rounded is read in fp32 and split; one that crosses a `link`
    passes through host memory. Both happen in parts if the source reads rows by themselves.
    """
    most = 0
    for record in records:
        for entry in record.entries:
            piece, dtype = entry.piece, weight_dtype(record)
            taken = source.conversion_bytes(piece)
            if _is_rounded(source, piece, dtype):
                parts = [part for part, _ in _parts(source, piece, SPLIT_ELEMENTS)]
                part = max(part.num_elements for part in parts)
                taken += 4 * part + SPLIT_BYTES * min(part, SPLIT_ELEMENTS)
                if Plane.REMAINDER in record.state:
                    taken += 2 * max(
                        (each.num_elements for each in parts if _is_large(source, each)), default=0
                    )
            if link:
                most_sent = max(part.num_elements for part, _ in _parts(source, piece, SENT_ELEMENTS))
                taken += most_sent * dtype.itemsize
            most = max(most, taken)
    return READ_BUFFERS_BYTES + most


def _parts(
    source: Source, piece: Piece, num_elements: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Piece, int]]:
    """Parts of `piece`, each with its first element: rows that cover `[start, stop)`, about `num_elements` at once.

    The whole piece if the source does not read rows by themselves.
    """
    row_elements = piece.num_elements // max(piece.shape[0], 1) if piece.shape else 1
    stop = piece.num_elements if stop is None else stop
    if not piece.shape or not row_elements or not source.gives_rows(piece.parameter):
        yield piece, 0
        return
    step, base = max(1, num_elements // row_elements), piece.row_start or 0
    for row in range(start // row_elements, -(-stop // row_elements), step):
        end = min(row + step, -(-stop // row_elements))
        part = Piece(piece.parameter, (end - row, *piece.shape[1:]), base + row, base + end)
        yield part, row * row_elements


def _is_large(source: Source, part: Piece) -> bool:
    """Whether reading `part` again for each chunk of an update would take long: it is no small number of rows."""
    return part.num_elements > SPLIT_ELEMENTS or not source.gives_rows(part.parameter)


def _is_rounded(source: Source, piece: Piece, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are rounded from fp32 values instead of read as the source holds them."""
    return dtype is not torch.float32 and source.stored_dtype(piece) is not dtype
