"""Activation offload: inputs of blocks leave the memory where blocks compute and come back for the backward.

An input is sent beside the forward of its own block, and fetched one block ahead of its backward, so that the inputs of
a few visits take memory however deep the model is. Source: activation offloading as in ZeRO-Infinity (Rajbhandari et al.,
2021), https://arxiv.org/abs/2104.07857.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from outsize.block import Group, Plane
from outsize.config import Home
from outsize.plan.context import Context, Direction
from outsize.plan.op import Backward, Fetch, Forward, Free, Held, Op, Send, Wait
from outsize.plan.plan import Plan

NUM_LEAVING = 2
"""Visits whose inputs may be on their way at once; those of the last are still there when the backward begins."""


def offload_activations(plan: Plan, context: Context) -> Plan:
    """Send and fetch the inputs of visits where the placement has a home for them."""
    computes = any(visit.direction is not Direction.TOUCH for visit in context.visits)
    if context.placement.inputs is None or not computes:
        return plan
    held = tuple(Held(block, Plane.INPUT) for block, _ in context.occupancy.inputs)
    inputs = _Inputs(context)
    plan = plan.expanded(inputs.around)
    return Plan((*held, *plan, *inputs.release(0)))


@dataclass(eq=False, slots=True)
class _Input:
    block: str
    num_bytes: int
    is_fetched: bool = False


class _Inputs:
    """Inputs that wait for their backward, in the order of their forwards; `leaving` are still in memory."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.waiting = [_Input(*each) for each in context.occupancy.inputs]
        self.leaving = deque(self.waiting[len(self.waiting) - context.occupancy.num_leaving :])

    def around(self, op: Op) -> Iterator[Op]:
        """`op`, after what its inputs need first."""
        match op:
            case Forward(block):
                yield from self._send(block)
            case Backward(block):
                yield from self._bring(block)
            case _:
                pass
        yield op

    def release(self, num_visits: int) -> Iterator[Op]:
        """Wait until all inputs are away but those of the last `num_visits`."""
        while len(self.leaving) > num_visits:
            yield Free(self.leaving.popleft().block, Plane.INPUT)

    def _send(self, block: str) -> Iterator[Op]:
        num_bytes = self.context.input_bytes.get(block, 0)
        if num_bytes and self.context.placement.home(block, Group.INPUT) is not Home.DEVICE:
            yield from self.release(NUM_LEAVING - 1)
            each = _Input(block, num_bytes)
            self.waiting.append(each)
            self.leaving.append(each)
            yield Send(block, Plane.INPUT, num_bytes)

    def _bring(self, block: str) -> Iterator[Op]:
        """The input of the block's last visit, fetched one visit before, and now that of the visit that comes next."""
        indices = reversed(range(len(self.waiting)))
        index = next((i for i in indices if self.waiting[i].block == block), None)
        if index is None:
            return
        own = self.waiting.pop(index)
        yield from self._fetch(own)
        if index:
            yield from self._fetch(self.waiting[index - 1])
        if own.is_fetched:
            yield Wait(block, Plane.INPUT)

    def _fetch(self, each: _Input) -> Iterator[Op]:
        if not each.is_fetched and each not in self.leaving:
            each.is_fetched = True
            yield Fetch(each.block, Plane.INPUT, each.num_bytes)
