"""The address book: every byte of a block has one place, in memory or on disk."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from outsize.block import CHUNK, Block, Group, Piece, Plane, Record, align
from outsize.config import ComputeType, Home
from outsize.errors import BudgetError
from outsize.optim import ADAMW, ADAMW8BIT
from outsize.plan import Placement, SlotClass
from outsize.plan.place import GROUPS
from outsize.store.planes import Planes
from outsize.tier import DoneTransfer, HostDevice
from tests.doubles import TwinDevice

BFLOAT16 = ComputeType.BFLOAT16


def record_of(name, sizes, rule=ADAMW, **changed):
    block = Block(name, tuple(Piece(f"{name}.{index}", (size,)) for index, size in enumerate(sizes)))
    element_bytes = rule.element_bytes(BFLOAT16) | changed
    return Record.lay_out(block, [True] * len(sizes), rule.state(BFLOAT16), element_bytes)


def placement_of(records, resident=(), hosted=(), **changed):
    streamed = [r for r in records if r.name not in {*resident, *hosted}]
    in_memory = {
        names: sum(r.plane_bytes(p) for r in records if r.name in names for p in r.element_bytes)
        for names in (tuple(resident), tuple(hosted))
    }

    def classes(num_bytes):
        if not streamed:
            return ()
        return (SlotClass(max(map(num_bytes, streamed)), 1, frozenset(r.name for r in streamed)),)

    placement = Placement(
        homes={
            (r.name, group): Home.DEVICE
            if r.name in resident
            else Home.HOST
            if r.name in hosted
            else Home.DISK
            for r in records
            for group in GROUPS
        },
        slots={
            Group.WEIGHT: classes(lambda r: r.plane_bytes(Plane.WEIGHT)),
            Group.GRADIENT: classes(lambda r: align(4 * r.num_trainable)),
        },
        resident_bytes=in_memory[tuple(resident)],
        hosted_bytes=in_memory[tuple(hosted)] if hosted else 0,
        disk_bytes=sum(r.num_bytes for r in streamed),
    )
    return replace(placement, **changed)


def test_records_with_planes_on_disk_follow_one_another():
    records = [record_of(name, (500,)) for name in ("L00", "L01", "L02")]
    planes = Planes(records, placement_of(records, resident=("L01",)), HostDevice(), ADAMW)
    assert [planes[name].disk_offset for name in ("L00", "L02")] == [0, records[0].num_bytes]
    assert planes["L01"].at_home(Plane.WEIGHT) is not None
    assert planes["L00"].at_home(Plane.WEIGHT) is None
    planes.free()


@pytest.mark.parametrize("rule", [ADAMW, ADAMW8BIT], ids=["fp32", "codes"])
def test_chunks_on_disk_cover_a_plane_once(rule):
    """Whatever a plane is stored in: chunks join without gaps, are named in order, and never overlap."""
    record = record_of("L07", (CHUNK + 100, 64), rule)
    planes = Planes([record], placement_of([record], resident=("L07",)), HostDevice(), rule, {"L07": 8192})
    extents = []
    for route in planes["L07"].routes_from_memory():
        assert route.home is route.place
        assert [chunk.label for chunk in route.chunks] == [f"{route.label}[{i}]" for i in range(2)]
        assert [chunk.start for chunk in route.chunks[1:]] == [chunk.stop for chunk in route.chunks[:-1]]
        assert (route.chunks[0].start, route.chunks[-1].stop) == (0, route.place.numel())
        for chunk in route.chunks:
            size = (chunk.stop - chunk.start) * route.place.itemsize
            assert size <= chunk.extent.num_bytes < size + 4096
            extents.append((chunk.extent.offset, chunk.extent.offset + chunk.extent.num_bytes))
    extents.sort()
    assert extents[0][0] == 8192
    assert all(stop <= start for (_, stop), (start, _) in pairwise(extents))
    kept = planes["L07"].kept_extent
    assert extents[-1][1] <= kept.offset + kept.num_bytes
    planes.free()


def test_a_route_leads_from_the_disk_to_the_slot_that_the_block_holds():
    record = record_of("L00", (CHUNK + 100,))
    planes = Planes([record], placement_of([record]), HostDevice(), ADAMW)
    block = planes["L00"]
    with pytest.raises(AssertionError, match=r"L00\.weight has no slot"):
        block.route(Plane.WEIGHT)
    slot = planes.take_slot(block, Plane.WEIGHT)
    route = block.route(Plane.WEIGHT)
    assert route.slot is slot and route.home is None
    assert route.place.data_ptr() == block.weights().data_ptr() == block.pieces()[0].data_ptr()
    assert [chunk.label for chunk in route.chunks] == ["L00.weight[0]", "L00.weight[1]"]
    planes.free_slot(block, Plane.WEIGHT, [DoneTransfer()])
    assert block.weight_slot is None and planes.slot_high_water == ((1,), (0,))
    planes.free()


def test_a_gradient_that_is_summed_over_visits_is_stored_in_fp32():
    narrow, wide = record_of("L00", (64,)), record_of("L01", (64,), **{Plane.GRADIENT: 4})
    planes = Planes([narrow, wide], placement_of([narrow, wide]), HostDevice(), ADAMW)
    assert planes["L00"].dtypes[Plane.GRADIENT] is torch.bfloat16
    assert planes["L01"].dtypes[Plane.GRADIENT] is torch.float32
    assert planes["L01"].dtypes[Plane.WEIGHT] is torch.bfloat16
    planes.free()


def test_single_entries_are_kept_within_the_limit_of_the_arena():
    record = record_of("L00", (5000, 64))
    placement = placement_of([record])
    planes = Planes([record], placement, HostDevice(), ADAMW)
    before = planes.arena.in_use_bytes
    planes.keep_pieces(replace(placement, pieces=frozenset({("L00", 0)}), pieces_bytes=12288))
    assert planes.pieces["L00", 0].num_bytes == 12288 == planes.arena.in_use_bytes - before
    planes.free_pieces([("L00", 0)])
    planes.keep_pieces(placement)
    assert planes.arena.in_use_bytes == before == planes.arena.limit_bytes
    planes.free()


def on_device():
    record = record_of("L00", (1000,))
    planes = Planes([record], placement_of([record], resident=("L00",), host=Home.HOST), TwinDevice(), ADAMW)
    block = planes["L00"]
    block.weights().copy_(torch.arange(record.num_elements))
    return planes, block, placement_of([record], hosted=("L00",), host=Home.HOST)


def test_eviction_moves_every_plane_to_host_memory():
    planes, block, placement = on_device()
    values = block.weights().clone()
    assert planes.updates_in_place(block)
    planes.evict(block, placement)
    assert not planes.updates_in_place(block) and not block.num_bytes_in(Home.DEVICE)
    assert torch.equal(block.at_home(Plane.WEIGHT, Home.HOST), values)
    assert set(block.regions) == {Plane.WEIGHT, Plane.GRADIENT, *block.record.state}
    planes.free()


def test_eviction_without_host_memory_changes_nothing(monkeypatch):
    planes, block, placement = on_device()
    values, limit_bytes = block.weights().clone(), planes.host_arena.limit_bytes
    allocate, calls = planes.host_arena.allocate, []

    def refuse(num_bytes, name):
        calls.append(name)
        if len(calls) == 2:
            raise BudgetError(name, hint="")
        return allocate(num_bytes, name)

    monkeypatch.setattr(planes.host_arena, "allocate", refuse)
    with pytest.raises(BudgetError):
        planes.evict(block, placement)
    assert torch.equal(block.weights(), values)
    assert not block.num_bytes_in(Home.HOST) and planes.host_arena.limit_bytes == limit_bytes
    assert planes.host_arena.in_use_bytes == 0 and planes.placement is not placement
    planes.free()
