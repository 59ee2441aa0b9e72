"""The plan is what runs: the operations carried out are those printed, and memory is what the plan says."""

import pytest
import torch

import outsize
from outsize import Pins
from outsize.block import Group, Plane
from outsize.config import Home
from outsize.plan import Backward, Forward, Plan, Read, Update
from tests.running import adamw, opened, train
from tests.seams import (
    arena_of,
    flush,
    placement_of,
    plan_ahead,
    plan_executed,
    records_of,
    slots_taken,
    watch_plans,
)
from tests.zoo import ZOO


def planned(model, batch):
    """Run one call and its backward; the plan as it was printed when the call began, and what was executed."""
    printed = []
    handle = model.register_forward_pre_hook(lambda *_: printed.append(str(plan_ahead(model))))
    loss = model(**batch).loss
    loss.backward()
    handle.remove()
    (text,) = printed
    return Plan.parse(text), plan_executed(model)


@pytest.mark.parametrize("home", ["disk", "host"])
@pytest.mark.parametrize("name", ZOO)
def test_what_runs_is_the_printed_plan_op_for_op(name, home, tmp_path):
    pins = Pins(weight_slots=2, gradient_slots=1)
    model = opened(ZOO[name].build().train(), disk=tmp_path, home=home, pins=pins)
    optimizer = adamw(model)
    train(model, [ZOO[name].batch()], optimizer)
    plan, executed = planned(model, ZOO[name].batch(seed=1))
    assert [str(op) for op in executed] == [str(op) for op in plan]
    computed = [op for op in executed if isinstance(op, Forward | Backward)]
    assert len(computed) > 5
    trainable = {name for name, record in records_of(model).items() if record.num_trainable}
    assert {op.block for op in executed if isinstance(op, Update)} == trainable
    assert any(isinstance(op, Read) and op.plane is Plane.WEIGHT for op in executed) is (home == "disk")
    assert outsize.report(model).off_plan == ()


@pytest.mark.parametrize("weight_slots", [1, 3])
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "t5", "albert", "llava"])
def test_memory_is_what_the_plan_says(name, weight_slots, tmp_path, monkeypatch):
    peaks = watch_plans(monkeypatch)
    pins = Pins(weight_slots=weight_slots, gradient_slots=2)
    model = opened(ZOO[name].build().train(), disk=tmp_path, home="disk", pins=pins)
    train(model, [[ZOO[name].batch(seed=2 * i + part) for part in range(2)] for i in range(3)])
    placement, arena = placement_of(model), arena_of(model)
    assert placement is not None
    weights, gradients = slots_taken(model)
    assert weights == tuple(map(max, *(peak.weight_slots for peak in peaks)))
    assert gradients == tuple(map(max, *(peak.gradient_slots for peak in peaks)))
    assert weights == tuple(group.count for group in placement.slots[Group.WEIGHT])
    assert arena.in_use_bytes == arena.high_water_bytes == placement.bytes_in(Home.DEVICE)
    assert arena.limit_bytes == placement.bytes_in(Home.DEVICE)
    assert max(peak.num_bytes for peak in peaks) <= placement.slots_bytes


def test_bytes_moved_are_the_plans_bytes(tmp_path):
    """In a steady step: weights in as planned, weights and state out once, state in once, gradients out and in once."""
    name = "llama"
    model = opened(ZOO[name].build().train(), disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    optimizer = adamw(model)
    train(model, [ZOO[name].batch(seed=i) for i in range(2)], optimizer)
    before = outsize.report(model)
    plan, _ = planned(model, ZOO[name].batch(seed=2))
    flush(model)
    after = outsize.report(model)
    records = records_of(model).values()
    state = sum(sum(record.plane_bytes(plane) for plane in record.state) for record in records)
    weights = sum(record.plane_bytes(Plane.WEIGHT) for record in records)
    gradients = sum(record.plane_bytes(Plane.GRADIENT) for record in records)
    read = sum(op.num_bytes for op in plan if isinstance(op, Read) and op.plane is Plane.WEIGHT)
    assert after.bytes_read - before.bytes_read == read + state + gradients
    assert after.bytes_written - before.bytes_written == weights + state + gradients


def test_evaluation_streams_weights_once_and_nothing_else(tmp_path):
    model = opened(ZOO["llama"].build(), disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    train(model, [ZOO["llama"].batch()])
    with torch.no_grad():
        model(**ZOO["llama"].batch())  # applies what is pending
        flush(model)
        before = outsize.report(model)
        plan, executed = planned_forward(model, ZOO["llama"].batch())
    after = outsize.report(model)
    assert executed == list(plan)
    read = sum(op.num_bytes for op in plan if isinstance(op, Read))
    assert after.bytes_read - before.bytes_read == read
    assert after.bytes_written == before.bytes_written


def planned_forward(model, batch):
    """As `planned`, without a backward."""
    model(**batch)
    return plan_ahead(model), plan_executed(model)
