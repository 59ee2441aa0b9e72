"""The blocks of a model between and during visits: where each plane is, and what is owed to it.

`BlockStore` holds every block's state and carries out the operations of a plan on it. It knows nothing of models or
of autograd: it moves bytes, hands updates to the lane, and keeps the books.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from outsize.block import CHUNK, Block, Entry, Plane, Record
from outsize.config import ComputeType
from outsize.engine import memory
from outsize.engine.update import Pending, UpdateJob, UpdateLane
from outsize.model import Source
from outsize.optim import Kernel, Rule, split
from outsize.plan import Placement, SlotClass, slot_class_of, sums_in_place
from outsize.tier import HostArena, Region, Slot, SlotPool, Tier, Transfer

DTYPES = {ComputeType.FLOAT32: torch.float32, ComputeType.BFLOAT16: torch.bfloat16}


@dataclass(slots=True)
class GradientState:
    """What is known of one entry's gradient: whether it exists, its sum of squares, and the factor clipping set."""

    present: bool = False
    sum_of_squares: float = 0.0
    scale: float = 1.0


@dataclass(eq=False)
class BlockState:
    """One block: its record, homes, slots, and what is under way. Changed by `BlockStore` and the optimizer alone."""

    record: Record
    disk_offset: int
    resident: dict[Plane, Region]
    gradients: list[GradientState]
    is_stored: bool = False
    """Whether an update wrote (or keeps) the weights; until then they come from the source and state is zero."""
    is_loaded: bool = False
    """Whether resident weights have been read from the source."""
    pending: Pending | None = None
    num_steps: int = 0
    """Updates frozen so far; a backward whose forward saw another number would be wrong."""
    slot: Slot | None = None
    gradient_slot: Slot | None = None
    summed: set[int] = field(default_factory=set)
    """Entries whose sum already holds something; the first addition to the others is a copy."""
    weight_reads: list[Transfer] = field(default_factory=list)
    gradient_transfers: list[Transfer] = field(default_factory=list)
    update: UpdateJob | None = None

    @property
    def name(self) -> str:
        """The block's name."""
        return self.record.name

    @property
    def has_gradient(self) -> bool:
        """Whether any entry has a gradient."""
        return any(gradient.present for gradient in self.gradients)


class _Job:
    """A task of a worker thread, as a transfer."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Wait, and raise what the task raised."""
        self._future.result()

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._future.done()


class BlockStore:
    """All blocks of a model, with the memory and the disk they live in."""

    def __init__(
        self,
        records: Sequence[Record],
        placement: Placement,
        *,
        source: Source,
        disk: Tier | None,
        compute_type: ComputeType,
        rule: Rule | None,
        kernel: Callable[[], Kernel] | None,
    ) -> None:
        self.placement = placement
        self.dtype = DTYPES[compute_type]
        self.source: Source | None = source
        self.disk = disk
        self.plane_dtypes = {Plane.WEIGHT: self.dtype, Plane.GRADIENT: self.dtype}
        if rule is not None:
            self.plane_dtypes |= rule.dtypes(compute_type)
        self.arena = HostArena(placement.arena_bytes)
        self.states: dict[str, BlockState] = {}
        offset = 0
        for record in records:
            resident = {
                plane: self.arena.allocate(record.plane_bytes(plane), f"{record.name}.{plane}")
                for plane in (Plane.WEIGHT, Plane.GRADIENT, *record.state)
                if placement.is_resident(record.name, plane) and record.plane_elements(plane)
            }
            gradients = [GradientState() for _ in record.entries]
            self.states[record.name] = BlockState(record, offset, resident, gradients)
            offset += record.num_bytes
        self._weight_pools = self._pools("weights", placement.weight_classes)
        self._gradient_pools = self._pools("gradients", placement.gradient_classes)
        chunks = range(placement.chunk_buffers)
        self._chunks = [self.arena.allocate(placement.chunk_bytes, f"chunk[{i}]") for i in chunks]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="outsize-source")
        self.lane = UpdateLane(self._chunks, disk, kernel, self.plane_dtypes) if kernel is not None else None

    def _pools(self, name: str, classes: Sequence[SlotClass]) -> list[SlotPool]:
        return [SlotPool(self.arena, f"{name}{i}", c.slot_bytes, c.count) for i, c in enumerate(classes)]

    def __getitem__(self, block: str) -> BlockState:
        return self.states[block]

    def __iter__(self) -> Iterator[BlockState]:
        return iter(self.states.values())

    @property
    def records(self) -> Mapping[str, Record]:
        """The records by block name."""
        return {name: state.record for name, state in self.states.items()}

    @property
    def slot_high_water(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most weight and gradient slots ever taken, per class."""
        return (
            tuple(pool.high_water for pool in self._weight_pools),
            tuple(pool.high_water for pool in self._gradient_pools),
        )

    # -- views ---------------------------------------------------------------------------------------------------

    def weights(self, state: BlockState) -> torch.Tensor:
        """The block's weight plane in memory, `[num_elements]` in the compute type; it must be in a slot or resident."""
        home = state.resident.get(Plane.WEIGHT) or state.slot
        assert home is not None, f"the weights of {state.name} are not in memory"
        return home.tensor(self.dtype, state.record.num_elements)

    def pieces(self, state: BlockState) -> list[torch.Tensor]:
        """The weights as one view per entry, in the shape of its piece."""
        plane = self.weights(state)
        return [plane[e.start : e.stop].view(e.piece.shape) for e in state.record.entries]

    def _sum(self, state: BlockState) -> torch.Tensor:
        """The fp32 sum of the block's gradient, `[num_trainable]`."""
        home = state.gradient_slot or state.resident[Plane.GRADIENT]
        return home.tensor(torch.float32, state.record.num_trainable)

    def add_gradient(self, state: BlockState, index: int, gradient: torch.Tensor) -> None:
        """Add `gradient`, in the shape of the piece of entry `index`, to the sum."""
        total = self.gradient_sum(state, index)
        if index in state.summed:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            state.summed.add(index)

    def gradient_sum(self, state: BlockState, index: int) -> torch.Tensor:
        """The sum of entry `index`, in the shape of its piece; holds anything until something was added."""
        entry = state.record.entries[index]
        return self._sum(state)[entry.start : entry.stop].view(entry.piece.shape)

    def gradient_value(self, state: BlockState, index: int) -> torch.Tensor:
        """A copy of entry `index` of the stored gradient, in the shape of its piece."""
        piece = state.record.entries[index].piece
        value = torch.empty(piece.num_elements, dtype=self._gradient_dtype(state))
        filled = 0
        for part in self.gradient_parts(state, index):
            value[filled : filled + part.numel()] = part
            filled += part.numel()
        return value.view(piece.shape)

    def gradient_parts(self, state: BlockState, index: int) -> Iterator[torch.Tensor]:
        """Entry `index` of the stored gradient, 1-D and cut at chunks; valid until the next part is asked for."""
        record = state.record
        entry, dtype = record.entries[index], self._gradient_dtype(state)
        _finish(state)
        stored = self._resident(state, Plane.GRADIENT)
        with mmap.mmap(-1, record.chunk_extent(Plane.GRADIENT, 0, CHUNK).num_bytes) as scratch:
            for start, stop in record.chunks():
                first, last = max(entry.start, start), min(entry.stop, stop)
                if first >= last:
                    continue
                if stored is not None:
                    yield stored[first:last]
                    continue
                assert self.disk is not None, f"{state.name}.gradient has no home on disk"
                extent = record.chunk_extent(Plane.GRADIENT, start, stop)
                label = f"{record.name}.gradient[{start // CHUNK}]"
                buffer = memoryview(scratch)[: extent.num_bytes]
                self.disk.start_read(state.disk_offset + extent.offset, buffer, label).wait()
                size = dtype.itemsize
                inside = bytearray(buffer[(first - start) * size : (last - start) * size])
                buffer.release()
                yield torch.frombuffer(inside, dtype=dtype)

    # -- the operations of a plan --------------------------------------------------------------------------------

    def read_weights(self, state: BlockState) -> None:
        """Claim a slot and start filling it, from the disk or, before the first update, from the source."""
        state.slot = self._pool(self._weight_pools, self.placement.weight_classes, state).take(state.name)
        if state.is_stored:
            state.weight_reads = self._chunk_transfers(state, Plane.WEIGHT, state.slot.buffer, write=False)
        else:
            self._read_source(state)

    def load_resident(self, state: BlockState) -> None:
        """Start reading resident weights from the source, once."""
        if Plane.WEIGHT in state.resident and not state.is_loaded:
            state.is_loaded = True
            self._read_source(state)

    def start_update(self, state: BlockState) -> None:
        """Hand the pending update to the update lane."""
        assert self.lane is not None and state.pending is not None, state.name
        self.load_resident(state)
        streams_weights = Plane.WEIGHT not in state.resident
        planes = [self._resident(state, plane) for plane in state.record.state]
        resident_planes = [plane for plane in planes if plane is not None]
        state.update = UpdateJob(
            record=state.record,
            pending=state.pending,
            disk_offset=state.disk_offset,
            weight=self.weights(state),
            weight_buffer=state.slot.buffer if streams_weights and state.slot is not None else None,
            weight_reads=state.weight_reads,
            state_planes=resident_planes if len(resident_planes) == len(planes) else None,
            gradient=self._resident(state, Plane.GRADIENT),
            is_first=not state.is_stored,
            read_remainder=partial(self._read_remainder, state),
            after=state.update,
        )
        state.pending = None
        state.is_stored = True
        self.lane.submit(state.update)

    def wait_weights(self, state: BlockState) -> None:
        """Wait until the weights in memory are current; raise what went wrong."""
        self.load_resident(state)
        for read in state.weight_reads:
            read.wait()
        if state.update is not None:
            state.update.wait_applied()
        state.weight_reads = []

    def free_weights(self, state: BlockState) -> None:
        """Give the weight slot back once nothing is read into or written from it."""
        assert state.slot is not None, f"{state.name} holds no slot"
        try:
            for read in state.weight_reads:
                read.wait()
            if state.update is not None:
                state.update.wait_weights_written()
        finally:
            self._pool(self._weight_pools, self.placement.weight_classes, state).give(state.slot)
            state.slot = None
            state.weight_reads = []

    def claim_gradient(self, state: BlockState) -> None:
        """Claim a slot to sum the block's gradient in."""
        pool = self._pool(self._gradient_pools, self.placement.gradient_classes, state)
        state.gradient_slot = pool.take(state.name)

    def read_gradient(self, state: BlockState) -> None:
        """Claim a slot and start bringing what was summed so far into it."""
        self.claim_gradient(state)
        assert state.gradient_slot is not None
        if self._resident(state, Plane.GRADIENT) is None:
            stored = state.gradient_slot.buffer[-state.record.plane_bytes(Plane.GRADIENT) :]
            if self._sums_as_stored(state):
                stored = state.gradient_slot.buffer
            state.gradient_transfers = self._chunk_transfers(state, Plane.GRADIENT, stored, write=False)

    def wait_gradient(self, state: BlockState) -> None:
        """Wait for `read_gradient`, and widen what was read to the fp32 sum."""
        _finish(state)
        if self._sums_as_stored(state):
            return
        slot = state.gradient_slot
        assert slot is not None
        stored = self._resident(state, Plane.GRADIENT)
        if stored is None:
            # The narrow plane lies at the end of the slot; widening it front to back never overtakes it.
            offset = slot.num_bytes - state.record.plane_bytes(Plane.GRADIENT)
            stored = slot.tensor(self.plane_dtypes[Plane.GRADIENT], state.record.num_trainable, offset)
        total = self._sum(state)
        for start, stop in state.record.chunks():
            total[start:stop] = stored[start:stop].float()

    def begin_sum(self, state: BlockState) -> None:
        """Prepare the sum for a backward visit: apply the factor that clipping left on what is there already."""
        _finish(state)
        state.summed = {index for index, gradient in enumerate(state.gradients) if gradient.present}
        for index in state.summed:
            if state.gradients[index].scale != 1.0:
                self.gradient_sum(state, index).mul_(state.gradients[index].scale)
                state.gradients[index].scale = 1.0

    def write_gradient(self, state: BlockState) -> None:
        """Round the sum to the gradient type, take its norm, and start moving it home."""
        total = self._sum(state)
        rounded = total
        resident = self._resident(state, Plane.GRADIENT)
        if not self._sums_as_stored(state):
            dtype = self.plane_dtypes[Plane.GRADIENT]
            rounded = resident if resident is not None else self._narrow_view(state, dtype)
            for start, stop in state.record.chunks():
                rounded[start:stop] = total[start:stop].to(dtype)
        for index in state.summed:
            entry, gradient = state.record.entries[index], state.gradients[index]
            norm = torch.linalg.vector_norm(
                rounded[entry.start : entry.stop].to(self.dtype), dtype=torch.float32
            )
            gradient.present, gradient.sum_of_squares, gradient.scale = True, float(norm) ** 2, 1.0
        if resident is None and state.gradient_slot is not None:
            buffer = state.gradient_slot.buffer
            state.gradient_transfers = self._chunk_transfers(state, Plane.GRADIENT, buffer, write=True)

    def free_gradient(self, state: BlockState) -> None:
        """Give the gradient slot back once nothing is written from it."""
        assert state.gradient_slot is not None, f"{state.name} holds no gradient slot"
        try:
            _finish(state)
        finally:
            pool = self._pool(self._gradient_pools, self.placement.gradient_classes, state)
            pool.give(state.gradient_slot)
            state.gradient_slot = None

    # -- the whole store -----------------------------------------------------------------------------------------

    def import_all(self, reach: Callable[[BlockState], None]) -> None:
        """Bring every block in from a source that should not be read twice, and forget the source.

        `reach` makes a block current in memory (through a plan of one visit).
        """
        for state in self:
            state.pending = Pending((None,) * len(state.record.entries))
            reach(state)
        self.source = None

    def flush(self) -> None:
        """Wait until everything that was started is where it belongs; raise what went wrong."""
        for state in self:
            if state.update is not None:
                state.update.wait_written()
            _finish(state)

    def close(self) -> None:
        """Finish what is under way and give memory and disk back, whatever goes wrong on the way."""
        with ExitStack() as stack:
            stack.callback(self._free_memory)
            stack.callback(close_workers, self.lane, self._reader, self.disk)

    def workers(self) -> tuple[UpdateLane | None, ThreadPoolExecutor, Tier | None]:
        """What must be closed where the store itself is dropped (`close_workers`); it does not hold the store."""
        return self.lane, self._reader, self.disk

    def _free_memory(self) -> None:
        for state in self:
            for region in state.resident.values():
                region.free()
            state.resident.clear()
            state.update = None
        for pool in (*self._weight_pools, *self._gradient_pools):
            pool.free()
        for region in self._chunks:
            region.free()
        self.arena.check_books()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _pool(self, pools: Sequence[SlotPool], classes: Sequence[SlotClass], state: BlockState) -> SlotPool:
        index = slot_class_of(classes, state.name)
        assert index is not None, f"{state.name} passes through no slot"
        return pools[index]

    def _resident(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        region = state.resident.get(plane)
        if region is None:
            return None
        dtype = self._gradient_dtype(state) if plane is Plane.GRADIENT else self.plane_dtypes[plane]
        num_bytes = state.record.plane_elements(plane) * state.record.element_bytes[plane]
        return region.tensor(dtype, int(num_bytes) // dtype.itemsize)

    def _gradient_dtype(self, state: BlockState) -> torch.dtype:
        return torch.float32 if state.record.element_bytes[Plane.GRADIENT] == 4 else torch.bfloat16

    def _sums_as_stored(self, state: BlockState) -> bool:
        return sums_in_place(state.record, gradient_is_resident=True)

    def _narrow_view(self, state: BlockState, dtype: torch.dtype) -> torch.Tensor:
        assert state.gradient_slot is not None
        return state.gradient_slot.tensor(dtype, state.record.num_trainable)

    def _chunk_transfers(
        self, state: BlockState, plane: Plane, buffer: memoryview, *, write: bool
    ) -> list[Transfer]:
        """Start moving a whole plane between `buffer` and the disk, chunk by chunk."""
        assert self.disk is not None, f"{state.name}.{plane} has no home on disk"
        record = state.record
        first = record.chunk_extent(plane, 0, min(CHUNK, record.plane_elements(plane))).offset
        start = self.disk.start_write if write else self.disk.start_read
        transfers = []
        for begin, end in record.chunks(plane):
            extent = record.chunk_extent(plane, begin, end)
            part = buffer[extent.offset - first : extent.offset - first + extent.num_bytes]
            label = f"{record.name}.{plane}[{begin // CHUNK}]"
            transfers.append(start(state.disk_offset + extent.offset, part, label))
        return transfers

    def _read_source(self, state: BlockState) -> None:
        state.weight_reads = [_Job(self._reader.submit(self._fill_from_source, state, self.weights(state)))]

    def _fill_from_source(self, state: BlockState, plane: torch.Tensor) -> None:
        assert self.source is not None, f"{state.name}: the source is gone"
        record = state.record
        views = [plane[e.start : e.stop].view(e.piece.shape) for e in record.entries]
        if self.dtype is torch.float32:
            self.source.read(Block(record.name, tuple(e.piece for e in record.entries)), views)
        else:
            for entry, view in zip(record.entries, views, strict=True):
                view.copy_(self._exact_piece(record, entry)[0].view(entry.piece.shape))
        memory.give_back()  # a source is read once: nobody will ask for its copies and conversions again

    def _exact_piece(self, record: Record, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and remainder of one entry's fp32 value in the source."""
        assert self.source is not None, f"{record.name}: the source is gone"
        exact = torch.empty(entry.piece.shape, dtype=torch.float32)
        self.source.read(Block(record.name, (entry.piece,)), [exact])
        return split(exact.view(-1))

    def _read_remainder(self, state: BlockState) -> torch.Tensor | None:
        """The remainder plane of a block that was never stored: what its first update needs beside the weights."""
        record = state.record
        if Plane.REMAINDER not in record.state:
            return None
        remainder = torch.zeros(record.num_trainable, dtype=self.plane_dtypes[Plane.REMAINDER])
        for entry in record.entries:
            if entry.trainable:
                remainder[entry.start : entry.stop] = self._exact_piece(record, entry)[1]
        memory.give_back()
        return remainder


def _finish(state: BlockState) -> None:
    """Wait for the gradient's transfers; a failure is raised once."""
    transfers, state.gradient_transfers = state.gradient_transfers, []
    for transfer in transfers:
        transfer.wait()


def close_workers(lane: UpdateLane | None, reader: ThreadPoolExecutor, disk: Tier | None) -> None:
    """End the threads of a store, those first whose work others finish, and close its disk."""
    if lane is not None:
        lane.close()
    reader.shutdown()
    if disk is not None:
        disk.close()
