"""The address book of a model's blocks: where each plane of each record is.

A plane has one home (`outsize.config.Home`). What does not live where blocks compute passes through slots. `Planes` owns
all memory of a run but that of activation offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

import torch

from outsize.block import CHUNK, Extent, Group, Plane, Record, align
from outsize.config import ComputeType, Home
from outsize.optim import Rule
from outsize.plan import Placement
from outsize.plan.path import Leg, legs
from outsize.plan.place import Buffers
from outsize.store.path import Chunk, Route
from outsize.tier import (
    Device,
    DeviceArena,
    DeviceRegion,
    HostArena,
    Region,
    Slot,
    SlotPool,
    Transfer,
    Way,
)

DTYPES = {ComputeType.FLOAT32: torch.float32, ComputeType.BFLOAT16: torch.bfloat16}


def weight_dtype(record: Record) -> torch.dtype:
    """The type of a record's weights, and of its gradient when its update reads it."""
    return DTYPES[record.compute_type]


def _no_slots() -> dict[Plane, dict[str, Slot]]:
    return {Plane.WEIGHT: {}, Plane.GRADIENT: {}}


@dataclass(eq=False)
class BlockPlanes:
    """Where the planes of one block are; changed by `Planes` alone.

    `dtypes` are the types in which planes are stored, `homes` where they live, by group (`host` is the host's memory, as in
    `Placement`), `regions` the memory of those that live in memory, and `slots` the slots that blocks hold, as in `Planes`.
    """

    record: Record
    disk_offset: int
    dtypes: Mapping[Plane, torch.dtype]
    homes: Mapping[Group, Home]
    host: Home
    slots: Mapping[Plane, Mapping[str, Slot]] = field(default_factory=_no_slots)
    regions: Mapping[Plane, Region | DeviceRegion] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The block's name."""
        return self.record.name

    @property
    def weight_slot(self) -> Slot | None:
        """The slot that holds the weights, if they stream and are in memory."""
        return self.slots[Plane.WEIGHT].get(self.name)

    @property
    def gradient_slot(self) -> Slot | None:
        """The slot that the gradient is summed in, if it has one."""
        return self.slots[Plane.GRADIENT].get(self.name)

    # -- in memory -----------------------------------------------------------------------------------------------

    def weights(self) -> torch.Tensor:
        """The whole weight plane where blocks compute, `[num_elements]`; it must be in a slot or live there."""
        lives_here = self.home(Plane.WEIGHT) is Home.DEVICE
        place = self.weight_slot or (self.regions[Plane.WEIGHT] if lives_here else None)
        assert place is not None, f"the weights of {self.name} are not in memory"
        return place.tensor(self.dtypes[Plane.WEIGHT], self.record.num_elements)

    def pieces(self) -> list[torch.Tensor]:
        """The weights as one view per entry, in the shape of its piece."""
        plane = self.weights()
        return [plane[e.start : e.stop].view(e.piece.shape) for e in self.record.entries]

    def home(self, plane: Plane) -> Home:
        """Where the plane lives."""
        return self.homes[plane.group]

    def at_home(self, plane: Plane, home: Home | None = None) -> torch.Tensor | None:
        """The plane where it lives, if that is memory, and `home` where that is given; else None."""
        region = self.regions.get(plane)
        if region is None or home not in (None, self.home(plane)):
            return None
        num_bytes = self.record.plane_elements(plane) * self.record.element_bytes[plane]
        return region.tensor(self.dtypes[plane], int(num_bytes) // self.dtypes[plane].itemsize)

    def num_bytes_in(self, home: Home) -> int:
        """Bytes of the planes that live in this memory."""
        return sum(region.num_bytes for plane, region in self.regions.items() if self.home(plane) is home)

    # -- on disk -------------------------------------------------------------------------------------------------

    def chunk(self, plane: Plane, start: int, stop: int) -> Chunk:
        """Elements `[start, stop)` of the weights or the gradient on disk; `start` begins a chunk."""
        extent = self._on_disk(self.record.chunk_extent(plane, start, stop))
        return Chunk(start, stop, extent, f"{self.name}.{plane}[{start // CHUNK}]")

    def state_chunk(self, start: int, stop: int) -> Chunk:
        """All state of elements `[start, stop)` on disk, as one run; `start` begins a chunk."""
        extent = self._on_disk(self.record.state_extent(start, stop))
        return Chunk(start, stop, extent, f"{self.name}.state[{start // CHUNK}]")

    def _on_disk(self, extent: Extent) -> Extent:
        return Extent(self.disk_offset + extent.offset, extent.num_bytes)

    @property
    def kept_extent(self) -> Extent:
        """What a commit keeps of the record, on disk."""
        return Extent(self.disk_offset, self.record.kept_bytes)

    # -- moves ---------------------------------------------------------------------------------------------------

    def route(self, plane: Plane, byte_offset: int = 0) -> Route:
        """The shard's weights or gradient between their home and the block's slot, from `byte_offset` of the slot."""
        slot = self.slots[plane].get(self.name)
        assert slot is not None, f"{self.name}.{plane} has no slot"
        place = slot.tensor(self.dtypes[plane], self.record.plane_elements(plane), byte_offset)
        way, home = legs(self.home(plane), Home.DEVICE, self.host), self.at_home(plane, Home.HOST)
        return self._route(plane, way, place, slot.region, home=home, slot=slot, byte_offset=byte_offset)

    def routes_from_memory(self) -> list[Route]:
        """Weights and state that live in memory, to and from their places on disk."""
        routes = []
        for plane in (Plane.WEIGHT, *self.record.state):
            place = self.at_home(plane)
            if place is not None:
                way = legs(Home.DISK, self.home(plane), self.host)
                region = self.regions[plane]
                home = place if isinstance(region, Region) else None
                routes.append(self._route(plane, way, place, region, home=home))
        return routes

    def _route(
        self,
        plane: Plane,
        way: tuple[Leg, ...],
        place: torch.Tensor,
        region: Region | DeviceRegion,
        *,
        home: torch.Tensor | None = None,
        slot: Slot | None = None,
        byte_offset: int = 0,
    ) -> Route:
        # Elements of `place`, which begins with the shard, are bytes where the plane is stored in codes.
        size, label = self.record.element_bytes[plane], f"{self.name}.{plane}"
        base = self.record.shard.start
        chunks = tuple(
            Chunk(
                int((start - base) * size) // place.itemsize,
                int((stop - base) * size) // place.itemsize,
                self._on_disk(extent),
                f"{label}[{start // CHUNK}]",
            )
            for start, stop, extent in self.record.plane_parts(plane)
        )
        buffer = region.buffer if isinstance(region, Region) else None
        return Route(label, way, chunks, place, home, slot, buffer, byte_offset)


class Planes:
    """All planes of all blocks, by block name, and the memory they are in.

    `disk_offsets` says where each record begins on disk; None: those that have planes on disk follow one another.
    """

    def __init__(
        self,
        records: Sequence[Record],
        placement: Placement,
        device: Device,
        rule: Rule | None,
        disk_offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.placement = placement
        self.device = device
        self.arena: HostArena | DeviceArena
        self.link = placement.legs(placement.host)
        """What is between the host's memory and where blocks compute; nothing where the processor computes."""
        self.arena = self.host_arena = HostArena(placement.bytes_in(placement.host), pinner=device)
        if self.link:
            self.arena = DeviceArena(device, placement.bytes_in(Home.DEVICE))
        self._arenas = {Home.DEVICE: self.arena, Home.HOST: self.host_arena}
        self.slots = _no_slots()
        """The slots that blocks hold, by plane and block, in the order in which they were taken."""
        self._blocks: dict[str, BlockPlanes] = {}
        offset = 0
        for record in records:
            place = offset if disk_offsets is None else disk_offsets[record.name]
            dtypes, homes = _stored_dtypes(record, rule), placement.homes_of(record.name)
            block = BlockPlanes(record, place, dtypes, homes, placement.host, self.slots)
            self._blocks[record.name] = block
            if not self._allocate_homes(block):
                offset += record.num_bytes
        self._pools: dict[Group, list[SlotPool]] = {group: [] for group in placement.slots}
        self._add_pools()
        self.chunk_buffers = self._buffers("chunk", placement.chunks)
        self.bounce_buffers = self._buffers("bounce", placement.bounce)
        self.staging_buffers = self._buffers("staging", placement.staging)
        self.pieces: dict[tuple[str, int], Region] = {}
        """Memory of single entries of streamed blocks, by block and index, from which slots are filled."""
        self.pages: Region | DeviceRegion | None = None
        """Memory of the KV pages of the engine that runs, beside the slots; None while no engine has any."""
        self._allocate_pieces()

    def _allocate_homes(self, block: BlockPlanes) -> bool:
        """Allocate the planes that live in memory; whether all do."""
        record = block.record
        planes = [p for p in (Plane.WEIGHT, Plane.GRADIENT, *record.state) if record.plane_elements(p)]
        block.regions = {
            plane: arena.allocate(record.plane_bytes(plane), f"{record.name}.{plane}")
            for plane in planes
            if (arena := self._arenas.get(block.home(plane))) is not None
        }
        return len(block.regions) == len(planes)

    def _add_pools(self) -> None:
        """Allocate the slots of the classes that have none yet."""
        for group, pools in self._pools.items():
            for index, each in list(enumerate(self.placement.slots[group]))[len(pools) :]:
                pools.append(SlotPool(self.arena, f"{group}s{index}", each.slot_bytes, each.count))

    def _buffers(self, name: str, buffers: Buffers) -> list[Region]:
        return [
            self.host_arena.allocate(buffers.each_bytes, f"{name}[{index}]") for index in range(buffers.count)
        ]

    def _allocate_pieces(self) -> None:
        for name, index in sorted(self.placement.pieces - self.pieces.keys()):
            record = self[name].record
            num_bytes = record.entries[index].piece.num_elements * weight_dtype(record).itemsize
            self.pieces[name, index] = self.host_arena.allocate(num_bytes, f"{name}.weight[{index}]")

    def __getitem__(self, block: str) -> BlockPlanes:
        return self._blocks[block]

    def __iter__(self) -> Iterator[BlockPlanes]:
        return iter(self._blocks.values())

    @property
    def slot_high_water(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most weight and gradient slots ever taken, per class."""
        weights, gradients = (tuple(pool.high_water for pool in pools) for pools in self._pools.values())
        return weights, gradients

    # -- slots ---------------------------------------------------------------------------------------------------

    def take_slot(self, block: BlockPlanes, plane: Plane) -> Slot:
        """Take a slot for the weights or the gradient of `block`, until `free_slot`."""
        slot = self.slots[plane][block.name] = self._pool(block, plane).take(block.name)
        return slot

    def free_slot(self, block: BlockPlanes, plane: Plane, after: Sequence[Transfer]) -> None:
        """Give the slot of `block` back, in use until `after` is over."""
        self._pool(block, plane).give(self.slots[plane].pop(block.name), after)

    def _pool(self, block: BlockPlanes, plane: Plane) -> SlotPool:
        index = self.placement.slot_class(block.name, plane.group)
        assert index is not None, f"{block.name} passes through no slot"
        return self._pools[plane.group][index]

    def free_all_slots(self) -> None:
        """Take every slot back, whatever it holds; nothing may move."""
        for slots in self.slots.values():
            slots.clear()
        computed = self.device.mark()  # what was computed with a slot may be under way still
        for pool in chain.from_iterable(self._pools.values()):
            pool.reset((computed,))

    # -- changes of the placement --------------------------------------------------------------------------------

    def updates_in_place(self, block: BlockPlanes) -> bool:
        """Whether the whole block is on a device, which updates it there."""
        return isinstance(block.regions.get(Plane.WEIGHT), DeviceRegion)

    def free_pieces(self, keys: Sequence[tuple[str, int]]) -> None:
        """Free the memory of single entries, which nothing may be using."""
        for key in keys:
            self.pieces.pop(key).free()

    def take_pages(self, num_bytes: int) -> Region | DeviceRegion:
        """Allocate KV pages where blocks compute, in place of those of an earlier engine; they read as zero at first.

        Raises BudgetError, and there are none, if the system cannot provide the memory.
        """
        self.free_pages()
        self.arena.limit_bytes += align(num_bytes)
        try:
            self.pages = self.arena.allocate(num_bytes, "the KV cache")
        except BaseException:
            self.arena.limit_bytes -= align(num_bytes)
            raise
        return self.pages

    def free_pages(self) -> None:
        """Free the KV pages, if there are any: their memory is for calls that do not read them, their contents are lost."""
        pages, self.pages = self.pages, None
        if pages is not None:
            pages.free()
            self.arena.limit_bytes -= pages.num_bytes

    def keep_pieces(self, placement: Placement) -> None:
        """Allocate the single entries of streamed blocks that `placement` has; others must have been freed."""
        self.arena.limit_bytes += placement.pieces_bytes - self.placement.pieces_bytes
        self.placement = placement
        self._allocate_pieces()

    def evict(self, block: BlockPlanes, placement: Placement) -> None:
        """Move a block from the device to host memory, where `placement` has it, and wait until it is there.

        The block must hold no slot, and nothing may move it. Raises BudgetError, having changed nothing, if the system
        cannot provide the memory.
        """
        assert not any(block.name in slots for slots in self.slots.values()), block.name
        limit_bytes = self.host_arena.limit_bytes
        self.host_arena.limit_bytes += block.num_bytes_in(Home.DEVICE)
        moved: dict[Plane, Region] = {}
        try:
            for plane, region in block.regions.items():
                label = f"{block.name}.{plane}"
                moved[plane] = self.host_arena.allocate(region.num_bytes, label)
                self._copy_to_host(block.at_home(plane), moved[plane], label)
        except BaseException:
            for new in moved.values():
                new.free()
            self.host_arena.limit_bytes = limit_bytes
            raise
        for old in block.regions.values():
            old.free()
        block.regions, block.homes = moved, placement.homes_of(block.name)
        self.placement = placement
        self._add_pools()

    def _copy_to_host(self, place: torch.Tensor | None, region: Region, label: str) -> None:
        """Copy a plane of the device to its new home; no view of it outlives this."""
        assert place is not None, label
        home, after = region.tensor(place.dtype, place.numel()), (self.device.mark(),)
        self.device.start_copy(Way.DOWN, home, place, after=after, label=label).wait()

    def free(self) -> None:
        """Give all memory back, whatever goes wrong on the way; nothing may move."""
        self.free_all_slots()
        with ExitStack() as stack:
            stack.callback(self.host_arena.check_books)
            stack.callback(self.arena.check_books)
            buffers = (*self.chunk_buffers, *self.bounce_buffers, *self.staging_buffers)
            for region in (*buffers, *self.pieces.values()):
                stack.callback(region.free)
            stack.callback(self.pieces.clear)
            stack.callback(self.free_pages)
            for pool in chain.from_iterable(self._pools.values()):
                stack.callback(pool.free)
            for block in self:
                for home in block.regions.values():
                    stack.callback(home.free)
                block.regions = {}


def _stored_dtypes(record: Record, rule: Rule | None) -> dict[Plane, torch.dtype]:
    """The types in which the planes of a record are stored; a gradient that is summed over visits stays in fp32."""
    dtypes = {} if rule is None else rule.dtypes(record.compute_type)
    is_summed = record.element_bytes[Plane.GRADIENT] == 4
    gradient = torch.float32 if is_summed else torch.bfloat16
    return {**dtypes, Plane.WEIGHT: weight_dtype(record), Plane.GRADIENT: gradient}
