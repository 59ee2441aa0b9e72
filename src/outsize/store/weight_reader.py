"""Where weights come from until an update stored them: the source of the model, read by one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING

import torch

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.model import READ_BUFFERS_BYTES, Source
from outsize.optim import split
from outsize.store import memory
from outsize.store.path import Job, Staging
from outsize.store.state import BlockState, weight_dtype
from outsize.store.updates import UpdateJob
from outsize.tier import Transfer, Way, follow_all, sent

if TYPE_CHECKING:
    from outsize.store.blocks import BlockStore


SPLIT_ELEMENTS = 1 << 18
"""Elements whose fp32 values are split into weight and remainder at once."""

SPLIT_BYTES = 18
"""What splitting takes of memory per element."""

SENT_ELEMENTS = 1 << 23
"""Elements that are read at once on their way to a device that keeps them."""


class WeightReader:
    """Brings weights of `store` from `source`: to a device by way of their home in the host's memory, or of `staging`."""

    def __init__(self, store: BlockStore, source: Source, staging: Staging) -> None:
        self._store = store
        self.source: Source | None = source
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="outsize-source")
        self._staging = staging
        self._splitting = Lock()
        self._converted: tuple[Entry, torch.Tensor] | None = None
        """The entry whose chunks are being updated for the first time, and its remainder, where that comes as a whole."""
        self._pieces: dict[tuple[str, int], torch.Tensor] = {}
        self._filled: set[tuple[str, int]] = set()
        """Those of `pieces` that hold their weights."""

    def keep_piece(self, block: str, index: int, memory: torch.Tensor) -> None:
        """Keep an entry of a streamed block in `memory`, 1-D, so that it is read from the source only once more."""
        self._pieces[block, index] = memory

    def drop_pieces(self, keys: Sequence[tuple[str, int]]) -> None:
        """Let go of the memory of single entries, when what is being read is read: it may be freed then."""
        self.reader.submit(self.forget_pieces, keys).result()

    def forget_pieces(self, keys: Sequence[tuple[str, int]]) -> None:
        """The same, where nothing is being read."""
        for key in keys:
            self._pieces.pop(key, None)
            self._filled.discard(key)

    def take_rows(self, state: BlockState, index: int, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` with sorted `rows` of entry `index`, of a block that was never stored: from memory, where it stays
        there, else from the source. Raises StorageError."""
        if not rows.numel():
            return
        entry = state.record.entries[index]
        plane = self._store.resident_plane(state, Plane.WEIGHT)
        if plane is not None:
            follow_all(state.weight_reads)
        elif (
            plane := self._store.hosted_plane(state, Plane.WEIGHT)
        ) is not None and state.loading is not None:
            state.loading.wait()
        if plane is not None:
            table = plane[entry.start : entry.stop].view(entry.piece.shape)
            target.copy_(sent(table.index_select(0, sent(rows, table.device)), target.device))
            return
        assert self.source is not None, f"{state.name}: the source is gone"
        dtype = self._store.plane_dtype(state.record, Plane.WEIGHT)
        piece, is_rounded = entry.piece, _is_rounded(self.source, entry.piece, dtype)
        found = torch.empty(target.shape, dtype=torch.float32 if is_rounded else dtype, device="cpu")
        cuts = [0, *(torch.nonzero(rows.diff() != 1)[:, 0] + 1).tolist(), rows.numel()]
        runs, parts = [], []
        for first, last in pairwise(cuts):
            start = (piece.row_start or 0) + int(rows[first])
            shape = (last - first, *piece.shape[1:])
            runs.append(Piece(piece.parameter, shape, start, start + last - first))
            parts.append(found[first:last])
        self.source.read(Block(state.name, tuple(runs)), parts)
        rounded = split(found.view(-1))[0].view(found.shape) if is_rounded else found
        target.copy_(sent(rounded, target.device))

    def read(self, state: BlockState) -> None:
        """Start bringing weights that were never stored to where the block computes."""
        place = self._store.weights(state)
        if self._store.device.is_host:
            state.weight_reads = [Job(self.reader.submit(self._fill, state.record, place))]
            return
        after = state.slot.after if state.slot is not None else ()
        if Plane.WEIGHT in state.hosted:
            self.load_hosted(state)
        state.weight_reads = [Job(self.reader.submit(self._send, state, place, after))]
        state.home_reads = state.weight_reads

    def load_hosted(self, state: BlockState) -> None:
        """Start reading weights to their home in the memory of a host that does not compute, once."""
        plane = self._store.hosted_plane(state, Plane.WEIGHT)
        if not state.is_loaded and plane is not None:
            state.loading = Job(self.reader.submit(self._fill, state.record, plane))
            state.is_loaded = True

    def _send(self, state: BlockState, place: torch.Tensor, after: Sequence[Transfer]) -> None:
        """Copy weights from the source to the device, by way of their home in the host's memory or of staging."""
        label = f"{state.name}.weight"
        hosted = self._store.hosted_plane(state, Plane.WEIGHT)
        if hosted is not None:
            assert state.loading is not None, state.name
            state.loading.wait()  # a task of this thread, over by now; raises what went wrong
            self._store.device.start_copy(Way.UP, place, hosted, after=after, label=label).wait()
            return
        if Plane.WEIGHT in state.resident:
            self._fill_in_parts(state.record, place)
            return
        region = self._staging.take()
        try:
            plane = region.tensor(place.dtype, place.numel())
            self._fill(state.record, plane)
            self._store.device.start_copy(Way.UP, place, plane, after=after, label=label).wait()
        finally:
            self._staging.give(region, ())

    def _fill_in_parts(self, record: Record, plane: torch.Tensor) -> None:
        """Fill a weight plane of a device, by way of a small part of the host's memory."""
        assert self.source is not None, f"{record.name}: the source is gone"
        for entry in record.entries:
            for piece, first in _parts(self.source, entry.piece, SENT_ELEMENTS):
                scratch = torch.empty(piece.num_elements, dtype=plane.dtype, device="cpu")
                part = replace(entry, piece=piece, start=0, stop=piece.num_elements)
                self._read_entries(record, [part], scratch)
                start = entry.start + first
                plane[start : start + piece.num_elements].copy_(scratch)

    def _fill(self, record: Record, plane: torch.Tensor) -> None:
        """Fill a weight plane: entries that are in memory from there, the others from the source."""
        kept = [
            (entry, (record.name, index))
            for index, entry in enumerate(record.entries)
            if (record.name, index) in self._pieces
        ]
        filled = [(entry, key) for entry, key in kept if key in self._filled]
        for entry, key in filled:
            plane[entry.start : entry.stop] = self._pieces[key]
        known = [entry for entry, _ in filled]
        self._read_entries(record, [entry for entry in record.entries if entry not in known], plane)
        for entry, key in kept:
            if key not in self._filled:
                self._pieces[key].copy_(plane[entry.start : entry.stop])
                self._filled.add(key)

    def _read_entries(self, record: Record, entries: Sequence[Entry], plane: torch.Tensor) -> None:
        assert self.source is not None, f"{record.name}: the source is gone"
        as_read: list[tuple[Piece, torch.Tensor]] = []
        is_converted = False
        for entry in entries:
            view = plane[entry.start : entry.stop].view(entry.piece.shape)
            is_converted |= self.source.stored_dtype(entry.piece) is not plane.dtype
            if _is_rounded(self.source, entry.piece, plane.dtype):
                self._split(record, entry, 0, entry.piece.num_elements, weight=view.view(-1))
            else:
                as_read.append((entry.piece, view))
        pieces = tuple(piece for piece, _ in as_read)
        self.source.read(Block(record.name, pieces), [view for _, view in as_read])
        if is_converted:
            memory.give_back()  # nobody asks soon for what casts and conversions took

    def fill_remainder(self, record: Record, start: int, stop: int, remainder: torch.Tensor) -> None:
        """Fill `remainder` with elements `[start, stop)` of the remainder plane of a block that was never stored.

        It is zero, and nothing is read, where the source holds weights in the compute type.
        """
        assert self.source is not None, f"{record.name}: the source is gone"
        remainder.zero_()
        for entry in record.entries:
            first, last = max(entry.start, start), min(entry.stop, stop)
            if (
                entry.trainable
                and first < last
                and _is_rounded(self.source, entry.piece, weight_dtype(record))
            ):
                part = remainder[first - start : last - start]
                if self.source.gives_rows(entry.piece.parameter):
                    self._split(record, entry, first - entry.start, last - entry.start, remainder=part)
                else:
                    part.copy_(self._whole_remainder(record, entry)[first - entry.start : last - entry.start])
                    if last == entry.stop:
                        self._converted = None
                        memory.give_back()

    def _whole_remainder(self, record: Record, entry: Entry) -> torch.Tensor:
        """The remainder of an entry that the source converts as a whole: once, not for each of its chunks."""
        if self._converted is None or self._converted[0] is not entry:
            dtype = self._store.plane_dtype(record, Plane.REMAINDER)
            rest = torch.empty(entry.piece.num_elements, dtype=dtype, device="cpu")
            self._split(record, entry, 0, rest.numel(), remainder=rest)
            self._converted = entry, rest
        return self._converted[1]

    def _split(
        self,
        record: Record,
        entry: Entry,
        start: int,
        stop: int,
        *,
        weight: torch.Tensor | None = None,
        remainder: torch.Tensor | None = None,
    ) -> None:
        """Split the fp32 values of elements `[start, stop)` of an entry into weights and remainders, part by part."""
        assert self.source is not None, f"{record.name}: the source is gone"
        with self._splitting:  # one at a time: what it takes is counted once
            for piece, first in _parts(self.source, entry.piece, SPLIT_ELEMENTS, start, stop):
                exact = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
                self.source.read(Block(record.name, (piece,)), [exact])
                values = exact.view(-1)
                low, high = max(start, first), min(stop, first + values.numel())
                for at in range(low, high, SPLIT_ELEMENTS):
                    until = min(at + SPLIT_ELEMENTS, high)
                    rounded, rest = split(values[at - first : until - first])
                    if weight is not None:
                        weight[at - start : until - start] = rounded
                    if remainder is not None:
                        remainder[at - start : until - start] = rest
                del exact, values

    def give_staging_back(self) -> None:
        """Take every region of staging back; nothing may use one."""
        self._staging.reset()

    def stage(self, job: UpdateJob) -> None:
        """Read weights that were never stored into staging, for their first update."""
        region = self._staging.take()
        job.done = partial(self._staging.give, region)
        dtype = self._store.plane_dtype(job.record, Plane.WEIGHT)
        job.weight = region.tensor(dtype, job.record.num_elements)
        job.weight_buffer = region.buffer
        self._fill(job.record, job.weight)


def reading_bytes(source: Source, records: Sequence[Record], *, is_host: bool = True) -> int:
    """The memory that reading a block from `source` takes beside its target.

    Entries are read one at a time. One that has to be rounded is read in fp32 and split; one on its way to a device that
    keeps it passes through the host's memory. Both happen in parts where the source gives rows by themselves.
    """
    most = 0
    for record in records:
        for entry in record.entries:
            piece, dtype = entry.piece, weight_dtype(record)
            taken = source.conversion_bytes(piece)
            if _is_rounded(source, piece, dtype):
                part = max(part.num_elements for part, _ in _parts(source, piece, SPLIT_ELEMENTS))
                taken += 4 * part + SPLIT_BYTES * min(part, SPLIT_ELEMENTS)
                if Plane.REMAINDER in record.state and not source.gives_rows(piece.parameter):
                    taken += 2 * piece.num_elements
            if not is_host:
                most_sent = max(part.num_elements for part, _ in _parts(source, piece, SENT_ELEMENTS))
                taken += most_sent * dtype.itemsize
            most = max(most, taken)
    return READ_BUFFERS_BYTES + most


def _parts(
    source: Source, piece: Piece, num_elements: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Piece, int]]:
    """Rows of `piece` that cover its elements `[start, stop)`, about `num_elements` at once, and where each part begins.

    The whole piece where the source gives no rows by themselves.
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


def _is_rounded(source: Source, piece: Piece, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are rounded from the fp32 value, and not what the source holds."""
    return dtype is not torch.float32 and source.stored_dtype(piece) is not dtype
