"""Plans: text round trip, legality, memory, and what the builder promises, at any size and without a tensor."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import Block, Group, Piece, Plane, Record
from outsize.config import Home, Pins
from outsize.errors import BudgetError, ConfigError, UsageError
from outsize.plan import (
    Backward,
    Context,
    Copy,
    Direction,
    Forward,
    Free,
    Held,
    Occupancy,
    Op,
    Plan,
    PlanError,
    Read,
    Update,
    Visit,
    Wait,
    Write,
    check,
    make_plan,
    place,
)

STATE = (Plane.MOMENT1, Plane.MOMENT2)
BYTES = {Plane.WEIGHT: 4, Plane.MOMENT1: 4, Plane.MOMENT2: 4, Plane.GRADIENT: 4}
ROOM = {Home.DEVICE: 1 << 40, Home.HOST: 1 << 40}
"""Beside a device with memory of its own."""


def make_records(sizes, trainable=True, element_bytes=None):
    return {
        name: Record.lay_out(
            Block(name, (Piece(f"{name}.w", (size,)),)), [trainable], STATE, element_bytes or BYTES
        )
        for name, size in sizes.items()
    }


def call(names, trains=True):
    forward = [Visit(name, Direction.FORWARD) for name in names]
    return forward + [Visit(name, Direction.BACKWARD, trains=trains) for name in reversed(names)]


def on_disk(records, **pins):
    """Everything lives on the disk and passes through slots; memory is ample."""
    return place(
        list(records.values()), {Home.DEVICE: 1 << 40}, home=Home.DISK, has_disk=True, pins=Pins(**pins)
    )


def in_memory(records):
    """Everything lives in the host's memory, where blocks compute."""
    return place(list(records.values()), {Home.DEVICE: 1 << 40}, home=Home.HOST, has_disk=True, pins=Pins())


@given(
    st.lists(st.sampled_from([1000, 5000, 300_000]), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 20_000_000),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_built_plan_is_legal_and_complete(sizes, weight_slots, gradient_slots, resident, data):
    names = [f"L{i}" for i in range(len(sizes))]
    records = make_records(dict(zip(names, sizes, strict=True)))
    pins = Pins(weight_slots=weight_slots, gradient_slots=gradient_slots, resident_bytes=resident)
    placement = place(list(records.values()), {Home.DEVICE: 1 << 40}, home=None, has_disk=True, pins=pins)
    order = names if data.draw(st.booleans()) else data.draw(st.lists(st.sampled_from(names), min_size=1))
    pending = set(data.draw(st.lists(st.sampled_from(names))))
    accumulated = set(data.draw(st.lists(st.sampled_from(names))))
    visits = call(order)
    plan = make_plan(Context(visits, records, placement, Occupancy(pending=pending, accumulated=accumulated)))
    peaks = check(plan, records, placement)
    assert peaks.num_bytes <= placement.slots_bytes
    assert Plan.parse(str(plan)) == plan
    computed = [(op.block, op.verb) for op in plan if isinstance(op, Forward | Backward)]
    assert computed == [(visit.block, visit.direction.value) for visit in visits]
    assert {op.block for op in plan if isinstance(op, Update)} == pending & set(order)


def test_reads_are_started_before_they_are_needed():
    records = make_records({f"L{i}": 5000 for i in range(5)})
    placement = on_disk(records, weight_slots=2)
    plan = make_plan(Context(call(list(records)), records, placement, Occupancy()))
    for index, op in enumerate(plan.ops):
        if isinstance(op, Forward) and op.block != "L4":
            following = f"L{int(op.block[1]) + 1}"
            reads = [
                i for i, other in enumerate(plan.ops) if isinstance(other, Read) and other.block == following
            ]
            assert reads[0] < index


def test_a_block_is_not_read_again_at_the_turn():
    records = make_records({f"L{i}": 5000 for i in range(5)})
    placement = on_disk(records, weight_slots=2)
    plan = make_plan(Context(call(list(records)), records, placement, Occupancy()))
    reads = [op.block for op in plan if isinstance(op, Read) and op.plane is Plane.WEIGHT]
    assert reads.count("L4") == 1 and reads.count("L1") == 2


def test_what_is_held_is_not_read():
    records = make_records({"A": 100, "B": 100})
    placement = on_disk(records, weight_slots=2)
    plan = make_plan(Context(call(["A", "B"]), records, placement, Occupancy(held=["A"], pending={"A"})))
    assert plan.ops[0] == Held("A", Plane.WEIGHT)
    assert Read("A", Plane.WEIGHT, 4096) not in plan.ops
    assert (
        plan.ops.index(Update("A")) < plan.ops.index(Wait("A", Plane.WEIGHT)) < plan.ops.index(Forward("A"))
    )


def test_resident_blocks_take_no_slot():
    records = make_records({"A": 100, "B": 100})
    placement = in_memory(records)
    plan = make_plan(Context(call(["A", "B"]), records, placement, Occupancy(pending={"A"})))
    assert check(plan, records, placement).num_bytes == 0
    assert not [op for op in plan if isinstance(op, Read | Free)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward A", "runs before its weights are waited for"),
        ("read A.weight 4096\nforward A", "runs before its weights are waited for"),
        ("read A.weight 4096\nread A.weight 4096", "has its slot already"),
        ("read A.weight 4096\nread B.weight 4096\nread C.weight 4096", "no slot left for C"),
        ("free A.weight", "holds no slot"),
        ("wait A.weight", "which nothing reads"),
        ("update A", "updated before its weights are read"),
        ("claim A.gradient", "never given back"),
        ("claim A.gradient\nbackward A\nfree A.gradient", "dropped before it is written"),
        ("claim A.gradient\nwrite A.gradient 4", "written before backward"),
        ("read A.weight 4096\nheld B.weight", "only at the start"),
        ("wait X.weight", "unknown block X"),
        ("fetch A.input 4", "fetched before it was sent"),
        ("send A.input 4\nfetch A.input 4", "fetched before it was sent"),
        ("wait A.input", "which nothing fetches"),
        ("free A.input", "freed before it is sent"),
        ("send A.input 4", "never freed"),
        ("read A.weight 4096\ncopy A 4", "copied before its update is waited for"),
        ("read A.weight 4096\nwait A.weight\nupdate A\ncopy A 4", "copied before its update is waited for"),
    ],
)
def test_illegal_plans_are_refused_with_their_place(text, message):
    records = make_records({"A": 1000, "B": 1000, "C": 1000})
    placement = on_disk(records, weight_slots=2)
    with pytest.raises(PlanError, match=message):
        check(Plan.parse(text), records, placement)


def test_each_block_is_copied_for_a_commit_once_its_update_is_waited_for():
    records = make_records({"A": 1000, "B": 1000})
    placement = in_memory(records)
    occupancy = Occupancy(pending={"A"}, committing={"A", "B"})
    plan = make_plan(Context(call(["A", "B"]), records, placement, occupancy))
    check(plan, records, placement)
    copied = [op for op in plan if isinstance(op, Copy)]
    assert copied == [Copy("A", 3 * 4096), Copy("B", 3 * 4096)]
    for op in copied:
        index = plan.ops.index(op)
        assert (
            plan.ops[index - 1] == Wait(op.block, Plane.WEIGHT) and Update(op.block) not in plan.ops[index:]
        )


def with_inputs(records):
    placement = in_memory(records)
    return replace(placement, inputs=Home.DISK)


def about_inputs(plan):
    return [str(op) for op in plan if getattr(op, "plane", None) is Plane.INPUT]


def test_inputs_leave_two_visits_late_and_come_back_one_visit_early():
    records = make_records(dict.fromkeys("ABCD", 100))
    placement, size = with_inputs(records), dict.fromkeys("ABCD", 8)
    plan = make_plan(Context(call("ABCD"), records, placement, input_bytes=size))
    check(plan, records, placement)
    assert Plan.parse(str(plan)) == plan
    inputs = [str(op) for op in plan if isinstance(op, Forward | Backward) or "input" in str(op)]
    assert inputs == [
        *("send A.input 8", "forward A", "send B.input 8", "forward B"),
        *("free A.input", "send C.input 8", "forward C", "free B.input", "send D.input 8", "forward D"),
        *("backward D", "fetch B.input 8", "backward C"),
        *("fetch A.input 8", "wait B.input", "backward B", "wait A.input", "backward A"),
        *("free C.input", "free D.input"),
    ]


def test_a_plan_of_what_is_left_fetches_what_an_earlier_one_sent():
    records = make_records(dict.fromkeys("ABC", 100))
    placement = with_inputs(records)
    inputs = [("A", 8), ("B", 8), ("C", 8)]
    left = [visit for visit in call("ABC") if visit.direction is Direction.BACKWARD][1:]
    occupancy = Occupancy(inputs=inputs[:2])
    plan = make_plan(Context(left, records, placement, occupancy))
    check(plan, records, placement)
    assert about_inputs(plan) == [
        *(
            "held A.input",
            "held B.input",
            "fetch B.input 8",
            "fetch A.input 8",
            "wait B.input",
            "wait A.input",
        )
    ]
    occupancy = Occupancy(inputs=inputs, num_leaving=1)
    plan = make_plan(Context(call("ABC")[2:], records, placement, occupancy, dict.fromkeys("ABC", 8)))
    check(plan, records, placement)
    assert "fetch C.input 8" not in about_inputs(plan)


def test_a_parameter_that_is_read_moves_no_inputs():
    records = make_records({"A": 100})
    visits, occupancy = [Visit("A", Direction.TOUCH)], Occupancy(inputs=[("A", 8)], num_leaving=1)
    assert not about_inputs(make_plan(Context(visits, records, with_inputs(records), occupancy)))


def test_a_block_that_stays_does_not_go_back_while_it_is_updated():
    records = make_records({"A": 1000})
    placement = in_memory(records)
    with pytest.raises(PlanError, match="runs while it is being updated"):
        check(Plan.parse("update A\nbackward A"), records, placement)


def test_a_gradient_that_is_summed_where_it_stays_is_not_moved():
    records = make_records({"A": 1000})
    placement = in_memory(records)
    plan = make_plan(Context(call("A"), records, placement, Occupancy()))
    assert Write("A", Plane.GRADIENT, 0) in plan.ops


def test_a_block_inside_another_that_has_the_only_gradient_slot_is_refused():
    records = make_records({"A": 1000, "B": 1000})
    placement = on_disk(records, weight_slots=2, gradient_slots=1)
    visits = [Visit("B", Direction.BACKWARD, trains=True)]
    with pytest.raises(UsageError, match="block B is visited inside A, which hold all slots"):
        make_plan(Context(visits, records, placement, Occupancy(summing=["A"])))
    assert make_plan(Context(visits, records, placement, Occupancy()))


def test_slots_are_shared_by_blocks_of_at_most_twice_the_size():
    records = list(make_records({"A": 1 << 20, "B": (1 << 19) + 4096, "C": 1 << 19}).values())
    placement = place(records, {Home.DEVICE: 1 << 40}, home=Home.DISK, has_disk=True, pins=Pins())
    assert [group.blocks for group in placement.slots[Group.WEIGHT]] == [{"A", "B"}, {"C"}]


@pytest.mark.parametrize(("trains", "slots"), [(True, 3), (False, 2)])
def test_it_is_roomy_where_transfers_fill_slots_beside_computing(trains, slots):
    records = list(make_records({f"L{i}": 1 << 20 for i in range(4)}, trainable=trains).values())

    def is_roomy(count):
        pins = Pins(weight_slots=count)
        placement = place(records, {Home.DEVICE: 1 << 40}, home=Home.DISK, has_disk=True, pins=pins)
        if not trains:
            placement = replace(placement, slots={**placement.slots, Group.GRADIENT: ()})
        return placement.is_roomy(Pins())

    assert is_roomy(slots) and not is_roomy(slots - 1)


def test_a_device_that_all_planes_just_fit_into_holds_them():
    records = list(make_records({"A": 1 << 20, "B": 1 << 20}).values())
    options = {"home": None, "has_disk": True, "pins": Pins()}
    whole = place(records, {**ROOM, Home.DEVICE: 1 << 40}, **options)
    assert place(records, {**ROOM, Home.DEVICE: whole.bytes_in(Home.DEVICE)}, **options) == whole
    assert place(records, {**ROOM, Home.DEVICE: whole.bytes_in(Home.DEVICE) - 1}, **options).slots[
        Group.WEIGHT
    ]


def test_a_device_that_slots_just_fit_into_is_large_enough():
    records = list(make_records({"A": 1 << 20, "B": 1 << 20}).values())
    pins = Pins(weight_slots=1, gradient_slots=1, resident_bytes=0)
    options = {"home": None, "has_disk": True, "pins": pins}
    least = place(records, {**ROOM, Home.DEVICE: 1 << 40}, **options)
    assert place(records, {**ROOM, Home.DEVICE: least.bytes_in(Home.DEVICE)}, **options) == least
    with pytest.raises(BudgetError):
        place(records, {**ROOM, Home.DEVICE: least.bytes_in(Home.DEVICE) - 1}, **options)


@pytest.mark.parametrize(
    "text", ["", "jump A", "read A.weight", "read A.weight x", "forward", "forward A.weight", "free A.wings"]
)
def test_malformed_text_is_named(text):
    with pytest.raises(ConfigError, match="not an operation"):
        Op.parse(text)


def test_placement_spends_memory_on_slots_first_then_on_weights():
    records = list(make_records({f"L{i}": 100_000 for i in range(8)}).values())
    least = place(
        records,
        {Home.DEVICE: 1 << 40},
        home=Home.DISK,
        has_disk=True,
        pins=Pins(weight_slots=1, gradient_slots=1),
    )
    with pytest.raises(BudgetError, match="hint"):
        place(records, {Home.DEVICE: least.bytes_in(Home.DEVICE) - 1}, home=None, has_disk=True, pins=Pins())
    assert (
        place(records, {Home.DEVICE: least.bytes_in(Home.DEVICE)}, home=None, has_disk=True, pins=Pins())
        == least
    )
    middle = place(
        records, {Home.DEVICE: least.bytes_in(Home.DEVICE) + 2_500_000}, home=None, has_disk=True, pins=Pins()
    )
    kept = {group for _, group in middle.at(Home.DEVICE)}
    assert kept == {Group.WEIGHT}
    assert middle.bytes_in(Home.DEVICE) <= least.bytes_in(Home.DEVICE) + 2_500_000
    whole = place(records, {Home.DEVICE: 1 << 40}, home=None, has_disk=True, pins=Pins())
    assert whole.disk_bytes == 0 and not whole.slots[Group.WEIGHT]


@given(st.integers(100_000, 60_000_000))
@settings(max_examples=60, deadline=None)
def test_placement_never_exceeds_its_budget(budget):
    records = list(make_records({f"L{i}": 300_000 + 64 * i for i in range(6)}).values())
    try:
        placement = place(records, {Home.DEVICE: budget}, home=None, has_disk=True, pins=Pins())
    except BudgetError as error:
        assert error.hint
    else:
        assert placement.bytes_in(Home.DEVICE) <= budget
