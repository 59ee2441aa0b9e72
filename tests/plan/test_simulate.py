"""The simulation of a plan: what it says of simple cases by arithmetic, and what holds of all."""

import dataclasses
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import Group, Plane
from outsize.config import ComputeType, Home, Pins
from outsize.plan import Context, Direction, Occupancy, Visit, place
from outsize.plan.lower import Costs, Task
from outsize.plan.profile import Profile, Resource
from outsize.plan.simulate import least_s, plan_steps, run, simulate
from tests.plan.test_plan import call, make_records

GIB = 1 << 30
HOST = Profile(
    name="a host",
    source="made up",
    disk_read=2e9,
    disk_write=2e9,
    host_copy=20e9,
    update=20e9,
    matmul={ComputeType.FLOAT32: 2e11},
    host_bytes=64 * GIB,
    num_threads=2,
)
DEVICE = dataclasses.replace(
    HOST,
    name="a device",
    up=20e9,
    down=20e9,
    device_bytes=24 * GIB,
    device_memory=1e12,
    device_update=1e12,
    update=200e9,
)
UNIT = 25_000_000
"""Elements of a block: 100 MB of fp32 weights."""


def costs(names, forward_s=0.0, backward_s=0.0):
    return Costs(dict.fromkeys(names, forward_s), dict.fromkeys(names, backward_s))


def blocks(count, size=UNIT):
    return make_records({f"L{i:02}": size for i in range(count)})


def on_disk(records, **pins):
    return place(
        list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.DISK, has_disk=True, pins=Pins(**pins)
    )


def test_tasks_of_one_resource_follow_each_other_and_others_run_beside():
    tasks = [
        Task(Resource.READ, 1.0, (), "a"),
        Task(Resource.READ, 1.0, (), "b"),
        Task(Resource.COMPUTE, 2.0, (0,), "c"),
        Task(Resource.COMPUTE, 0.5, (1,), "d"),
    ]
    events = run(tasks, HOST)
    assert [(event.start_s, event.end_s) for event in events] == [(0, 1), (1, 2), (1, 3), (3, 3.5)]
    assert events[2].held_up_by == 0


def test_what_disturbs_each_other_slows_down_while_both_run():
    profile = dataclasses.replace(HOST, contention={Resource.COMPUTE: {Resource.READ: 0.5}})
    events = run([Task(Resource.COMPUTE, 2.0, (), "c"), Task(Resource.READ, 1.0, (), "r")], profile)
    assert events[1].end_s == 1.0
    assert events[0].end_s == pytest.approx(2.5)  # half speed for a second


def test_kept_activations_are_not_computed_again():
    records = blocks(4)
    names = list(records)
    placement = place(
        list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.HOST, has_disk=False, pins=Pins()
    )
    both = dataclasses.replace(costs(names, 10.0, 30.0), kept_backward_s=dict.fromkeys(names, 20.0))
    steps = [
        simulate(call(names), records, dataclasses.replace(placement, kept=kept), HOST, both).step_s
        for kept in (frozenset(), frozenset(names[2:]))
    ]
    assert steps[0] - steps[1] == pytest.approx(20.0, abs=0.5)


def test_weights_of_kept_blocks_stay_in_memory():
    records = list(blocks(4).values())
    kept = frozenset({"L02", "L03"})
    placement = place(
        records, {Home.DEVICE: 1 << 50}, home=Home.DISK, has_disk=True, kept=kept, pins=Pins(weight_slots=1)
    )
    assert placement.at(Home.DEVICE) == {("L02", Group.WEIGHT), ("L03", Group.WEIGHT)}
    apart = place(
        records,
        {Home.DEVICE: 1 << 50, Home.HOST: 1 << 50},
        home=Home.DISK,
        has_disk=True,
        kept=kept,
        pins=Pins(weight_slots=1),
    )
    assert {block for block, _ in apart.at(Home.DEVICE)} == kept and len(apart.at(Home.DEVICE)) == 6


def test_a_model_in_memory_takes_its_computing_and_its_updates():
    records = blocks(4)
    names = list(records)
    placement = place(
        list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.HOST, has_disk=False, pins=Pins()
    )
    result = simulate(call(names), records, placement, HOST, costs(names, 1.0, 3.0))
    # An update moves 28 bytes of each parameter; those of later blocks run beside earlier ones.
    update_s = UNIT * 28 / 20e9
    assert 16.0 <= result.step_s <= 16.0 + 2 * update_s
    assert result.bottleneck is Resource.COMPUTE


@pytest.mark.parametrize("where", [Home.HOST, Home.DEVICE])
def test_an_update_takes_as_long_as_the_bytes_that_it_touches(where):
    """It reads and writes weight and moments, and reads the gradient: 28 bytes of each parameter in fp32."""
    records = blocks(4)
    names = list(records)
    room = {Home.DEVICE: 1 << 50} | ({Home.HOST: 1 << 50} if where is Home.DEVICE else {})
    placement = place(list(records.values()), room, home=Home.DEVICE, has_disk=False, pins=Pins())
    profile, by, rate = (
        (HOST, Resource.UPDATE, HOST.update)
        if where is Home.HOST
        else (DEVICE, Resource.COMPUTE, DEVICE.device_update)
    )
    result = simulate(call(names), records, placement, profile, costs(names))
    assert result.busy_s[by] == pytest.approx(4 * UNIT * 28 / rate)


def test_what_is_frozen_is_not_updated():
    records = make_records({"A": UNIT}) | make_records({"B": UNIT}, trainable=False)
    result = simulate(call("AB"), records, on_disk(records), HOST, costs("AB"))
    updated = {event.task.label for event in result.events if event.task.resource is Resource.UPDATE}
    assert updated == {"update A"}


def test_a_step_lasts_from_the_end_of_one_to_the_end_of_the_next():
    records = blocks(3)
    names, placement = list(records), on_disk(records)
    own = dataclasses.replace(costs(names, 0.1, 0.3), between_s=50.0)
    result = simulate(call(names), records, placement, HOST, own)
    (step,) = (event for event in result.events if event.task.label == "step")
    assert step.end_s - step.start_s == pytest.approx(50.0)
    assert result.start_s + result.step_s == step.end_s
    plan = plan_steps(Context(call(names), records, placement, Occupancy(pending=frozenset(names))))[-1]
    least = least_s(plan, records, placement, HOST, own)
    assert 50.0 + 3 * 0.4 < least <= result.step_s


def test_a_model_on_disk_is_bound_by_the_disk_when_computing_is_nothing():
    records = blocks(6)
    names = list(records)
    result = simulate(call(names), records, on_disk(records), HOST, costs(names))
    # Read: weights twice (but those held over the turn), gradient and two moments; written: the same, weights once.
    whole = 6 * UNIT * 4
    read = result.bytes_moved[Resource.READ]
    assert 4 * whole <= read <= 5 * whole and result.bytes_moved[Resource.WRITE] == pytest.approx(
        4 * whole, rel=0.02
    )
    assert result.step_s == pytest.approx(read / 2e9, rel=0.25)
    assert max(result.stall_s, key=result.stall_s.get) in (Resource.READ, Resource.WRITE)


def test_a_forward_that_streams_is_its_bytes_over_the_bandwidth():
    """ZeRO-Inference's streamed decoding, as published: one pass of all weights over the link per token of a batch."""
    for num_bytes, batch, published in ((140e9, 96, 8.88), (282e9, 200, 9.23), (352e9, 8, 0.293)):
        size = int(num_bytes / 2 / 80)
        records = make_records(
            {f"L{i:02}": size for i in range(80)},
            trainable=False,
            element_bytes={Plane.WEIGHT: 2, Plane.GRADIENT: 2, Plane.MOMENT1: 4, Plane.MOMENT2: 4},
        )
        placement = place(
            list(records.values()),
            {Home.DEVICE: 40 * GIB, Home.HOST: 1 << 50},
            home=Home.HOST,
            has_disk=False,
            pins=Pins(),
        )
        profile = dataclasses.replace(DEVICE, up=13e9)
        names = list(records)
        visits = [Visit(name, Direction.FORWARD) for name in names]
        result = simulate(visits, records, placement, profile, costs(names, 0.001))
        assert batch / result.step_s == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("num_disks", "published"), [(1, 70), (2, 112), (3, 136), (6, 152)])
def test_training_13b_on_one_card_by_number_of_disks(num_disks, published):
    """LoHan on an RTX 4090, in TFLOP/s (https://arxiv.org/abs/2403.06504, by number of disks).

    Its schedule, not ours: updates run in the backward, right after each block. Stated there: the card, Intel P5510 disks,
    a GPT of 13 B parameters, fp16 with fp32 state. Assumed: 40 blocks, batches of 32 sequences of 1,024 tokens, 8
    operations per parameter and token (with recomputation), a rate of 156 TFLOP/s (their best), 6.5 GB/s read and 4.2 GB/s
    written (data sheet), a link of 25 GB/s, and an update that nothing waits for.
    """
    num_blocks, parameters, tokens, rate = 40, 13e9, 32 * 1024, 156e12
    block = parameters / num_blocks
    operations = 8 * block * tokens
    read, write, link = num_disks * 6.5e9, num_disks * 4.2e9, 25e9
    tasks: list[Task] = []

    def task(resource, seconds, *after):
        tasks.append(Task(resource, seconds, tuple(index for index in after if index is not None), "task"))
        return len(tasks) - 1

    last = None
    for _ in range(num_blocks):
        here = task(Resource.UP, 2 * block / link, task(Resource.READ, 2 * block / read))
        last = task(Resource.COMPUTE, operations / 4 / rate, here, last)
    for _ in range(num_blocks):
        here = task(Resource.UP, 2 * block / link, task(Resource.READ, 2 * block / read))
        last = task(Resource.COMPUTE, 3 * operations / 4 / rate, here, last)
        gradient = task(Resource.DOWN, 2 * block / link, last)
        state = task(Resource.READ, 12 * block / read)
        task(Resource.WRITE, 14 * block / write, task(Resource.UPDATE, 0.0, gradient, state))
    step_s = max(event.end_s for event in run(tasks, DEVICE))
    assert 8 * parameters * tokens / step_s / 1e12 == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize("home", [Home.HOST, Home.DISK])
def test_a_device_computes_while_the_link_moves(home):
    records = blocks(8)
    names = list(records)
    placement = place(
        list(records.values()),
        {Home.DEVICE: 4 * GIB, Home.HOST: 1 << 50},
        home=home,
        has_disk=True,
        pins=Pins(),
    )
    slow = simulate(call(names), records, placement, DEVICE, costs(names, 1.0, 3.0))
    assert slow.step_s == pytest.approx(32.0, rel=0.02) and slow.bottleneck is Resource.COMPUTE
    fast = simulate(call(names), records, placement, DEVICE, costs(names))
    assert fast.step_s < slow.step_s and fast.bytes_moved[Resource.UP] >= 8 * UNIT * 4


def waiting(placement, inputs, **options):
    return dataclasses.replace(placement, inputs=inputs, **options)


@pytest.mark.parametrize("apart", [False, True])
def test_inputs_that_wait_elsewhere_are_moved_there_and_back(apart):
    records = blocks(8)
    names, profile = list(records), DEVICE if apart else HOST
    if apart:
        here = place(
            list(records.values()),
            {Home.DEVICE: 1 << 50, Home.HOST: 1 << 50},
            home=Home.DEVICE,
            has_disk=True,
            pins=Pins(),
        )
    else:
        here = place(
            list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.HOST, has_disk=False, pins=Pins()
        )
    own = dataclasses.replace(costs(names, 1.0, 3.0), input_bytes=dict.fromkeys(names, 1 << 30))

    def moved(placement):
        counts = simulate(call(names), records, placement, profile, own).bytes_moved
        return [
            counts.get(each, 0) >> 30 for each in (Resource.WRITE, Resource.READ, Resource.DOWN, Resource.UP)
        ]

    assert moved(here) == [0, 0, 0, 0]
    # Those of the last visits are still there when backward begins.
    assert moved(waiting(here, Home.DISK)) == [8, 6, 8 * apart, 6 * apart]
    assert moved(waiting(here, Home.DISK, kept=frozenset(names[4:]))) == [4, 2, 4 * apart, 2 * apart]
    if apart:
        assert moved(waiting(here, Home.HOST)) == [0, 0, 8, 6]


def test_computing_waits_for_inputs_that_a_slow_disk_brings_back():
    records = blocks(8)
    names = list(records)
    here = place(list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.HOST, has_disk=False, pins=Pins())
    own = dataclasses.replace(costs(names, 1.0, 3.0), input_bytes=dict.fromkeys(names, int(2e9)))
    near = simulate(call(names), records, here, HOST, own)
    beside = simulate(call(names), records, waiting(here, Home.DISK), HOST, own)
    assert beside.step_s == pytest.approx(near.step_s, rel=0.01)  # one block ahead is enough
    slow = dataclasses.replace(HOST, disk_read=2e8)
    bound = simulate(call(names), records, waiting(here, Home.DISK), slow, own)
    assert bound.step_s > 6 * 10 and max(bound.stall_s, key=bound.stall_s.get) is Resource.READ


SIZES = st.lists(st.sampled_from([100_000, 1_000_000, 5_000_000]), min_size=1, max_size=8)


@given(SIZES, st.integers(1, 3), st.sampled_from([0, 50_000_000]), st.floats(0, 0.05), st.data())
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_is_never_slower_where_nothing_disturbs(sizes, slots, resident, forward_s, data):
    names = [f"L{i}" for i in range(len(sizes))]
    records = make_records(dict(zip(names, sizes, strict=True)))
    placement = place(
        list(records.values()),
        {Home.DEVICE: 1 << 50},
        home=None,
        has_disk=True,
        pins=Pins(weight_slots=slots, resident_bytes=resident),
    )
    own = costs(names, forward_s, 3 * forward_s)
    slow = simulate(call(names), records, placement, HOST, own)
    rate = data.draw(st.sampled_from(["disk_read", "disk_write", "update", "host_copy"]))
    faster = dataclasses.replace(HOST, **{rate: 2 * getattr(HOST, rate)})
    assert simulate(call(names), records, placement, faster, own).step_s <= slow.step_s * (1 + 1e-9)
    assert slow.step_s >= len(names) * 4 * forward_s * 0.999
    assert all(busy <= slow.step_s * 1.0001 for busy in slow.busy_s.values())


def num_calls(count):
    """Functions that Python calls to simulate a step of `count` blocks."""
    records = blocks(count, 1_000_000)
    names, placement, calls = list(records), on_disk(records), 0

    def note(frame, event, _):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        simulate(call(names), records, placement, HOST, costs(names, 0.01, 0.03))
    finally:
        sys.setprofile(None)
    return calls


def test_simulating_takes_work_in_proportion_to_the_number_of_blocks():
    assert num_calls(80) < 2.5 * num_calls(40)
