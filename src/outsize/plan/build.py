"""From the order in which a call visits blocks to its plan.

The future of a call is known, so slots are managed as Belady would: a slot is taken from the block whose next use lies
furthest ahead, and never from one that is needed before the block it is taken for. Reads are started as early as slots
allow. Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from outsize.block import Plane, Record
from outsize.plan.op import Backward, Claim, Forward, Free, Held, Op, Read, Update, Wait, Write
from outsize.plan.place import Placement, SlotClass, sums_in_place
from outsize.plan.plan import Plan

LOOKAHEAD = 4
"""Visits; how far ahead reads and updates are started, slots permitting."""


class Direction(StrEnum):
    """What a visit does with its block."""

    FORWARD = "forward"
    BACKWARD = "backward"
    TOUCH = "touch"
    """Only bring the weights up to date: to read, save or flush them."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of a block. `needs_weights` is false for the backward of an embedding, which is linear in its table."""

    block: str
    direction: Direction
    needs_weights: bool = True
    trains: bool = False


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the store of blocks looks like when a call starts.

    `held`: blocks whose weights are in a slot. `pending`: blocks with an update to apply. `accumulated`: blocks whose
    gradient plane already holds a sum that backward adds to.
    """

    held: Sequence[str] = ()
    pending: Collection[str] = ()
    accumulated: Collection[str] = ()


def slot_class_of(classes: Sequence[SlotClass], block: str) -> int | None:
    """Index of the class whose slots `block` passes through; None where it needs none."""
    for index, group in enumerate(classes):
        if block in group.blocks:
            return index
    return None


def build(
    visits: Sequence[Visit],
    records: Mapping[str, Record],
    placement: Placement,
    occupancy: Occupancy,
) -> Plan:
    """The plan of a call that makes `visits` in this order."""
    return _Builder(visits, records, placement, occupancy).run()


@dataclass
class _Builder:
    visits: Sequence[Visit]
    records: Mapping[str, Record]
    placement: Placement
    occupancy: Occupancy
    ops: list[Op] = field(default_factory=list)

    def run(self) -> Plan:
        self.held = list(self.occupancy.held)
        self.ops = [Held(block, Plane.WEIGHT) for block in self.held]
        self.pending = set(self.occupancy.pending)
        self.accumulated = set(self.occupancy.accumulated)
        self.gradients: list[str] = []  # blocks that hold a gradient slot, oldest first
        self.read_ahead: set[str] = set()  # gradients whose old sum is being read
        self.weight_class = {b: slot_class_of(self.placement.weight_classes, b) for b in self.records}
        self.gradient_class = {b: slot_class_of(self.placement.gradient_classes, b) for b in self.records}
        for index, visit in enumerate(self.visits):
            self._bring(index, index)
            for ahead in range(index + 1, min(index + 1 + LOOKAHEAD, len(self.visits))):
                self._bring(ahead, index)
            self._compute(visit)
        for block in list(self.gradients):
            self._free_gradient(block)
        return Plan(tuple(self.ops))

    def _bring(self, index: int, now: int) -> None:
        """Start reading and updating what visit `index` needs, if slots allow (visit `now` itself must be brought)."""
        visit = self.visits[index]
        block = visit.block
        wanted = visit.needs_weights or block in self.pending
        if wanted and (group := self.weight_class[block]) is not None and block not in self.held:
            if not self._make_room(group, index, now):
                assert index != now, f"no slot for {visit}"
                return
            self.held.append(block)
            self.ops.append(Read(block, Plane.WEIGHT, self.records[block].plane_bytes(Plane.WEIGHT)))
        if block in self.pending:
            self.pending.discard(block)
            self.ops.append(Update(block))
        if visit.direction is Direction.BACKWARD and visit.trains:
            self._bring_gradient(block, index, now)

    def _make_room(self, group: int, index: int, now: int) -> bool:
        members = [block for block in self.held if self.weight_class[block] == group]
        if len(members) < self.placement.weight_classes[group].count:
            return True
        protected = {visit.block for visit in self.visits[now : index + 1]}
        candidates = [block for block in members if block not in protected]
        if not candidates:
            return False
        victim = max(candidates, key=lambda block: self._next_use(block, index))
        self.held.remove(victim)
        self.ops.append(Free(victim, Plane.WEIGHT))
        return True

    def _next_use(self, block: str, after: int) -> int:
        for index in range(after + 1, len(self.visits)):
            if self.visits[index].block == block and self.visits[index].needs_weights:
                return index
        # The next call starts over: what it visits first is worth keeping.
        first = next((i for i, visit in enumerate(self.visits) if visit.block == block), len(self.visits))
        return len(self.visits) + first

    def _bring_gradient(self, block: str, index: int, now: int) -> None:
        group = self.gradient_class[block]
        if group is None or block in self.gradients:
            return
        if any(visit.block == block and visit.trains for visit in self.visits[now:index]):
            return  # its sum is not complete yet
        members = [name for name in self.gradients if self.gradient_class[name] == group]
        if len(members) >= self.placement.gradient_classes[group].count:
            if index != now:
                return
            self._free_gradient(members[0])
        self.gradients.append(block)
        if block in self.accumulated:
            self.ops.append(Read(block, Plane.GRADIENT, self._gradient_bytes(block)))
            self.read_ahead.add(block)
        else:
            self.ops.append(Claim(block, Plane.GRADIENT))

    def _compute(self, visit: Visit) -> None:
        block = visit.block
        if visit.needs_weights or block in self.held:  # what is still arriving in a slot is not left unwatched
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
            self.accumulated.add(block)
            self.ops.append(Write(block, Plane.GRADIENT, self._gradient_bytes(block)))

    def _free_gradient(self, block: str) -> None:
        self.gradients.remove(block)
        self.ops.append(Free(block, Plane.GRADIENT))

    def _gradient_bytes(self, block: str) -> int:
        record = self.records[block]
        if sums_in_place(record, self.placement.is_resident(block, Plane.GRADIENT)):
            return 0
        return record.num_trainable * record.element_bytes[Plane.GRADIENT]
