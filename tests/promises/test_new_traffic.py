"""A new kind of traffic is an operation, a pass and a runner: here, a mirror of every update on a second disk."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from outsize.block import Plane
from outsize.config import Home, Pins
from outsize.plan import PASSES, Context, Occupancy, Op, Plan, Update, Wait, check, make_plan, place
from outsize.plan.profile import Resource
from outsize.plan.simulate import simulate
from tests.doubles import MemoryTier
from tests.plan.test_plan import call
from tests.plan.test_simulate import HOST, blocks, costs
from tests.running import adamw, loss_of, opened
from tests.seams import add_traffic, bytes_of_weights, plan_ahead, plan_executed, records_of, settle_updates
from tests.zoo import ZOO


@dataclass(frozen=True, slots=True)
class Mirror(Op):
    """Write the weights of a block to the second disk."""

    verb: ClassVar[str] = "mirror"
    resource: ClassVar[Resource | None] = Resource.WRITE
    num_bytes: int


def mirror_updates(plan: Plan, context: Context) -> Plan:
    """Mirror each block that the plan updates, once its weights are current."""
    updated = {op.block for op in plan if isinstance(op, Update)}

    def after(op: Op) -> Iterator[Op]:
        yield op
        if isinstance(op, Wait) and op.plane is Plane.WEIGHT and op.block in updated:
            updated.discard(op.block)
            yield Mirror(op.block, context.records[op.block].plane_bytes(Plane.WEIGHT))

    return plan.expanded(after)


class SecondDisk:
    """The weights of each block, one after the other."""

    def __init__(self, records):
        self.sizes = {name: record.plane_bytes(Plane.WEIGHT) for name, record in records.items()}
        names = list(records)
        self.offsets = {name: sum(self.sizes[other] for other in names[:i]) for i, name in enumerate(names)}
        self.tier = MemoryTier(sum(self.sizes.values()))

    def mirror(self, state):
        """The runner of `Mirror`."""
        buffer = mmap.mmap(-1, self.sizes[state.name])
        weights = state.planes.weights().view(torch.uint8).numpy()
        buffer[: len(weights)] = weights.tobytes()
        self.tier.start_write(self.offsets[state.name], memoryview(buffer), f"{state.name}.mirror").wait()

    def read(self, block):
        buffer = mmap.mmap(-1, self.sizes[block])
        self.tier.start_read(self.offsets[block], memoryview(buffer), f"{block}.mirror").wait()
        return bytes(buffer)


def trained(tmp_path, home, *, mirrors):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, pins=Pins(weight_slots=1))
    optimizer, losses, disk = adamw(model), [], None
    for seed in range(3):
        loss = loss_of(model(**ZOO["llama"].batch(seed=seed)))
        losses.append(float(loss.detach()))
        loss.backward()
        if mirrors and disk is None:
            disk = SecondDisk(records_of(model))
            add_traffic(model, mirror_updates, Mirror, disk.mirror)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, disk


@pytest.mark.parametrize("home", ["disk", "host"])
def test_every_update_is_mirrored_to_a_second_disk(home, tmp_path):
    model, losses, disk = trained(tmp_path, home, mirrors=True)
    executed, trained_blocks = (
        plan_executed(model),
        {n for n, r in records_of(model).items() if r.num_trainable},
    )
    assert executed == list(plan_ahead(model))
    assert {op.block for op in executed if isinstance(op, Mirror)} == trained_blocks
    settle_updates(model)
    for block in trained_blocks:
        weights = bytes_of_weights(model, block)
        assert disk.read(block)[: len(weights)] == weights, block
    _, plain, _ = trained(tmp_path, home, mirrors=False)
    assert losses == plain


def test_a_mirror_is_checked_printed_and_simulated_as_all_traffic_is():
    records = blocks(4)
    names, passes = list(records), (*PASSES, mirror_updates)
    placement = place(
        list(records.values()), {Home.DEVICE: 1 << 50}, home=Home.HOST, has_disk=False, pins=Pins()
    )
    occupancy = Occupancy(pending=frozenset(names))
    plan = make_plan(Context(call(names), records, placement, occupancy), passes)
    check(plan, records, placement)
    assert Plan.parse(str(plan)) == plan
    mirrored = [op for op in plan if isinstance(op, Mirror)]
    assert [op.block for op in mirrored] == names
    own = costs(names, 1.0, 3.0)
    plain = simulate(call(names), records, placement, HOST, own)
    both = simulate(call(names), records, placement, HOST, own, passes=passes)
    assert plain.bytes_moved.get(Resource.WRITE, 0) == 0
    assert both.bytes_moved[Resource.WRITE] == pytest.approx(sum(op.num_bytes for op in mirrored), rel=1e-6)
