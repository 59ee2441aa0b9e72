"""The blocks of a model between and during visits: where each plane is, and what is owed to it.

`BlockStore` holds every block's state and carries out the operations of a plan on it. It knows nothing of models or
of autograd: it moves bytes, hands updates to the lane, and keeps the books.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch

from outsize.block import CHUNK, Block, Entry, Extent, Piece, Plane, Record
from outsize.config import ComputeType
from outsize.engine import memory
from outsize.engine.captures import Captures
from outsize.engine.carrier import Carrier, DirectCarrier, Job, Parcel, Part, StagedCarrier, Staging
from outsize.engine.update import CHUNKS_IN_MEMORY, Pending, UpdateJob, UpdateLane, runs
from outsize.model import READ_BUFFERS_BYTES, Source
from outsize.optim import Kernel, Rule, part, split
from outsize.plan import Placement, SlotClass, slot_class_of, sums_in_place
from outsize.tier import (
    Device,
    DeviceArena,
    DeviceRegion,
    DoneTransfer,
    HostArena,
    HostDevice,
    Region,
    Slot,
    SlotPool,
    Tier,
    Transfer,
    VersionedTier,
    Way,
    follow_all,
    wait_all,
)

DTYPES = {ComputeType.FLOAT32: torch.float32, ComputeType.BFLOAT16: torch.bfloat16}


_CHUNKS_ROUNDED = 16
"""Chunks that a device rounds at once, beside the slot."""


@dataclass(slots=True)
class GradientState:
    """What is known of one entry's gradient: whether it exists, its sum of squares, and the factor clipping set."""

    present: bool = False
    sum_of_squares: float = 0.0
    scale: float = 1.0


@dataclass(eq=False)
class BlockState:
    """One block: its record, homes, slots, and what is under way. Changed by `BlockStore` and the optimizer alone.

    `resident`: planes that stay where blocks compute. `hosted`: planes whose home is the memory of a host that does not.
    """

    record: Record
    disk_offset: int
    resident: dict[Plane, Region | DeviceRegion]
    hosted: dict[Plane, Region]
    gradients: list[GradientState]
    is_stored: bool = False
    """Whether an update wrote (or keeps) the weights; until then they come from the source and state is zero."""
    is_loaded: bool = False
    """Whether weights that stay in memory have been read from the source."""
    loading: Transfer | None = None
    """The reading of hosted weights from the source."""
    pending: Pending | None = None
    num_steps: int = 0
    """Updates frozen so far; a backward whose forward saw another number would be wrong."""
    slot: Slot | None = None
    gradient_slot: Slot | None = None
    summed: set[int] = field(default_factory=set)
    """Entries whose sum already holds something; the first addition to the others is a copy."""
    weight_reads: list[Transfer] = field(default_factory=list)
    home_reads: Sequence[Transfer] = ()
    """What last read the weights at home."""
    gradient_transfers: list[Transfer] = field(default_factory=list)
    update: UpdateJob | None = None
    copy: Transfer | None = None
    """The copying of planes that live in memory to the disk, for a commit; before the next update it must be over."""
    copying_at: int | None = None
    """After which update (`num_steps`) such planes were last copied, or are being; None: never, or it failed."""
    copied_at: int | None = None
    """The same of a copy that is over."""

    @property
    def name(self) -> str:
        """The block's name."""
        return self.record.name

    @property
    def has_gradient(self) -> bool:
        """Whether any entry has a gradient."""
        return any(gradient.present for gradient in self.gradients)


class BlockStore:
    """All blocks of a model, with the memory and the disk they live in.

    `bases` says where each record begins on the disk; None: those that live there, one after the other.
    """

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
        device: Device | None = None,
        device_kernel: Callable[[], Kernel] | None = None,
        bases: Mapping[str, int] | None = None,
        update_threads: int | None = None,
    ) -> None:
        self.placement = placement
        self.device = device or HostDevice()
        self._device_kernel = device_kernel or kernel
        self.dtype = DTYPES[compute_type]
        self.source: Source | None = source
        self.disk = disk
        self.versions = disk if isinstance(disk, VersionedTier) else None
        self.plane_dtypes = {Plane.WEIGHT: self.dtype, Plane.GRADIENT: self.dtype}
        if rule is not None:
            self.plane_dtypes |= rule.dtypes(compute_type)
        self.arena: HostArena | DeviceArena
        if self.device.is_host:
            self.arena = self._host = HostArena(placement.arena_bytes)
        else:
            self.arena = DeviceArena(self.device, placement.compute_bytes)
            self._host = HostArena(placement.home_bytes, pinner=self.device)
        self.states: dict[str, BlockState] = {}
        offset = 0
        for record in records:
            planes = [p for p in (Plane.WEIGHT, Plane.GRADIENT, *record.state) if record.plane_elements(p)]
            resident: dict[Plane, Region | DeviceRegion] = {
                plane: self.arena.allocate(record.plane_bytes(plane), f"{record.name}.{plane}")
                for plane in planes
                if placement.is_resident(record.name, plane)
            }
            hosted = {
                plane: self._host.allocate(record.plane_bytes(plane), f"{record.name}.{plane}")
                for plane in planes
                if placement.is_hosted(record.name, plane)
            }
            gradients = [GradientState() for _ in record.entries]
            base = offset if bases is None else bases[record.name]
            self.states[record.name] = BlockState(record, base, resident, hosted, gradients)
            if len(resident) + len(hosted) < len(planes):
                offset += record.num_bytes
        self._weight_pools = self._pools("weights", placement.weight_classes)
        self._gradient_pools = self._pools("gradients", placement.gradient_classes)
        self._chunks = self._buffers("chunk", placement.chunk_buffers, placement.chunk_bytes)
        self._relays = self._buffers("relay", placement.relay_buffers, placement.relay_bytes)
        self._staged = self._buffers("staging", placement.staging_buffers, placement.staging_bytes)
        self._staging = Staging(self._staged)
        self._carrier: Carrier = (
            DirectCarrier(disk) if self.device.is_host else StagedCarrier(self.device, disk, self._relays)
        )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="outsize-source")
        self._norms: list[tuple[GradientState, torch.Tensor]] = []
        self.captures = Captures(self, self.versions, self._carrier) if self.versions is not None else None
        self.lane = (
            UpdateLane(self._chunks, disk, kernel, self.plane_dtypes, update_threads)
            if kernel is not None
            else None
        )

    def _pools(self, name: str, classes: Sequence[SlotClass]) -> list[SlotPool]:
        return [SlotPool(self.arena, f"{name}{i}", c.slot_bytes, c.count) for i, c in enumerate(classes)]

    def _buffers(self, name: str, count: int, num_bytes: int) -> list[Region]:
        return [self._host.allocate(num_bytes, f"{name}[{index}]") for index in range(count)]

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

    def take_rows(self, state: BlockState, index: int, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` with sorted `rows` of entry `index`, of a block that was never stored: from memory, where it stays
        there, else from the source. Raises StorageError."""
        if not rows.numel():
            return
        entry = state.record.entries[index]
        plane = self.resident_plane(state, Plane.WEIGHT)
        if plane is not None:
            follow_all(state.weight_reads)
        elif (plane := self._hosted(state, Plane.WEIGHT)) is not None and state.loading is not None:
            state.loading.wait()
        if plane is not None:
            table = plane[entry.start : entry.stop].view(entry.piece.shape)
            target.copy_(table.index_select(0, rows.to(table.device)))
            return
        assert self.source is not None, f"{state.name}: the source is gone"
        piece, is_rounded = entry.piece, _is_rounded(self.source, entry.piece, self.dtype)
        found = torch.empty(target.shape, dtype=torch.float32 if is_rounded else self.dtype)
        cuts = [0, *(torch.nonzero(rows.diff() != 1)[:, 0] + 1).tolist(), rows.numel()]
        runs, parts = [], []
        for first, last in pairwise(cuts):
            start = (piece.row_start or 0) + int(rows[first])
            shape = (last - first, *piece.shape[1:])
            runs.append(Piece(piece.parameter, shape, start, start + last - first))
            parts.append(found[first:last])
        self.source.read(Block(state.name, tuple(runs)), parts)
        target.copy_(split(found.view(-1))[0].view(found.shape) if is_rounded else found)

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
        value = torch.empty(
            piece.num_elements, dtype=self._gradient_dtype(state), device=self.device.torch_device
        )
        filled = 0
        for values in self.gradient_parts(state, index):
            value[filled : filled + values.numel()] = values
            filled += values.numel()
        return value.view(piece.shape)

    def gradient_parts(self, state: BlockState, index: int) -> Iterator[torch.Tensor]:
        """Entry `index` of the stored gradient, 1-D and cut at chunks; valid until the next part is asked for."""
        record = state.record
        entry, dtype = record.entries[index], self._gradient_dtype(state)
        _finish(state)
        stored = self.resident_plane(state, Plane.GRADIENT)
        if stored is None:
            stored = self._hosted(state, Plane.GRADIENT)
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
        """Claim a slot and start filling it: from its home or, before the first update, from the source.

        Where the host updates weights on their way to a device, the update brings them.
        """
        state.slot = self._pool(self._weight_pools, self.placement.weight_classes, state).take(state.name)
        if state.pending is not None and not self.device.is_host:
            return
        self._fill_weights(state)

    def _fill_weights(self, state: BlockState) -> None:
        if not state.is_stored:
            self._read_source(state)
            return
        ready: tuple[Transfer, ...] = ()
        if state.update is not None and not self.device.is_host:
            if Plane.WEIGHT in state.hosted:
                state.update.wait_applied()
            else:
                ready = (state.update,)
        state.weight_reads = self._carrier.fill(self._parcel(state, Plane.WEIGHT, state.slot), ready)
        state.home_reads = state.weight_reads

    def load_resident(self, state: BlockState) -> None:
        """Start reading weights that stay in memory from the source, once."""
        if state.is_loaded or state.is_stored:
            return
        if Plane.WEIGHT in state.resident:
            state.is_loaded = True
            self._read_source(state)
        elif Plane.WEIGHT in state.hosted:
            self._load_hosted(state)

    def evict(self, state: BlockState, placement: Placement) -> None:
        """Move a block that stays on the device to the host's memory, where `placement` has it, and wait until it is there.

        Not while it is visited. Raises BudgetError, having changed nothing, where the system has no such memory.
        """
        assert not self.device.is_host and state.slot is None and state.gradient_slot is None, state.name
        wait_all((*state.weight_reads, *state.gradient_transfers))
        if state.copy is not None:
            state.copy.wait()
        before = self._host.limit_bytes
        self._host.limit_bytes += sum(region.num_bytes for region in state.resident.values())
        try:
            for plane, region in state.resident.items():
                name = f"{state.name}.{plane}"
                state.hosted[plane] = self._host.allocate(region.num_bytes, name)
                self._copy_home(state, plane)
        except BaseException:
            for home_region in state.hosted.values():
                home_region.free()
            state.hosted.clear()
            self._host.limit_bytes = before
            raise
        for region in state.resident.values():
            region.free()
        state.resident.clear()
        state.weight_reads = []
        state.loading = DoneTransfer() if state.is_loaded else None
        for kind, pools, classes in (
            ("weights", self._weight_pools, placement.weight_classes),
            ("gradients", self._gradient_pools, placement.gradient_classes),
        ):
            for index in range(len(pools), len(classes)):
                own = classes[index]
                pools.append(SlotPool(self.arena, f"{kind}{index}", own.slot_bytes, own.count))
        self.placement = placement

    def _copy_home(self, state: BlockState, plane: Plane) -> None:
        """Copy a plane from the device to the host's memory, both of which have it; no view of it outlives this."""
        home, here = self._hosted(state, plane), self.resident_plane(state, plane)
        assert home is not None and here is not None, f"{state.name}.{plane}"
        after = (self.device.mark(),)
        self.device.start_copy(Way.DOWN, home, here, after=after, label=f"{state.name}.{plane}").wait()

    def updates_in_place(self, state: BlockState) -> bool:
        """Whether the whole block is on a device, which updates it there."""
        return not self.device.is_host and Plane.WEIGHT in state.resident

    def start_update(self, state: BlockState) -> None:
        """Hand the pending update to the update lane, or to the device where the whole block is there."""
        assert self.lane is not None and state.pending is not None, state.name
        self.load_resident(state)
        if self.updates_in_place(state):
            self._update_on_device(state)
            return
        planes = [self.host_plane(state, plane) for plane in state.record.state]
        present_planes = [plane for plane in planes if plane is not None]
        state.update = job = UpdateJob(
            record=state.record,
            pending=state.pending,
            disk_offset=state.disk_offset,
            weight=None,
            weight_buffer=None,
            weight_reads=(),
            state_planes=present_planes if len(present_planes) == len(planes) else None,
            gradient=self.host_plane(state, Plane.GRADIENT),
            is_first=not state.is_stored,
            read_remainder=partial(self._read_remainder, state),
            after=state.update,
            before=() if state.copy is None else (state.copy,),
        )
        if self.device.is_host:
            job.weight, job.weight_reads = self.weights(state), state.weight_reads
            if Plane.WEIGHT not in state.resident and state.slot is not None:
                job.weight_buffer = state.slot.buffer
        else:
            self._bring_weights_to(job, state)
        state.pending = None
        state.is_stored = True
        self.lane.submit(job)

    def _bring_weights_to(self, job: UpdateJob, state: BlockState) -> None:
        """Where `job` finds the weights in the memory of a host that does not compute, and where it sends them."""
        job.send_up = self._sender(state)
        job.before = (*job.before, *state.gradient_transfers, *state.home_reads)
        state.gradient_transfers = []
        job.weight = self._hosted(state, Plane.WEIGHT)
        if job.weight is not None:
            job.weight_reads = [state.loading] if state.loading is not None else []
            if job.state_planes is not None and job.gradient is not None:
                job.chunks_at_once = CHUNKS_IN_MEMORY
        elif state.is_stored:
            job.streams_weight = True
        else:
            job.weight_reads = [Job(self._reader.submit(self._stage, job))]

    def _stage(self, job: UpdateJob) -> None:
        """Read weights that were never stored into staging, for their first update."""
        region = self._staging.take()
        job.done = partial(self._staging.give, region)
        job.weight = region.tensor(self.dtype, job.record.num_elements)
        job.weight_buffer = region.buffer
        self._fill_from_source(job.record, job.weight)

    def _sender(self, state: BlockState) -> Callable[[int, int, torch.Tensor], Transfer]:
        """What copies updated elements `[start, stop)` of the weights to where the block computes."""
        place = self.weights(state)
        # A slot that was held since an earlier visit was computed with after it was taken.
        after = (*(state.slot.after if state.slot is not None else ()), self.device.mark())
        device, label = self.device, f"{state.name}.weight"

        def send_up(start: int, stop: int, source: torch.Tensor) -> Transfer:
            return device.start_copy(Way.UP, place[start:stop], source, after=after, label=label)

        return send_up

    def _update_on_device(self, state: BlockState) -> None:
        """Apply the pending update where all planes are, in the order of computing."""
        assert self._device_kernel is not None and state.pending is not None, state.name
        record, pending = state.record, state.pending
        for read in state.weight_reads:
            read.follow()
        state.weight_reads = []
        if state.copy is not None:
            state.copy.wait()
        planes = [self.resident_plane(state, plane) for plane in record.state]
        gradient = self.resident_plane(state, Plane.GRADIENT)
        is_new = record.num_trainable and not state.is_stored
        remainder = self._read_remainder(state) if is_new else None
        if remainder is not None:
            target = planes[record.state.index(Plane.REMAINDER)]
            assert target is not None
            target.copy_(remainder)
        weights = self.weights(state)
        for first, last, hyper in runs(record, pending, 0, record.num_trainable):
            assert gradient is not None and all(plane is not None for plane in planes), state.name
            own = [part(plane, first, last) for plane in planes if plane is not None]
            rounded = gradient[first:last].to(self.plane_dtypes[Plane.GRADIENT])
            self._device_kernel()(weights[first:last], own, rounded, hyper)
        state.pending = None
        state.is_stored = True

    def wait_weights(self, state: BlockState) -> None:
        """Let computing wait until the weights in memory are current; raise what went wrong."""
        try:
            self.load_resident(state)
            follow_all(state.weight_reads)
            if state.update is not None:
                state.update.follow_applied()
        except Exception as error:  # what was interrupted is noted later
            if self.captures is not None:
                self.captures.failed(state, error)
            raise
        state.weight_reads = []
        if self.captures is not None:
            self.captures.applied(state)

    def free_weights(self, state: BlockState) -> None:
        """Give the weight slot back once nothing is read into or written from it."""
        assert state.slot is not None, f"{state.name} holds no slot"
        try:
            wait_all(state.weight_reads)
            if state.update is not None:
                state.update.wait_slot_free()
        finally:
            pool = self._pool(self._weight_pools, self.placement.weight_classes, state)
            pool.give(state.slot, [self.device.mark()])
            state.slot = None
            state.weight_reads = []

    def claim_gradient(self, state: BlockState) -> None:
        """Claim a slot to sum the block's gradient in."""
        pool = self._pool(self._gradient_pools, self.placement.gradient_classes, state)
        state.gradient_slot = pool.take(state.name)
        for transfer in state.gradient_slot.after:
            transfer.follow()
        state.gradient_slot.after = (self.device.mark(),)  # which comes after all of them: they would add up

    def read_gradient(self, state: BlockState) -> None:
        """Claim a slot and start bringing what was summed so far into it."""
        self.claim_gradient(state)
        assert state.gradient_slot is not None
        if self.resident_plane(state, Plane.GRADIENT) is None:
            offset = self._narrow_offset(state)
            parcel = self._parcel(state, Plane.GRADIENT, state.gradient_slot, offset)
            state.gradient_transfers = self._carrier.fill(parcel, tuple(state.gradient_transfers))

    def wait_gradient(self, state: BlockState) -> None:
        """Wait for `read_gradient`, and widen what was read to the fp32 sum."""
        _follow(state)
        if self._sums_as_stored(state):
            return
        slot = state.gradient_slot
        assert slot is not None
        stored = self.resident_plane(state, Plane.GRADIENT)
        if stored is None:
            # The narrow plane lies at the end of the slot; widening it front to back never overtakes it.
            dtype = self.plane_dtypes[Plane.GRADIENT]
            stored = slot.tensor(dtype, state.record.num_trainable, self._narrow_offset(state))
        total = self._sum(state)
        for start, stop in state.record.chunks():
            total[start:stop] = stored[start:stop].float()

    def begin_sum(self, state: BlockState) -> None:
        """Prepare the sum for a backward visit: apply the factor that clipping left on what is there already."""
        _follow(state)
        state.summed = {index for index, gradient in enumerate(state.gradients) if gradient.present}
        for index in state.summed:
            if state.gradients[index].scale != 1.0:
                self.gradient_sum(state, index).mul_(state.gradients[index].scale)
                if state.gradient_slot is None:  # else what is stored is as it was until the sum is written
                    state.gradients[index].scale = 1.0

    def write_gradient(self, state: BlockState) -> None:
        """Round the sum to the gradient type, take its norm, and start moving it home."""
        total = self._sum(state)
        rounded = total
        resident = self.resident_plane(state, Plane.GRADIENT)
        if not self._sums_as_stored(state):
            dtype = self.plane_dtypes[Plane.GRADIENT]
            rounded = resident if resident is not None else self._narrow_view(state, dtype)
            stride = CHUNK if self.device.is_host else _CHUNKS_ROUNDED * CHUNK
            for start in range(0, state.record.num_trainable, stride):
                stop = min(start + stride, state.record.num_trainable)
                rounded[start:stop] = total[start:stop].to(dtype)
        for index in state.summed:
            entry, gradient = state.record.entries[index], state.gradients[index]
            norm = torch.linalg.vector_norm(
                rounded[entry.start : entry.stop].to(self.dtype), dtype=torch.float32
            )
            gradient.present, gradient.scale = True, 1.0
            self._norms.append((gradient, norm))
        if self.device.is_host:
            self.settle_norms()
        if resident is None and state.gradient_slot is not None:
            parcel = self._parcel(state, Plane.GRADIENT, state.gradient_slot)
            state.gradient_transfers = self._carrier.drain(parcel)

    def settle_norms(self) -> None:
        """Bring the norms of gradients that were written since into the books: on a device, one wait for all."""
        if self._norms:
            norms = torch.stack([norm for _, norm in self._norms]).tolist()
            for (gradient, _), norm in zip(self._norms, norms, strict=True):
                gradient.sum_of_squares = norm**2
            self._norms = []

    def free_gradient(self, state: BlockState) -> None:
        """Give the gradient slot back; whoever claims it next comes after what is written from it and computed before."""
        assert state.gradient_slot is not None, f"{state.name} holds no gradient slot"
        slot, state.gradient_slot = state.gradient_slot, None
        pool = self._pool(self._gradient_pools, self.placement.gradient_classes, state)
        if not self.device.is_host:
            pool.give(slot, slot.after)
            return
        try:
            _finish(state)
        finally:
            pool.give(slot)

    # -- the whole store -----------------------------------------------------------------------------------------

    def import_all(self, reach: Callable[[BlockState], None]) -> None:
        """Bring every block in from a source that should not be read twice, and forget the source.

        `reach` makes a block current in memory (through a plan of one visit).
        """
        for state in self:
            if not state.is_stored:
                state.pending = Pending((None,) * len(state.record.entries))
                reach(state)
        self.source = None

    def flush(self) -> None:
        """Wait until everything that was started is where it belongs; raise what went wrong."""
        for state in self:
            if state.update is not None:
                state.update.wait()
            _finish(state)

    def close(self) -> None:
        """Finish what is under way and give memory and disk back, whatever goes wrong on the way."""
        with ExitStack() as stack:
            stack.callback(self._free_memory)
            stack.callback(close_workers, *self.workers())

    def workers(
        self,
    ) -> tuple[
        UpdateLane | None, ThreadPoolExecutor, ThreadPoolExecutor | None, Carrier, Device, Tier | None
    ]:
        """What must be closed where the store itself is dropped (`close_workers`); it does not hold the store."""
        copier = self.captures.thread if self.captures is not None else None
        return self.lane, self._reader, copier, self._carrier, self.device, self.disk

    def _free_memory(self) -> None:
        for state in self:
            for region in (*state.resident.values(), *state.hosted.values()):
                region.free()
            state.resident.clear()
            state.hosted.clear()
            state.update = None
        for pool in (*self._weight_pools, *self._gradient_pools):
            pool.free()
        for region in (*self._chunks, *self._relays, *self._staged):
            region.free()
        self.arena.check_books()
        self._host.check_books()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _pool(self, pools: Sequence[SlotPool], classes: Sequence[SlotClass], state: BlockState) -> SlotPool:
        index = slot_class_of(classes, state.name)
        assert index is not None, f"{state.name} passes through no slot"
        return pools[index]

    def resident_plane(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        """The plane at home where blocks compute, if it is."""
        return self._plane(state, plane, state.resident.get(plane))

    def _hosted(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        return self._plane(state, plane, state.hosted.get(plane))

    def host_plane(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        """The plane at home in the host's memory, if it is."""
        return self.resident_plane(state, plane) if self.device.is_host else self._hosted(state, plane)

    def _plane(
        self, state: BlockState, plane: Plane, region: Region | DeviceRegion | None
    ) -> torch.Tensor | None:
        if region is None:
            return None
        dtype = self._gradient_dtype(state) if plane is Plane.GRADIENT else self.plane_dtypes[plane]
        num_bytes = state.record.plane_elements(plane) * state.record.element_bytes[plane]
        return region.tensor(dtype, int(num_bytes) // dtype.itemsize)

    def _parcel(self, state: BlockState, plane: Plane, slot: Slot | None, byte_offset: int = 0) -> Parcel:
        """One plane between its home and `slot`, as it is stored."""
        assert slot is not None, f"{state.name}.{plane} has no slot"
        dtype = self._gradient_dtype(state) if plane is Plane.GRADIENT else self.dtype
        place = slot.tensor(dtype, state.record.plane_elements(plane), byte_offset)
        home = self._hosted(state, plane)
        parts = []
        for start, stop, extent in state.record.plane_parts(plane):
            extent = Extent(state.disk_offset + extent.offset, extent.num_bytes)
            parts.append(Part(start, stop, extent))
        return Parcel(f"{state.name}.{plane}", tuple(parts), home, slot, place, byte_offset)

    def _gradient_dtype(self, state: BlockState) -> torch.dtype:
        return torch.float32 if state.record.element_bytes[Plane.GRADIENT] == 4 else torch.bfloat16

    def _sums_as_stored(self, state: BlockState) -> bool:
        return sums_in_place(state.record, gradient_is_resident=True)

    def _narrow_view(self, state: BlockState, dtype: torch.dtype) -> torch.Tensor:
        assert state.gradient_slot is not None
        return state.gradient_slot.tensor(dtype, state.record.num_trainable)

    def _narrow_offset(self, state: BlockState) -> int:
        """Where a stored gradient is put into a gradient slot: at its end, where it has to be widened."""
        if self._sums_as_stored(state):
            return 0
        assert state.gradient_slot is not None
        return state.gradient_slot.num_bytes - state.record.plane_bytes(Plane.GRADIENT)

    def _read_source(self, state: BlockState) -> None:
        """Start bringing weights that were never stored to where the block computes."""
        place = self.weights(state)
        if self.device.is_host:
            state.weight_reads = [Job(self._reader.submit(self._fill_from_source, state.record, place))]
            return
        after = state.slot.after if state.slot is not None else ()
        if Plane.WEIGHT in state.hosted:
            self._load_hosted(state)
        state.weight_reads = [Job(self._reader.submit(self._send_source, state, place, after))]
        state.home_reads = state.weight_reads

    def _load_hosted(self, state: BlockState) -> None:
        plane = self._hosted(state, Plane.WEIGHT)
        if not state.is_loaded and plane is not None:
            state.is_loaded = True
            state.loading = Job(self._reader.submit(self._fill_from_source, state.record, plane))

    def _send_source(self, state: BlockState, place: torch.Tensor, after: Sequence[Transfer]) -> None:
        """Copy weights from the source to the device, by way of their home in the host's memory or of staging."""
        label = f"{state.name}.weight"
        hosted = self._hosted(state, Plane.WEIGHT)
        if hosted is not None:
            assert state.loading is not None, state.name
            state.loading.wait()  # a task of this thread, over by now; raises what went wrong
            self.device.start_copy(Way.UP, place, hosted, after=after, label=label).wait()
            return
        scratch = torch.empty(place.shape, dtype=place.dtype) if Plane.WEIGHT in state.resident else None
        if scratch is not None:
            self._fill_from_source(state.record, scratch)
            place.copy_(scratch)
            return
        region = self._staging.take()
        try:
            plane = region.tensor(place.dtype, place.numel())
            self._fill_from_source(state.record, plane)
            self.device.start_copy(Way.UP, place, plane, after=after, label=label).wait()
        finally:
            self._staging.give(region, ())

    def _fill_from_source(self, record: Record, plane: torch.Tensor) -> None:
        assert self.source is not None, f"{record.name}: the source is gone"
        as_read: list[tuple[Piece, torch.Tensor]] = []
        is_converted = False
        for entry in record.entries:
            view = plane[entry.start : entry.stop].view(entry.piece.shape)
            is_converted |= self.source.stored_dtype(entry.piece) is not self.dtype
            if _is_rounded(self.source, entry.piece, self.dtype):
                view.copy_(self._exact_piece(record, entry)[0].view(entry.piece.shape))
            else:
                as_read.append((entry.piece, view))
        pieces = tuple(piece for piece, _ in as_read)
        self.source.read(Block(record.name, pieces), [view for _, view in as_read])
        if is_converted:
            memory.give_back()  # nobody asks soon for what casts and conversions took

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


def reading_bytes(source: Source, records: Sequence[Record], dtype: torch.dtype) -> int:
    """What reading a block from `source` takes beside where it is read to: one parameter at a time, in fp32 where it has to
    be rounded, and what it is converted from."""
    most = 0
    for record in records:
        for entry in record.entries:
            is_exact = Plane.REMAINDER in record.state or _is_rounded(source, entry.piece, dtype)
            rounding = 8 * entry.piece.num_elements if is_exact else 0
            most = max(most, rounding, source.conversion_bytes(entry.piece))
    return READ_BUFFERS_BYTES + most


def _is_rounded(source: Source, piece: Piece, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are rounded from the fp32 value, and not what the source holds."""
    return dtype is not torch.float32 and source.stored_dtype(piece) is not dtype


def _finish(state: BlockState) -> None:
    """Wait for the gradient's transfers; a failure is raised once."""
    transfers, state.gradient_transfers = state.gradient_transfers, []
    wait_all(transfers)


def _follow(state: BlockState) -> None:
    """Let computing come after the gradient's transfers; a failure is raised once."""
    transfers, state.gradient_transfers = state.gradient_transfers, []
    follow_all(transfers)


def close_workers(
    lane: UpdateLane | None,
    reader: ThreadPoolExecutor,
    copier: ThreadPoolExecutor | None,
    carrier: Carrier,
    device: Device,
    disk: Tier | None,
) -> None:
    """End the threads of a store, those first whose work others finish, and close its disk."""
    if lane is not None:
        lane.close()
    reader.shutdown()
    if copier is not None:
        copier.shutdown()
    carrier.close()
    device.finish()
    if disk is not None:
        disk.close()
