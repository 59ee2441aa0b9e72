"""Plans within limits: a function of what it is given, and of nothing else."""

import dataclasses
import json
import subprocess
import sys
from bisect import bisect_left
from collections import Counter

import pytest

from outsize.config import Budgets, ComputeType, Home, Pins, Settings
from outsize.errors import BudgetError
from outsize.plan import Direction
from outsize.plan import planner as planner_module
from outsize.plan import search as search_module
from outsize.plan import simulate as simulate_module
from outsize.plan.ledger import Ledger, Purpose, placed
from outsize.plan.limits import HINT_MARGIN_BYTES, SLACK_BYTES, Limits
from outsize.plan.memory_estimate import estimate
from outsize.plan.place import Buffers
from outsize.plan.planner import Planner
from outsize.plan.search import CostModel
from outsize.plan.workload import Activations, BatchDims, BatchShape, Call, Linear, LossMemory, Workload
from tests.plan.test_plan import call
from tests.plan.test_simulate import HOST, blocks, costs

MIB = 1 << 20
NOTHING = Linear(0.0, 0.0)
SHAPE = BatchShape(rows=8, row_elements=128, row_tokens=128)


def workload_of(records, tile_bytes=4 * MIB):
    names = list(records)
    return Workload(
        visits=tuple(call(names)),
        row_elements=SHAPE.row_elements,
        rows=2,
        dims={name: BatchDims((0,), (0,)) for name in names},
        boundary_bytes=Linear(0.0, len(names) * MIB),
        movable_bytes=Linear(0.0, len(names) * MIB),
        input_bytes=Linear(0.0, MIB),
        sent_bytes={name: Linear(0.0, MIB) for name in names},
        tile_bytes=Linear(0.0, tile_bytes),
        loss_memory=LossMemory(NOTHING, NOTHING, 0, NOTHING),
        kinds=(),
        kind_of={},
        activations=tuple(Activations((name,), True, Linear(0.0, 8 * MIB)) for name in names),
    )


def planner(records, limits, disk="/anywhere", pins=None, beside=(), **workload):
    settings = Settings(Budgets.parse(None, None, disk), None, ComputeType.FLOAT32, pins or Pins())
    return Planner(
        list(records.values()),
        [Call(workload_of(records, **workload), SHAPE), *beside],
        limits,
        settings,
        lambda placement, own: placement.disk_bytes,
    )


def cost_model(records):
    return CostModel(HOST, lambda tile_rows: costs(list(records), 0.1, 0.2))


def vars_of(placement):
    """The fields of a placement, sets in order."""
    fields = {each.name: getattr(placement, each.name) for each in dataclasses.fields(placement)}
    return {
        name: sorted(map(str, value)) if isinstance(value, frozenset) else repr(value)
        for name, value in fields.items()
        if not name.endswith("classes")
    }


def limited(host_bytes, **others):
    """Limits of a process that has 300 MiB before anything is placed."""
    return Limits(host_bytes, Ledger.of(Home.HOST, process=300 * MIB), **others)


def planned():
    """What is planned for one model and one set of limits, as JSON."""
    records = blocks(6)
    way, placement, choices = planner(records, limited(2 << 30)).plan(cost_model(records))
    return json.dumps([repr(way), vars_of(placement), [choice.step_s for choice in choices]])


def test_processes_under_different_pressure_make_the_same_plan():
    """Ranks agree on limits and costs once; each of them then plans by itself."""
    elsewhere = subprocess.run(
        [sys.executable, "-c", "from tests.plan.test_planner import planned; print(planned())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    ballast = bytearray(400 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert planned() == elsewhere and len(json.loads(elsewhere)[-1]) > 1


def test_what_is_planned_fits():
    records = blocks(6)
    for host in (900 * MIB, 1500 * MIB, 4096 * MIB):
        limits = limited(host)
        for model in (None, cost_model(records)):
            way, placement, _ = planner(records, limits).plan(model)
            ledger = limits.taken + way.activations + placed(list(records.values()), placement, Home.HOST)
            assert ledger.total(Home.HOST) >= 300 * MIB + placement.bytes_in(Home.DEVICE)
            assert ledger.total(Home.HOST) + SLACK_BYTES <= host


def pass_of(records, pages_bytes):
    """A pass of an engine: forward alone, over KV pages."""
    forwards = tuple(visit for visit in call(list(records)) if visit.direction is Direction.FORWARD)
    workload = dataclasses.replace(
        workload_of(records),
        visits=forwards,
        boundary_bytes=NOTHING,
        movable_bytes=NOTHING,
        pages_bytes=pages_bytes,
    )
    return workload, BatchShape(rows=1, row_elements=512, row_tokens=512)


def test_one_placement_serves_training_and_generating_in_turn():
    """At any size, on paper: 120 GiB of weights and state within 40 GiB. Neither use adds to the other."""
    records = blocks(60, 256 * MIB)
    limits = limited(40 << 30)

    def place_for(pages_bytes):
        beside = [pass_of(records, pages_bytes)] if pages_bytes else []
        way, placement, _ = planner(records, limits, beside=beside).plan()
        taken = limits.taken + way.activations + placed(list(records.values()), placement, Home.HOST)
        assert taken.total(Home.HOST) + limits.slack_bytes <= limits.host_bytes
        assert all(placement.slots.values()) and placement.at(Home.DISK), (
            "blocks stream through one set of slots"
        )
        return way.activations, placement

    alone, placement = place_for(0)
    few = alone.total(Home.HOST) // 2
    assert place_for(few) == (alone, placement), "pages lie where the activations of training were"
    peak, smaller = place_for(16 << 30)
    assert peak == estimate(*pass_of(records, 16 << 30), 1, Home.HOST, Home.HOST)
    assert peak[Home.HOST, Purpose.KV] == 16 << 30
    assert smaller.resident_bytes < placement.resident_bytes
    with pytest.raises(BudgetError, match="the KV cache takes 50"):
        place_for(50 << 30)


def test_a_block_that_only_generating_visits_is_not_idle():
    records = blocks(3)
    workload, shape = pass_of(records, MIB)
    fewer = {name: record for name, record in records.items() if name != "L02"}
    training = dataclasses.replace(workload_of(fewer), visits=tuple(call(list(fewer))))
    plans = planner(records, limited(4 << 30), beside=[Call(workload, shape)])
    assert dataclasses.replace(plans, calls=[Call(training, SHAPE)]).idle == {"L02"}
    assert (
        dataclasses.replace(plans, calls=[Call(training, SHAPE), Call(workload, shape)]).idle == frozenset()
    )


def test_the_fastest_choice_is_taken_and_its_pins_lead_to_it():
    records = blocks(6)
    limits = limited(2048 * MIB)
    _, placement, choices = planner(records, limits).plan(cost_model(records))
    assert [choice.step_s for choice in choices] == sorted(choice.step_s for choice in choices)
    _, again, _ = planner(records, limits, pins=choices[0].pins).plan()
    assert dataclasses.replace(again, chunks=Buffers()) == dataclasses.replace(placement, chunks=Buffers())


@pytest.mark.parametrize("has_device", [False, True])
def test_the_budgets_of_the_hint_work(has_device):
    records = blocks(6)
    limits = limited(420 * MIB, reading_bytes=16 * MIB)
    if has_device:
        taken = limits.taken + Ledger.of(Home.DEVICE, process=10 * MIB)
        limits = dataclasses.replace(limits, taken=taken, device_bytes=100 * MIB, device_free_bytes=100 * MIB)
    with pytest.raises(BudgetError, match="does not fit") as caught:
        planner(records, limits).plan()
    named = {
        part.partition("=")[0]: int(part.split('"')[1].removesuffix("MiB")) * MIB
        for part in str(caught.value.hint).split()
        if '="' in part
    }
    if has_device:
        most = named["device"]
        limits = dataclasses.replace(limits, device_bytes=most, device_free_bytes=most)
    limits = dataclasses.replace(limits, host_bytes=named["host"])
    planner(records, limits).plan()
    smaller = dataclasses.replace(limits, host_bytes=limits.host_bytes - 64 * MIB)
    with pytest.raises(BudgetError):
        planner(records, smaller).plan()


def test_more_memory_never_gives_smaller_tiles():
    records = blocks(4)
    rows = [
        planner(records, limited(host * MIB), tile_bytes=200 * MIB).plan()[0].tile_rows
        for host in (1400, 1700, 2400, 4000)
    ]
    assert rows == sorted(rows) and rows[0] < rows[-1]


def test_inputs_go_to_the_disk_before_tiles_become_smaller_than_512_tokens():
    own = planner(blocks(4), limited(4096 * MIB))
    order = [(way.tile_rows, way.inputs) for way in own._ways(SHAPE) if not way.is_roomy]
    near = [(8, Home.HOST), (4, Home.HOST)]  # of 128 tokens a row
    far = [(rows, Home.DISK) for rows in (8, 4, 2, 1)]
    assert order == [*near, *far, (2, Home.HOST), (1, Home.HOST)]


def test_whether_another_batch_fits_is_asked_of_that_batch():
    own = planner(blocks(4), limited(1500 * MIB))
    assert own.fits() and own.fits(rows=8) and not own.fits(rows=1 << 20)


def test_plans_that_save_the_activations_of_a_part_of_the_layers_are_compared():
    records, pins = blocks(6), Pins(weight_slots=1, gradient_slots=1, resident_bytes=0)
    _, _, choices = planner(records, limited(1 << 34), pins=pins).plan(cost_model(records))
    assert {choice.way.kept_blocks for choice in choices} == {0, 1, 3, 4, 6}


def test_planning_80_blocks_takes_a_bounded_number_of_placements_and_simulations(monkeypatch):
    """Of ways whose computing alone takes longer than the best plan, nothing is simulated, and no plan is made twice."""
    counts = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    count(planner_module, "place")
    count(search_module, "simulate_steps")
    count(simulate_module, "make_plan")
    records = blocks(80)
    host_bytes = sum(record.num_bytes for record in records.values()) // 3
    planner(records, limited(host_bytes)).plan(cost_model(records))
    assert 10 < counts["simulate_steps"] <= 60
    assert counts["make_plan"] <= 2 * counts["simulate_steps"]
    assert counts["place"] <= 600


def test_more_memory_of_the_host_is_room_for_planes_where_it_computes():
    records, pins = blocks(2), Pins(weight_slots=1, gradient_slots=1, resident_bytes=0)
    own, model = planner(records, limited(1 << 31), pins=pins), cost_model(records)
    way, _, _ = own.plan()
    choices = own.with_more(64 * MIB, way, model)
    assert {c.way.rooms[Home.DEVICE] for c in choices} == {way.rooms[Home.DEVICE] + 64 * MIB}


def test_a_call_fits_where_the_margin_of_hints_stays_free():
    records, pins = blocks(2), Pins(weight_slots=1, gradient_slots=1, resident_bytes=0)

    def has_plan(host_mib):
        try:
            planner(records, limited(host_mib * MIB), pins=pins).plan()
        except BudgetError:
            return False
        return True

    least = bisect_left(range(2000), True, key=has_plan)
    margin = HINT_MARGIN_BYTES // MIB
    assert 400 < least < 2000
    assert planner(records, limited((least + margin) * MIB), pins=pins).fits()
    assert not planner(records, limited((least + margin - 1) * MIB), pins=pins).fits()
