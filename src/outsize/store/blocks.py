"""The blocks of a model between and during visits: where each plane is, and what is owed to it.

`BlockStore` holds every block's state and carries out the operations of a plan on it. It knows nothing of models or
of autograd: it moves bytes, hands updates to the lane, and keeps the books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from outsize.block import Extent, Plane, Record
from outsize.config import ComputeType
from outsize.errors import StateLostError, in_short
from outsize.model import Source
from outsize.optim import Kernel, Rule, part
from outsize.plan import Placement, SlotClass, slot_class_of
from outsize.store.gradients import Gradients
from outsize.store.path import Carrier, DirectCarrier, Job, Parcel, Part, StagedCarrier, Staging
from outsize.store.snapshots import Snapshots
from outsize.store.state import BlockState, GradientState, weight_dtype
from outsize.store.updates import CHUNKS_IN_MEMORY, OptimizerWorker, Pending, UpdateJob, runs
from outsize.store.weight_reader import WeightReader
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
        rule: Rule | None,
        kernel: Callable[[ComputeType], Kernel] | None,
        device: Device | None = None,
        device_kernel: Callable[[ComputeType], Kernel] | None = None,
        bases: Mapping[str, int] | None = None,
        update_threads: int | None = None,
    ) -> None:
        self.placement = placement
        self.device = device or HostDevice()
        self._device_kernel = device_kernel or kernel
        self._rule = rule
        self.disk = disk
        self.versions = disk if isinstance(disk, VersionedTier) else None
        self.arena: HostArena | DeviceArena
        if self.device.is_host:
            self.arena = self._host = HostArena(placement.arena_bytes)
        else:
            self.arena = DeviceArena(self.device, placement.compute_bytes)
            self._host = HostArena(placement.home_bytes, pinner=self.device)
        self.states: dict[str, BlockState] = {}
        self._lost: tuple[str, BaseException | None] | None = None
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
        self._kept_pieces: dict[tuple[str, int], Region] = {}
        self._weight_pools = self._pools("weights", placement.weight_classes)
        self._gradient_pools = self._pools("gradients", placement.gradient_classes)
        self._chunks = self._buffers("chunk", placement.chunk_buffers, placement.chunk_bytes)
        self._relays = self._buffers("relay", placement.relay_buffers, placement.relay_bytes)
        self._staged = self._buffers("staging", placement.staging_buffers, placement.staging_bytes)
        self.weight_reader = WeightReader(self, source, Staging(self._staged))
        self._keep_pieces()
        self.carrier: Carrier = (
            DirectCarrier(disk) if self.device.is_host else StagedCarrier(self.device, disk, self._relays)
        )
        self.gradients = Gradients(self)
        self.snapshots = Snapshots(self, self.versions, self.carrier) if self.versions is not None else None
        self.worker = (
            OptimizerWorker(self._chunks, disk, kernel, rule, update_threads)
            if kernel is not None and rule is not None
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
    def host_arena(self) -> HostArena:
        """The host's memory that is taken: everything where blocks compute there, else homes and buffers."""
        return self._host

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

    def plane_dtype(self, record: Record, plane: Plane) -> torch.dtype:
        """The type of a plane of a record, whatever a gradient is stored in."""
        if plane in (Plane.WEIGHT, Plane.GRADIENT):
            return weight_dtype(record)
        assert self._rule is not None, f"{record.name}.{plane}"
        return self._rule.dtypes(record.compute_type)[plane]

    # -- views ---------------------------------------------------------------------------------------------------

    def weights(self, state: BlockState) -> torch.Tensor:
        """The block's weight plane in memory, `[num_elements]` in its compute type; it must be in a slot or resident."""
        home = state.resident.get(Plane.WEIGHT) or state.slot
        assert home is not None, f"the weights of {state.name} are not in memory"
        return home.tensor(weight_dtype(state.record), state.record.num_elements)

    def pieces(self, state: BlockState) -> list[torch.Tensor]:
        """The weights as one view per entry, in the shape of its piece."""
        plane = self.weights(state)
        return [plane[e.start : e.stop].view(e.piece.shape) for e in state.record.entries]

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
            self.weight_reader.read(state)
            return
        ready: tuple[Transfer, ...] = ()
        if state.update is not None and not self.device.is_host:
            if Plane.WEIGHT in state.hosted:
                state.update.wait_applied()
            else:
                ready = (state.update,)
        state.weight_reads = self.carrier.fill(self.parcel(state, Plane.WEIGHT, state.slot), ready)
        state.home_reads = state.weight_reads

    def load_resident(self, state: BlockState) -> None:
        """Start reading weights that stay in memory from the source, once."""
        if state.is_loaded or state.is_stored:
            return
        if Plane.WEIGHT in state.resident:
            self.weight_reader.read(state)
            state.is_loaded = True
        elif Plane.WEIGHT in state.hosted:
            self.weight_reader.load_hosted(state)

    def keep_pieces(self, placement: Placement) -> None:
        """Keep those single entries of streamed blocks in memory that `placement` has, and no others."""
        dropped = sorted(self._kept_pieces.keys() - placement.pieces)
        if dropped:
            self.weight_reader.drop_pieces(dropped)
            for key in dropped:
                self._kept_pieces.pop(key).free()
        self.arena.limit_bytes += placement.pieces_bytes - self.placement.pieces_bytes
        self.placement = placement
        self._keep_pieces()

    def _keep_pieces(self) -> None:
        for name, index in sorted(self.placement.pieces - self._kept_pieces.keys()):
            record = self.states[name].record
            count, dtype = record.entries[index].piece.num_elements, weight_dtype(record)
            region = self._host.allocate(count * dtype.itemsize, f"{name}.weight[{index}]")
            self._kept_pieces[name, index] = region
            self.weight_reader.keep_piece(name, index, region.tensor(dtype, count))

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
        home, here = self.hosted_plane(state, plane), self.resident_plane(state, plane)
        assert home is not None and here is not None, f"{state.name}.{plane}"
        after = (self.device.mark(),)
        self.device.start_copy(Way.DOWN, home, here, after=after, label=f"{state.name}.{plane}").wait()

    def updates_in_place(self, state: BlockState) -> bool:
        """Whether the whole block is on a device, which updates it there."""
        return not self.device.is_host and Plane.WEIGHT in state.resident

    def start_update(self, state: BlockState) -> None:
        """Hand the pending update to the update lane, or to the device where the whole block is there."""
        assert self.worker is not None and state.pending is not None, state.name
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
            fill_remainder=self.weight_reader.fill_remainder,
            after=state.update,
            before=() if state.copy is None else (state.copy,),
        )
        if self.device.is_host:
            job.weight, job.weight_reads = self.weights(state), state.weight_reads
            if Plane.WEIGHT not in state.resident and state.slot is not None:
                job.weight_buffer = state.slot.buffer
        else:
            self._bring_weights_to(job, state)
        # Before this line the update is pending, after it handed over; an exception in between is settled by `recover`.
        self.worker.submit(job)
        state.pending = None
        state.is_stored = True
        if not self.device.is_host:
            state.gradient_transfers, state.is_draining = [], False

    def _bring_weights_to(self, job: UpdateJob, state: BlockState) -> None:
        """Where `job` finds the weights in the memory of a host that does not compute, and where it sends them."""
        job.send_up = self._sender(state)
        job.before = (*job.before, *state.gradient_transfers, *state.home_reads)
        job.weight = self.hosted_plane(state, Plane.WEIGHT)
        if job.weight is not None:
            job.weight_reads = [state.loading] if state.loading is not None else []
            if job.state_planes is not None and job.gradient is not None:
                job.chunks_at_once = CHUNKS_IN_MEMORY
        elif state.is_stored:
            job.streams_weight = True
        else:
            job.weight_reads = [Job(self.weight_reader.reader.submit(self.weight_reader.stage, job))]

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
        state.is_changing = True
        planes = [self.resident_plane(state, plane) for plane in record.state]
        gradient = self.resident_plane(state, Plane.GRADIENT)
        is_new = record.num_trainable and not state.is_stored
        if is_new and Plane.REMAINDER in record.state:
            target = planes[record.state.index(Plane.REMAINDER)]
            assert target is not None
            for start, stop in record.chunks():
                part_of_plane = torch.empty(stop - start, dtype=target.dtype, device="cpu")
                self.weight_reader.fill_remainder(record, start, stop, part_of_plane)
                target[start:stop].copy_(part_of_plane)
        weights = self.weights(state)
        for first, last, hyper in runs(record, pending, 0, record.num_trainable):
            assert gradient is not None and all(plane is not None for plane in planes), state.name
            own = [part(plane, first, last) for plane in planes if plane is not None]
            rounded = gradient[first:last].to(weight_dtype(record))
            self._device_kernel(record.compute_type)(weights[first:last], own, rounded, hyper)
        state.pending = None
        state.is_stored = True
        state.is_changing = False

    def wait_weights(self, state: BlockState) -> None:
        """Let computing wait until the weights in memory are current; raise what went wrong."""
        try:
            self.load_resident(state)
            follow_all(state.weight_reads)
            if state.update is not None:
                state.update.follow_applied()
        except Exception as error:  # what was interrupted is noted later
            if self.snapshots is not None:
                self.snapshots.failed(state, error)
            raise
        state.weight_reads = []
        if self.snapshots is not None:
            self.snapshots.applied(state)

    def free_weights(self, state: BlockState) -> None:
        """Give the weight slot back once nothing is read into or written from it."""
        assert state.slot is not None, f"{state.name} holds no slot"
        wait_all(state.weight_reads)
        if state.update is not None:
            state.update.wait_slot_free()
        slot, state.slot, state.weight_reads = state.slot, None, []
        pool = self._pool(self._weight_pools, self.placement.weight_classes, state)
        pool.give(slot, [self.device.mark()])

    # -- the whole store -----------------------------------------------------------------------------------------

    def import_all(self, reach: Callable[[BlockState], None]) -> None:
        """Bring every block in from a source that should not be read twice, and forget the source.

        `reach` makes a block current in memory (through a plan of one visit).
        """
        for state in self:
            if not state.is_stored:
                state.pending = Pending((None,) * len(state.record.entries))
                reach(state)
        self.weight_reader.source = None

    def flush(self) -> None:
        """Wait until everything that was started is where it belongs; raise what went wrong."""
        for state in self:
            if state.update is not None:
                state.update.wait()
            state.finish_gradient()

    def finish(self) -> None:
        """Wait until nothing moves any more, whether it failed or not: every worker is idle after that."""
        if self.worker is not None:
            self.worker.finish()
        for thread in (
            self.weight_reader.reader,
            self.snapshots.thread if self.snapshots is not None else None,
        ):
            if thread is not None:
                thread.submit(lambda: None).result()
        self.carrier.finish()
        self.device.finish()
        if self.disk is not None:
            self.disk.finish()

    def give_slots_back(self) -> None:
        """Take every slot back, whatever it holds; nothing may move."""
        for state in self:
            state.slot = state.gradient_slot = None
        computed = self.device.mark()  # what was computed with a slot may be under way still
        for pool in (*self._weight_pools, *self._gradient_pools):
            pool.reset((computed,))
        self.weight_reader.give_staging_back()

    def lose(self, state: BlockState, cause: BaseException | None) -> None:
        """The weights and state of a block are lost: from now on `check` says so."""
        if self._lost is None:
            self._lost = state.name, cause
        if self.snapshots is not None:
            self.snapshots.failed(
                state, cause or StateLostError(f"the update of {state.name} stopped half-way")
            )

    @property
    def is_lost(self) -> bool:
        """Whether an update stopped half-way."""
        return self._lost is not None

    def check(self) -> None:
        """Raise StateLostError where an update stopped half-way."""
        if self._lost is not None:
            block, cause = self._lost
            why = "" if cause is None else f" ({in_short(cause)})"
            raise StateLostError(
                f"the update of block {block} stopped half-way{why}: its weights and optimizer state are partly changed",
                hint="close the model, load it again, and resume from the last commit (outsize.checkpoint.resume)",
            ) from cause

    def close(self) -> None:
        """Finish what is under way and give memory and disk back, whatever goes wrong on the way."""
        with ExitStack() as stack:
            stack.callback(self._free_memory)
            stack.callback(close_workers, *self.workers())

    def workers(
        self,
    ) -> tuple[
        OptimizerWorker | None, ThreadPoolExecutor, ThreadPoolExecutor | None, Carrier, Device, Tier | None
    ]:
        """What must be closed where the store itself is dropped (`close_workers`); it does not hold the store."""
        copier = self.snapshots.thread if self.snapshots is not None else None
        return self.worker, self.weight_reader.reader, copier, self.carrier, self.device, self.disk

    def _free_memory(self) -> None:
        """Give all memory back; the workers have ended."""
        self.give_slots_back()
        with ExitStack() as stack:
            stack.callback(self._host.check_books)
            stack.callback(self.arena.check_books)
            for region in (*self._chunks, *self._relays, *self._staged, *self._kept_pieces.values()):
                stack.callback(region.free)
            stack.callback(self.weight_reader.forget_pieces, list(self._kept_pieces))
            for pool in (*self._weight_pools, *self._gradient_pools):
                stack.callback(pool.free)
            for state in self:
                for home in (*state.resident.values(), *state.hosted.values()):
                    stack.callback(home.free)
                state.resident.clear()
                state.hosted.clear()
                state.update = None
            self._kept_pieces.clear()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _pool(self, pools: Sequence[SlotPool], classes: Sequence[SlotClass], state: BlockState) -> SlotPool:
        index = slot_class_of(classes, state.name)
        assert index is not None, f"{state.name} passes through no slot"
        return pools[index]

    def gradient_pool(self, state: BlockState) -> SlotPool:
        """The slots that gradients of the block pass through."""
        return self._pool(self._gradient_pools, self.placement.gradient_classes, state)

    def resident_plane(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        """The plane at home where blocks compute, if it is."""
        return self._plane(state, plane, state.resident.get(plane))

    def hosted_plane(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        """The plane at home in the memory of a host that does not compute, if it is."""
        return self._plane(state, plane, state.hosted.get(plane))

    def host_plane(self, state: BlockState, plane: Plane) -> torch.Tensor | None:
        """The plane at home in the host's memory, if it is."""
        return self.resident_plane(state, plane) if self.device.is_host else self.hosted_plane(state, plane)

    def _plane(
        self, state: BlockState, plane: Plane, region: Region | DeviceRegion | None
    ) -> torch.Tensor | None:
        if region is None:
            return None
        is_gradient = plane is Plane.GRADIENT
        dtype = self.gradient_dtype(state) if is_gradient else self.plane_dtype(state.record, plane)
        num_bytes = state.record.plane_elements(plane) * state.record.element_bytes[plane]
        return region.tensor(dtype, int(num_bytes) // dtype.itemsize)

    def parcel(self, state: BlockState, plane: Plane, slot: Slot | None, byte_offset: int = 0) -> Parcel:
        """One plane between its home and `slot`, as it is stored."""
        assert slot is not None, f"{state.name}.{plane} has no slot"
        dtype = self.gradient_dtype(state) if plane is Plane.GRADIENT else weight_dtype(state.record)
        place = slot.tensor(dtype, state.record.plane_elements(plane), byte_offset)
        home = self.hosted_plane(state, plane)
        parts = []
        for start, stop, extent in state.record.plane_parts(plane):
            extent = Extent(state.disk_offset + extent.offset, extent.num_bytes)
            parts.append(Part(start, stop, extent))
        return Parcel(f"{state.name}.{plane}", tuple(parts), home, slot, place, byte_offset)

    def gradient_dtype(self, state: BlockState) -> torch.dtype:
        """What the block's gradient is stored in."""
        return torch.float32 if state.record.element_bytes[Plane.GRADIENT] == 4 else torch.bfloat16


def close_workers(
    lane: OptimizerWorker | None,
    reader: ThreadPoolExecutor,
    copier: ThreadPoolExecutor | None,
    carrier: Carrier,
    device: Device,
    disk: Tier | None,
) -> None:
    """End the threads of a store, those first whose work others finish, and close its disk, whatever goes wrong."""
    with ExitStack() as stack:
        if disk is not None:
            stack.callback(disk.close)
        stack.callback(device.finish)
        stack.callback(carrier.close)
        if copier is not None:
            stack.callback(copier.shutdown)
        stack.callback(reader.shutdown)
        if lane is not None:
            stack.callback(lane.close)
