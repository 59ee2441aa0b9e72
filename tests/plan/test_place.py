"""The placer: every group of planes has one home, and memories are filled from the fastest down."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import ALIGNMENT, Block, Group, Piece, Plane, Record
from outsize.config import Home, Pins
from outsize.errors import BudgetError
from outsize.plan import evicted, place
from outsize.plan.place import GROUPS, SlotClass, slot_bytes
from tests.plan.test_plan import BYTES, make_records

PLENTY = 1 << 40
ONE_SLOT = Pins(weight_slots=1, gradient_slots=1)
SIZE = 8 << 20
"""Elements of a block: each plane takes 32 MiB, a chunk of it 4."""


def records_of(count=4, trainable=True):
    return list(make_records({f"L{i}": SIZE for i in range(count)}, trainable=trainable).values())


def placed(records, device, host=None, *, home=None, has_disk=True, pins=ONE_SLOT, **options):
    room = {Home.DEVICE: device} if host is None else {Home.DEVICE: device, Home.HOST: host}
    return place(records, room, home=home, has_disk=has_disk, pins=pins, **options)


def least(records, home=Home.DISK, **options):
    """The least that streaming takes of the memory where blocks compute, and of a host beside it."""
    placement = placed(records, PLENTY, PLENTY, home=home, **options)
    return placement.bytes_in(Home.DEVICE), placement.bytes_in(Home.HOST)


def homes_by_group(placement):
    """How many blocks have each home, by group."""
    found = {group: {} for group in GROUPS}
    for (_, group), home in placement.homes.items():
        found[group][home] = found[group].get(home, 0) + 1
    return found


@given(
    st.lists(st.sampled_from([1000, 300_000, SIZE]), min_size=1, max_size=6),
    st.floats(0, 1.5),
    st.none() | st.floats(0, 1.5),
    st.sampled_from([None, *Home][:4]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_group_has_one_home_and_no_memory_holds_more_than_its_room(
    sizes, device, host, home, has_disk, trains, commits
):
    records = list(make_records({f"L{i}": size for i, size in enumerate(sizes)}, trainable=trains).values())
    whole = sum(record.num_bytes for record in records)
    device_bytes = int(whole * device)
    host_bytes = None if host is None else int(whole * host) + (64 << 20)
    try:
        placement = placed(
            records, device_bytes, host_bytes, home=home, has_disk=has_disk, pins=Pins(), commits=commits
        )
    except BudgetError as error:
        assert error.hint
        return
    assert set(placement.homes) == {(record.name, group) for record in records for group in GROUPS}
    away = Home.DISK if trains else Home.FILE
    memories = {Home.DEVICE} if host is None else {Home.DEVICE, Home.HOST}
    assert set(placement.homes.values()) <= {*memories, away}
    assert placement.bytes_in(Home.DEVICE) <= device_bytes
    if host_bytes is not None:
        assert placement.bytes_in(Home.HOST) <= host_bytes
    moving = any(
        record.group_bytes[group] and placement.home(record.name, group) is away
        for record in records
        for group in GROUPS
    )
    assert bool(placement.disk_bytes) is (moving and trains)


def test_where_the_processor_computes_the_device_is_the_host():
    records = records_of()
    asked = placed(records, PLENTY, home=Home.HOST)
    assert set(asked.homes.values()) == {Home.DEVICE} and asked.host is Home.DEVICE
    assert asked == placed(records, PLENTY, home=Home.DEVICE)
    assert asked.bytes_in(Home.HOST) == 0


def test_memory_of_a_host_goes_to_what_saves_most_traffic_first():
    records = records_of()
    slots = placed(records, PLENTY, home=Home.DISK).bytes_in(Home.DEVICE)
    for num_planes, expected in ((4, (4, 0, 0)), (6, (4, 2, 0)), (8, (4, 4, 0))):
        found = homes_by_group(placed(records, slots + num_planes * 4 * SIZE))
        assert tuple(found[group].get(Home.DEVICE, 0) for group in GROUPS) == expected


def test_a_device_takes_whole_blocks_then_the_host_groups_then_the_disk_the_rest():
    records = records_of()
    device, host = least(records)
    block = sum(records[0].group_bytes[group] for group in GROUPS)
    # One block and a half; of the host, all weights that are left and one gradient.
    placement = placed(records, device + 3 * block // 2, host + 4 * 4 * SIZE)
    found = homes_by_group(placement)
    assert all(found[group][Home.DEVICE] == 1 for group in GROUPS)
    assert [found[group].get(Home.HOST, 0) for group in GROUPS] == [3, 1, 0]
    assert [found[group].get(Home.DISK, 0) for group in GROUPS] == [0, 2, 3]
    assert placement.host is Home.HOST


def test_weights_that_nothing_trains_live_in_their_files():
    records = records_of(trainable=False)
    for host in (None, PLENTY):
        placement = placed(records, PLENTY, host, home=Home.DISK)
        assert {placement.home(record.name, Group.WEIGHT) for record in records} == {Home.FILE}
        assert placement.disk_bytes == 0


@pytest.mark.parametrize("commits", [False, True])
def test_the_host_is_filled_beside_the_bounce_buffers_of_commits(commits):
    """All but one block fits the host; with commits of the block on the device, buffers take a part of the same room."""
    records = records_of()
    device, _ = least(records)
    block = sum(records[0].group_bytes[group] for group in GROUPS)
    hosted = placed(records, device + block, PLENTY)
    placement = placed(records, device + block, hosted.bytes_in(Home.HOST), commits=commits)
    assert bool(placement.at(Home.DISK)) is commits
    assert bool(placement.bounce.count) is commits


def test_an_evicted_block_lives_in_the_hosts_memory():
    records = records_of()
    before = placed(records, PLENTY, PLENTY)
    after = evicted(before, records[1])
    assert {group: after.home("L1", group) for group in GROUPS} == dict.fromkeys(GROUPS, Home.HOST)
    assert before.at(Home.DEVICE) - after.at(Home.DEVICE) == {("L1", group) for group in GROUPS}
    moved = sum(records[1].group_bytes[group] for group in GROUPS)
    assert after.hosted_bytes - before.hosted_bytes == moved == before.resident_bytes - after.resident_bytes


def test_inputs_wait_where_the_placement_says_but_for_blocks_that_save_their_activations():
    placement = placed(records_of(), PLENTY)
    assert placement.home("L0", Group.INPUT) is Home.DEVICE
    away = replace(placement, inputs=Home.DISK, kept=frozenset({"L1"}))
    assert away.home("L0", Group.INPUT) is Home.DISK
    assert away.home("L1", Group.INPUT) is Home.DEVICE


def test_an_evicted_block_joins_the_smallest_slots_that_are_large_enough():
    records = make_records({"small": 1024, "middle": 2048, "large": SIZE, "evicted": 2048})
    classes = tuple(SlotClass(records[name].num_elements * 4, 1, frozenset({name})) for name in records)[:3]
    before = placed(list(records.values()), PLENTY, PLENTY)
    before = replace(before, slots={Group.WEIGHT: classes[::-1], Group.GRADIENT: classes[:1]})
    after = evicted(before, records["evicted"]).slots
    assert [set(each.blocks) for each in after[Group.WEIGHT]] == [{"large"}, {"middle", "evicted"}, {"small"}]
    assert [set(each.blocks) for each in after[Group.GRADIENT]] == [{"small"}, {"evicted"}]
    assert [each.count for each in (*after[Group.WEIGHT], *after[Group.GRADIENT])] == [1] * 5


def test_slots_hold_weights_that_stream_and_sums_of_gradients_in_fp32():
    wide = make_records({"A": 1024})["A"]
    narrow = make_records({"A": 1024}, element_bytes={**BYTES, Plane.GRADIENT: 2})["A"]
    frozen = make_records({"A": 1024}, trainable=False)["A"]
    sizes = {home: slot_bytes(wide, Group.WEIGHT, home) for home in (Home.DEVICE, Home.HOST, Home.DISK)}
    assert sizes == {Home.DEVICE: 0, Home.HOST: 4096, Home.DISK: 4096}
    # A gradient that stays is summed in its plane where that is fp32; a narrower one is widened in place, from one page on.
    for record, here, away in ((wide, 0, 4096), (narrow, 4096 + ALIGNMENT, 4096 + ALIGNMENT), (frozen, 0, 0)):
        assert slot_bytes(record, Group.GRADIENT, Home.DEVICE) == here
        assert slot_bytes(record, Group.GRADIENT, Home.DISK) == away


def test_beside_blocks_that_train_those_that_nothing_stores_live_in_their_files():
    pieces = [Piece("frozen.w", (1024,))]
    frozen = Record.lay_out(Block("frozen", tuple(pieces)), [False], (), BYTES, pieces)
    placement = placed([make_records({"trained": 1024})["trained"], frozen], PLENTY, home=Home.DISK)
    assert placement.home("frozen", Group.WEIGHT) is Home.FILE
    assert placement.home("trained", Group.WEIGHT) is Home.DISK
