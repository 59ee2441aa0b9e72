"""Where weights come from until an update stored them: the source of the model, read by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.engine import memory
from outsize.engine.carrier import Job, Staging
from outsize.engine.state import BlockState, weight_dtype
from outsize.engine.update import UpdateJob
from outsize.model import READ_BUFFERS_BYTES, Source
from outsize.optim import split
from outsize.tier import Transfer, Way, follow_all, sent

if TYPE_CHECKING:
    from outsize.engine.blocks import BlockStore


class Origin:
    """Brings weights of `store` from `source`: to a device by way of their home in the host's memory, or of `staging`."""

    def __init__(self, store: BlockStore, source: Source, staging: Staging) -> None:
        self._store = store
        self.source: Source | None = source
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="outsize-source")
        self._staging = staging

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
            state.is_loaded = True
            state.loading = Job(self.reader.submit(self._fill, state.record, plane))

    def _send(self, state: BlockState, place: torch.Tensor, after: Sequence[Transfer]) -> None:
        """Copy weights from the source to the device, by way of their home in the host's memory or of staging."""
        label = f"{state.name}.weight"
        hosted = self._store.hosted_plane(state, Plane.WEIGHT)
        if hosted is not None:
            assert state.loading is not None, state.name
            state.loading.wait()  # a task of this thread, over by now; raises what went wrong
            self._store.device.start_copy(Way.UP, place, hosted, after=after, label=label).wait()
            return
        scratch = (
            torch.empty(place.shape, dtype=place.dtype, device="cpu")
            if Plane.WEIGHT in state.resident
            else None
        )
        if scratch is not None:
            self._fill(state.record, scratch)
            place.copy_(scratch)
            return
        region = self._staging.take()
        try:
            plane = region.tensor(place.dtype, place.numel())
            self._fill(state.record, plane)
            self._store.device.start_copy(Way.UP, place, plane, after=after, label=label).wait()
        finally:
            self._staging.give(region, ())

    def _fill(self, record: Record, plane: torch.Tensor) -> None:
        assert self.source is not None, f"{record.name}: the source is gone"
        as_read: list[tuple[Piece, torch.Tensor]] = []
        is_converted = False
        for entry in record.entries:
            view = plane[entry.start : entry.stop].view(entry.piece.shape)
            is_converted |= self.source.stored_dtype(entry.piece) is not plane.dtype
            if _is_rounded(self.source, entry.piece, plane.dtype):
                view.copy_(self._exact(record, entry)[0].view(entry.piece.shape))
            else:
                as_read.append((entry.piece, view))
        pieces = tuple(piece for piece, _ in as_read)
        self.source.read(Block(record.name, pieces), [view for _, view in as_read])
        if is_converted:
            memory.give_back()  # nobody asks soon for what casts and conversions took

    def _exact(self, record: Record, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and remainder of one entry's fp32 value in the source."""
        assert self.source is not None, f"{record.name}: the source is gone"
        exact = torch.empty(entry.piece.shape, dtype=torch.float32, device="cpu")
        self.source.read(Block(record.name, (entry.piece,)), [exact])
        return split(exact.view(-1))

    def remainder(self, state: BlockState) -> torch.Tensor | None:
        """The remainder plane of a block that was never stored: what its first update needs beside the weights."""
        record = state.record
        if Plane.REMAINDER not in record.state:
            return None
        remainder = torch.zeros(
            record.num_trainable, dtype=self._store.plane_dtype(record, Plane.REMAINDER), device="cpu"
        )
        for entry in record.entries:
            if entry.trainable:
                remainder[entry.start : entry.stop] = self._exact(record, entry)[1]
        memory.give_back()
        return remainder

    def stage(self, job: UpdateJob) -> None:
        """Read weights that were never stored into staging, for their first update."""
        region = self._staging.take()
        job.done = partial(self._staging.give, region)
        dtype = self._store.plane_dtype(job.record, Plane.WEIGHT)
        job.weight = region.tensor(dtype, job.record.num_elements)
        job.weight_buffer = region.buffer
        self._fill(job.record, job.weight)


def reading_bytes(source: Source, records: Sequence[Record]) -> int:
    """What reading a block from `source` takes beside where it is read to: one parameter at a time, in fp32 where it has to
    be rounded, and what it is converted from."""
    most = 0
    for record in records:
        for entry in record.entries:
            is_exact = Plane.REMAINDER in record.state or _is_rounded(
                source, entry.piece, weight_dtype(record)
            )
            rounding = 8 * entry.piece.num_elements if is_exact else 0
            most = max(most, rounding, source.conversion_bytes(entry.piece))
    return READ_BUFFERS_BYTES + most


def _is_rounded(source: Source, piece: Piece, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are rounded from the fp32 value, and not what the source holds."""
    return dtype is not torch.float32 and source.stored_dtype(piece) is not dtype
