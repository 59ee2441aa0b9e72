"""What a legal plan is, in one place, and the memory it needs.

Checked before a plan runs: nothing is used before it is there, nothing is overwritten while it is in use, no class of
slots is overdrawn, and everything claimed for a gradient is given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outsize.block import Plane, Record
from outsize.plan.op import (
    Backward,
    Copy,
    Fetch,
    Forward,
    Free,
    Held,
    Op,
    Send,
    Update,
    Wait,
    Write,
)
from outsize.plan.place import Placement, SlotClass
from outsize.plan.plan import Plan


class PlanError(AssertionError):
    """A plan breaks a rule: a defect of the planner, never of the user."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most slots of each class that are claimed at once, and their bytes."""

    weight_slots: tuple[int, ...]
    gradient_slots: tuple[int, ...]
    num_bytes: int


def check(plan: Plan, records: Mapping[str, Record], placement: Placement) -> Peaks:
    """Raise PlanError, with the place in the plan, unless `plan` is legal; return the memory it needs."""
    checker = _Checker(placement)
    for index, op in enumerate(plan):
        try:
            _require(op.block in records, f"unknown block {op.block}")
            checker.step(op)
        except PlanError as error:
            raise PlanError(f"{error}\n{plan.excerpt(index)}") from None
    checker.end()
    weights, gradients = checker.slots[Plane.WEIGHT], checker.slots[Plane.GRADIENT]
    return Peaks(
        weight_slots=tuple(weights.peaks),
        gradient_slots=tuple(gradients.peaks),
        num_bytes=sum(
            peak * group.slot_bytes
            for slots in (weights, gradients)
            for peak, group in zip(slots.peaks, slots.classes, strict=True)
        ),
    )


class _Slots:
    """Slots claimed per class of one plane."""

    def __init__(self, classes: Sequence[SlotClass]) -> None:
        self.classes = classes
        self.class_of = {block: index for index, each in enumerate(classes) for block in each.blocks}
        self.claimed: list[set[str]] = [set() for _ in classes]
        self.peaks = [0] * len(classes)

    def is_claimed(self, block: str) -> bool:
        return block in self.class_of and block in self.claimed[self.class_of[block]]

    def is_there(self, block: str) -> bool:
        """Whether the block has its slot, or needs none."""
        return block not in self.class_of or block in self.claimed[self.class_of[block]]

    def claim(self, block: str) -> None:
        _require(block in self.class_of, f"{block} has no slot")
        index = self.class_of[block]
        claimed = self.claimed[index]
        _require(block not in claimed, f"{block} has its slot already")
        if len(claimed) == self.classes[index].count:
            raise PlanError(f"no slot left for {block}: held by {sorted(claimed)}")
        claimed.add(block)
        self.peaks[index] = max(self.peaks[index], len(claimed))

    def free(self, block: str) -> None:
        _require(self.is_claimed(block), f"{block} holds no slot")
        self.claimed[self.class_of[block]].discard(block)


class _Checker:
    """What holds after the operations so far."""

    def __init__(self, placement: Placement) -> None:
        self.slots = {plane: _Slots(placement.slots[plane.group]) for plane in (Plane.WEIGHT, Plane.GRADIENT)}
        self.has_begun = False
        self.waited: set[tuple[str, Plane]] = set()
        self.summed: set[str] = set()
        self.updating: set[str] = set()
        # Inputs by block: on their way out and still in memory, away, and on their way back.
        self.leaving, self.away, self.coming = Counter[str](), Counter[str](), Counter[str]()

    def step(self, op: Op) -> None:
        """Raise PlanError if `op` may not come next."""
        block = op.block
        _require(not (self.has_begun and isinstance(op, Held)), "held stands only at the start")
        self.has_begun |= not isinstance(op, Held)
        if op.plane is Plane.INPUT:
            self._step_input(op)
            return
        if op.plane is not None and op.claims:
            self.slots[op.plane].claim(block)
            self.waited.discard((block, op.plane))
        match op:
            case Update():
                _require(self._has(block, Plane.WEIGHT), f"{block} is updated before its weights are read")
                self.waited.discard((block, Plane.WEIGHT))
                self.updating.add(block)
            case Wait(_, plane):
                _require(self._has(block, plane), f"wait for {block}.{plane}, which nothing reads")
                self.waited.add((block, plane))
                if plane is Plane.WEIGHT:
                    self.updating.discard(block)
            case Forward():
                is_usable = (block, Plane.WEIGHT) in self.waited and self._has(block, Plane.WEIGHT)
                _require(is_usable, f"{block} runs before its weights are waited for")
            case Backward():
                is_usable = (block, Plane.WEIGHT) in self.waited
                is_usable |= not self.slots[Plane.WEIGHT].is_claimed(block)
                _require(is_usable, f"{block} runs before its weights are waited for")
                _require(block not in self.updating, f"{block} runs while it is being updated")
                self.summed.add(block)
            case Write():
                is_summed = block in self.summed and self._has(block, Plane.GRADIENT)
                _require(is_summed, f"the gradient of {block} is written before backward")
                self.summed.discard(block)
            case Free(_, plane):
                is_dropped = plane is Plane.GRADIENT and block in self.summed
                _require(not is_dropped, f"the gradient of {block} is dropped before it is written")
                self.slots[plane].free(block)
                self.waited.discard((block, plane))
            case Copy():
                _require(
                    (block, Plane.WEIGHT) in self.waited and block not in self.updating,
                    f"{block} is copied before its update is waited for",
                )
            case _:
                pass  # traffic that a pass of someone else adds

    def _step_input(self, op: Op) -> None:
        block = op.block
        match op:
            case Held():
                self.away[block] += 1
            case Send():
                self.leaving[block] += 1
            case Free():
                if self.leaving[block]:
                    self.leaving[block] -= 1
                    self.away[block] += 1
                # Else it was sent before this plan.
                _require(self.away[block] > 0, f"the input of {block} is freed before it is sent")
            case Fetch():
                _require(self.away[block] > 0, f"the input of {block} is fetched before it was sent")
                self.away[block] -= 1
                self.coming[block] += 1
            case Wait():
                _require(self.coming[block] > 0, f"wait for {block}.input, which nothing fetches")
                self.coming[block] -= 1
            case _:
                raise PlanError(f"no rule for {op}")

    def end(self) -> None:
        """Raise PlanError unless the plan may end here."""
        for claimed in self.slots[Plane.GRADIENT].claimed:
            _require(not claimed, f"gradient slots are never given back: {sorted(claimed)}")
        leaving = sorted((+self.leaving).keys())
        _require(not leaving, f"inputs are never freed: {leaving}")

    def _has(self, block: str, plane: Plane) -> bool:
        return self.slots[plane].is_there(block)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(message)
