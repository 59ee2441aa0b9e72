"""From the order in which a call visits blocks to a plan of computing and slots.

The future of a call is known, so slots are managed as Belady would: a slot is taken from the block whose next use lies
furthest ahead, and never from one that is needed before the block it is taken for. Reads are started as early as slots
allow. Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from outsize.block import Group, Plane
from outsize.config import Home
from outsize.errors import UsageError
from outsize.plan.context import Context, Direction, Visit
from outsize.plan.op import Backward, Claim, Forward, Free, Held, Hint, Op, Read, Wait, Write
from outsize.plan.place import GRADIENT_SUM_BYTES, sums_in_place
from outsize.plan.plan import Plan

LOOKAHEAD = 4
"""Visits; how far ahead reads and updates are started, slots permitting."""


def _no_slot(block: str, visiting: Collection[str]) -> UsageError:
    """A block is visited inside others that hold all slots of its size."""
    assert visiting, f"no slot for {block}"
    return UsageError(
        f"block {block} is visited inside {', '.join(sorted(visiting))}, which hold all slots of its size",
        hint="give more slots: Pins(weight_slots=..., gradient_slots=...)",
    )


def build(context: Context) -> Plan:
    """The visits of a call, and how their weights and gradients pass through slots; passes add everything else."""
    return _Builder(context).run()


@dataclass
class _Builder:
    context: Context
    ops: list[Op] = field(default_factory=list)

    def run(self) -> Plan:
        context = self.context
        self.visits, self.records, self.placement = context.visits, context.records, context.placement
        self.held = list(context.occupancy.held)
        self.ops = [Held(block, Plane.WEIGHT) for block in self.held]
        self.pending = set(context.occupancy.pending)  # updated at their first visit, which is to come
        self.accumulated = set(context.occupancy.accumulated)
        self.hinted: set[str] = set()
        self.gradients: list[str] = []  # blocks that hold a gradient slot, oldest first
        self.read_ahead: set[str] = set()  # gradients whose old sum is being read
        self.unwaited = set(self.held)  # blocks whose weights may still be arriving or changing
        self.written: set[str] = set()  # gradients that are on their way home
        self.unwritten: list[str] = []  # gradients summed by a group of joined visits
        self.weight_class = {b: self.placement.slot_class(b, Group.WEIGHT) for b in self.records}
        self.gradient_class = {b: self.placement.slot_class(b, Group.GRADIENT) for b in self.records}
        self.uses: defaultdict[str, list[int]] = defaultdict(list)  # visits that need a block's weights
        self.first_visit: dict[str, int] = {}
        for index, visit in enumerate(self.visits):
            self.first_visit.setdefault(visit.block, index)
            if visit.needs_weights:
                self.uses[visit.block].append(index)
        for index, visit in enumerate(self.visits):
            self._bring(index, index)
            for ahead in range(index + 1, min(index + 1 + LOOKAHEAD, len(self.visits))):
                self._bring(ahead, index)
            self._compute(visit)
        for block in list(self.gradients):
            self._free_gradient(block)
        return Plan(tuple(self.ops))

    def _bring(self, index: int, now: int) -> None:
        """Start reading what visit `index` needs, if slots allow (visit `now` itself must be brought)."""
        visit = self.visits[index]
        block = visit.block
        wanted = visit.needs_weights or block in self.pending
        if wanted and (group := self.weight_class[block]) is not None and block not in self.held:
            if not self._make_room(group, index, now):
                if index == now:
                    raise _no_slot(block, self.context.occupancy.visiting)
                return
            self.held.append(block)
            self.unwaited.add(block)
            self.ops.append(Read(block, Plane.WEIGHT, self.records[block].plane_bytes(Plane.WEIGHT)))
        if block in self.pending:
            self.pending.discard(block)
            self.unwaited.add(block)
        if block not in self.hinted:
            self.hinted.add(block)
            self.ops.append(Hint(block))
        if visit.direction is Direction.BACKWARD and visit.trains:
            self._bring_gradient(block, index, now)

    def _make_room(self, group: int, index: int, now: int) -> bool:
        members = [block for block in self.held if self.weight_class[block] == group]
        if len(members) < self.placement.slots[Group.WEIGHT][group].count:
            return True
        protected = {visit.block for visit in self.visits[now : index + 1]} | {
            *self.context.occupancy.visiting
        }
        candidates = [block for block in members if block not in protected]
        if not candidates:
            return False
        victim = max(candidates, key=lambda block: self._next_use(block, index))
        self.held.remove(victim)
        self.unwaited.discard(victim)  # freeing waits for whatever is still under way
        self.ops.append(Free(victim, Plane.WEIGHT))
        return True

    def _next_use(self, block: str, after: int) -> int:
        uses = self.uses[block]
        following = bisect_right(uses, after)
        if following < len(uses):
            return uses[following]
        # The next call starts over: what it visits first is worth keeping.
        return len(self.visits) + self.first_visit.get(block, len(self.visits))

    def _bring_gradient(self, block: str, index: int, now: int) -> None:
        group = self.gradient_class[block]
        if group is None:
            return
        if block in self.gradients:
            if index != now or block not in self.written or self._is_wide(block):
                return
            self._free_gradient(block)  # its sum was rounded in place: take it up again from its home
        if any(visit.block == block and visit.trains for visit in self.visits[now:index]):
            return  # its sum is not complete yet
        members = [name for name in self.gradients if self.gradient_class[name] == group]
        taken = [name for name in self.context.occupancy.summing if self.gradient_class[name] == group]
        if len(members) + len(taken) >= self.placement.slots[Group.GRADIENT][group].count:
            if index != now:
                return
            if not members:
                raise _no_slot(block, taken)
            # One that is on its way home; else one that was claimed ahead of its time.
            self._free_gradient(next((name for name in members if name in self.written), members[-1]))
        self.gradients.append(block)
        if block in self.accumulated:
            self.ops.append(Read(block, Plane.GRADIENT, self._gradient_bytes(block)))
            self.read_ahead.add(block)
        else:
            self.ops.append(Claim(block, Plane.GRADIENT))

    def _compute(self, visit: Visit) -> None:
        block = visit.block
        # An update also reads the gradient that backward writes.
        if visit.needs_weights or block in self.unwaited:
            self.unwaited.discard(block)
            self.ops.append(Wait(block, Plane.WEIGHT))
        if visit.direction is Direction.TOUCH:
            return
        if visit.direction is Direction.FORWARD:
            self.ops.append(Forward(block))
            return
        if block in self.read_ahead:
            self.read_ahead.discard(block)
            self.ops.append(Wait(block, Plane.GRADIENT))
        self.ops.append(Backward(block))
        if visit.trains:
            self.unwritten.append(block)
        if not visit.joins_next:
            for name in self.unwritten:
                self.accumulated.add(name)
                self.written.add(name)
                self.ops.append(Write(name, Plane.GRADIENT, self._gradient_bytes(name)))
            self.unwritten = []

    def _is_wide(self, block: str) -> bool:
        return self.records[block].element_bytes[Plane.GRADIENT] == GRADIENT_SUM_BYTES

    def _free_gradient(self, block: str) -> None:
        self.gradients.remove(block)
        self.written.discard(block)
        self.read_ahead.discard(block)
        self.ops.append(Free(block, Plane.GRADIENT))

    def _gradient_bytes(self, block: str) -> int:
        record = self.records[block]
        if sums_in_place(record, self.placement.home(block, Group.GRADIENT) is Home.DEVICE):
            return 0
        return int(record.num_trainable * record.element_bytes[Plane.GRADIENT])
