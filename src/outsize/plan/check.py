"""What a legal plan is, in one place, and the memory it needs.

Checked before a plan runs: nothing is used before it is there, nothing is overwritten while it is in use, no class of
slots is overdrawn, and everything claimed for a gradient is given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outsize.block import Plane, Record
from outsize.plan.op import Backward, Claim, Forward, Free, Held, Op, Read, Update, Wait, Write
from outsize.plan.place import Placement, slot_class_of
from outsize.plan.plan import Plan


class PlanError(AssertionError):
    """A plan breaks a rule: a defect of the planner, never of the user."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most slots of each class that are claimed at once, and their bytes."""

    weight_slots: tuple[int, ...]
    gradient_slots: tuple[int, ...]
    num_bytes: int


class _Books:
    """Slots claimed per class of one plane."""

    def __init__(self, placement: Placement, plane: Plane) -> None:
        self.classes = placement.weight_classes if plane is Plane.WEIGHT else placement.gradient_classes
        self.claimed: list[set[str]] = [set() for _ in self.classes]
        self.peaks = [0] * len(self.classes)

    def is_claimed(self, block: str) -> bool:
        return any(block in claimed for claimed in self.claimed)

    def needs_slot(self, block: str) -> bool:
        return slot_class_of(self.classes, block) is not None

    def claim(self, block: str) -> None:
        index = slot_class_of(self.classes, block)
        if index is None:
            raise PlanError(f"{block} has no slot")
        if block in self.claimed[index]:
            raise PlanError(f"{block} has its slot already")
        if len(self.claimed[index]) == self.classes[index].count:
            raise PlanError(f"no slot left for {block}: held by {sorted(self.claimed[index])}")
        self.claimed[index].add(block)
        self.peaks[index] = max(self.peaks[index], len(self.claimed[index]))

    def free(self, block: str) -> None:
        if not self.is_claimed(block):
            raise PlanError(f"{block} holds no slot")
        for claimed in self.claimed:
            claimed.discard(block)


def check(plan: Plan, records: Mapping[str, Record], placement: Placement) -> Peaks:
    """Raise PlanError, with the place in the plan, unless `plan` is legal; return the memory it needs."""
    books = {plane: _Books(placement, plane) for plane in (Plane.WEIGHT, Plane.GRADIENT)}
    waited: set[tuple[str, Plane]] = set()
    summed: set[str] = set()
    updating: set[str] = set()
    for index, op in enumerate(plan):
        try:
            if op.block not in records:
                raise PlanError(f"unknown block {op.block}")
            _step(op, index, books, waited, summed, updating, plan)
        except PlanError as error:
            raise PlanError(f"{error}\n{plan.excerpt(index)}") from None
    for claimed in books[Plane.GRADIENT].claimed:
        if claimed:
            raise PlanError(f"gradient slots are never given back: {sorted(claimed)}")
    weights, gradients = books[Plane.WEIGHT], books[Plane.GRADIENT]
    return Peaks(
        weight_slots=tuple(weights.peaks),
        gradient_slots=tuple(gradients.peaks),
        num_bytes=sum(
            peak * group.slot_bytes
            for book in (weights, gradients)
            for peak, group in zip(book.peaks, book.classes, strict=True)
        ),
    )


def _step(
    op: Op,
    index: int,
    books: dict[Plane, _Books],
    waited: set[tuple[str, Plane]],
    summed: set[str],
    updating: set[str],
    plan: Plan,
) -> None:
    weights = books[Plane.WEIGHT]

    def is_there(block: str, plane: Plane) -> bool:
        return not books[plane].needs_slot(block) or books[plane].is_claimed(block)

    match op:
        case Held(block, plane):
            if any(not isinstance(earlier, Held) for earlier in plan.ops[:index]):
                raise PlanError("held stands only at the start")
            books[plane].claim(block)
        case Read(block, plane) | Claim(block, plane):
            books[plane].claim(block)
            waited.discard((block, plane))
        case Update(block):
            if not is_there(block, Plane.WEIGHT):
                raise PlanError(f"{block} is updated before its weights are read")
            waited.discard((block, Plane.WEIGHT))
            updating.add(block)
        case Wait(block, plane):
            if not is_there(block, plane):
                raise PlanError(f"wait for {block}.{plane}, which nothing reads")
            waited.add((block, plane))
            if plane is Plane.WEIGHT:
                updating.discard(block)
        case Forward(block):
            if (block, Plane.WEIGHT) not in waited or not is_there(block, Plane.WEIGHT):
                raise PlanError(f"{block} runs before its weights are waited for")
        case Backward(block):
            if weights.is_claimed(block) and (block, Plane.WEIGHT) not in waited:
                raise PlanError(f"{block} runs before its weights are waited for")
            if block in updating:
                raise PlanError(f"{block} runs while it is being updated")
            summed.add(block)
        case Write(block, _):
            if block not in summed or not is_there(block, Plane.GRADIENT):
                raise PlanError(f"the gradient of {block} is written before backward")
            summed.discard(block)
        case Free(block, plane):
            if plane is Plane.GRADIENT and block in summed:
                raise PlanError(f"the gradient of {block} is dropped before it is written")
            books[plane].free(block)
            waited.discard((block, plane))
        case _:
            raise PlanError(f"no rule for {op}")
