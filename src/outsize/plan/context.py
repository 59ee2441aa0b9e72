"""What a plan is made from: the visits of a call, the layout of records, where planes live, and what is there already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from outsize.block import Record
from outsize.plan.place import Placement
from outsize.plan.plan import Plan


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
    joins_next: bool = False
    """Computed together with the next visit: their gradients are written after both (parameters of two blocks)."""

    @property
    def key(self) -> tuple[str, Direction, bool]:
        """What makes two visits the same to one who asks for a block."""
        return self.block, self.direction, self.needs_weights


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the store of blocks looks like when a plan starts.

    `held`: blocks whose weights are in a slot. `pending`: blocks with an update to apply. `accumulated`: blocks whose
    gradient plane already holds a sum that backward adds to. `committing`: blocks that the commit under way waits for.
    `visiting`: blocks whose visits are under way and last longer than the plan, so that they keep their weights in a slot.
    `summing`: blocks that keep a slot for their gradient as long. `inputs`: `(block, num_bytes)` of visits whose inputs
    were sent away and are still needed, the oldest first; the memory of the last `num_leaving` was not given back yet.
    """

    held: Sequence[str] = ()
    pending: Collection[str] = ()
    accumulated: Collection[str] = ()
    committing: Collection[str] = ()
    visiting: Collection[str] = ()
    summing: Sequence[str] = ()
    inputs: Sequence[tuple[str, int]] = ()
    num_leaving: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """A call that makes `visits` in this order, from what `occupancy` says is there when it starts.

    `input_bytes`: what the backward of a visit needs of what its forward is given, by block; nothing of blocks that are
    left out.
    """

    visits: Sequence[Visit]
    records: Mapping[str, Record]
    placement: Placement
    occupancy: Occupancy = Occupancy()
    input_bytes: Mapping[str, int] = field(default_factory=dict)


Pass = Callable[[Plan, Context], Plan]
"""Adds the operations of one policy to a plan; changes neither argument."""
