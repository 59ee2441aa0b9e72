"""Small plans that a person can read, each in a file of `golden/`: what the planner does, in a dozen examples.

A change of the planner shows as a difference of these texts, to be read line by line. If it is meant:

    python -m tests.plan.golden_plans

writes the files again; the difference then belongs to the commit, and its message says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from outsize.block import Block, Group, Piece, Plane, Record
from outsize.config import Home, Pins
from outsize.plan import Context, Direction, Occupancy, Placement, Visit, check, make_plan, place
from outsize.plan.place import GROUPS

FOLDER = Path(__file__).with_name("golden")
PLENTY = 1 << 40
"""Bytes."""

STATE = (Plane.MOMENT1, Plane.MOMENT2)
_WHERE = {Home.DEVICE: "stays", Home.HOST: "in memory", Home.DISK: "on disk", Home.FILE: "on disk"}


@dataclass(frozen=True)
class Golden:
    """A plan with its story: blocks of 1,024 elements unless `sizes` says otherwise, in fp32 with AdamW's two moments."""

    name: str
    story: str
    visits: Sequence[Visit]
    placing: Mapping[str, Any] = field(default_factory=lambda: {"home": Home.DISK})
    """Arguments of `place`; `device_bytes` are of a device with memory of its own."""
    occupancy: Occupancy = field(default_factory=Occupancy)
    sizes: Mapping[str, int] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    def records(self) -> dict[str, Record]:
        """The records of the blocks that are visited, in the order of their first visit, and of those in `sizes`."""
        names = dict.fromkeys([*self.sizes, *(visit.block for visit in self.visits)])
        forward = [visit.block for visit in self.visits if visit.direction is Direction.FORWARD]
        return {name: self._record(name, is_shared=forward.count(name) > 1) for name in names}

    def _record(self, name: str, *, is_shared: bool) -> Record:
        sizes = {Plane.WEIGHT: 2, Plane.GRADIENT: 4 if is_shared else 2, Plane.MOMENT1: 4, Plane.MOMENT2: 4}
        block = Block(name, (Piece(f"{name}.weight", (self.sizes.get(name, 1024),)),))
        return Record.lay_out(block, [name not in self.frozen], STATE, sizes)

    def text(self) -> str:
        """The story, where planes live, and the plan."""
        records = self.records()
        placement = placed(list(records.values()), self.placing)
        plan = make_plan(Context(self.visits, records, placement, self.occupancy))
        peaks = check(plan, records, placement)
        lines = [f"# {line}" for line in wrap(self.story, 100)]
        lines += [f"# {name}: {', '.join(_homes(placement, record))}" for name, record in records.items()]
        lines += [f"# slots at most: {peaks.weight_slots} for weights, {peaks.gradient_slots} for gradients"]
        return "\n".join([*lines, "", str(plan), ""])


def placed(records: Sequence[Record], options: Mapping[str, Any]) -> Placement:
    """A placement with more memory than it needs, unless `options` say otherwise."""
    options = {"home": None, "has_disk": True, "pins": Pins(weight_slots=2, gradient_slots=1), **options}
    arena_bytes, device_bytes = options.pop("arena_bytes", PLENTY), options.pop("device_bytes", None)
    room = (
        {Home.DEVICE: arena_bytes} if device_bytes is None else {Home.DEVICE: device_bytes, Home.HOST: PLENTY}
    )
    return place(records, room, **options)


def _homes(placement: Placement, record: Record) -> Iterable[str]:
    for group in GROUPS if record.num_trainable else (Group.WEIGHT,):
        yield f"{group} {_WHERE[placement.home(record.name, group)]}"


def forward(*names: str) -> list[Visit]:
    return [Visit(name, Direction.FORWARD) for name in names]


def backward(*names: str, trains: bool = True, needs_weights: bool = True) -> list[Visit]:
    return [Visit(name, Direction.BACKWARD, needs_weights, trains) for name in names]


ABC = [*forward("A", "B", "C"), *backward("C", "B", "A")]
ALL = frozenset("ABC")

GOLDEN = [
    Golden(
        "one_block_more_than_slots",
        "The first step of a model of three blocks on the disk, through two slots. C and B are still there when the "
        "backward comes to them; A has to be read twice. Each gradient goes home when its block is done.",
        ABC,
    ),
    Golden(
        "a_later_step",
        "The same in the next step: B and A are held from the backward before, and each block has an update to "
        "apply, which it does at its first visit.",
        ABC,
        occupancy=Occupancy(held=("B", "A"), pending=ALL),
    ),
    Golden(
        "a_second_micro_batch",
        "Gradients are accumulated: the sum so far is read, added to, and written.",
        ABC,
        occupancy=Occupancy(held=("B", "A"), accumulated=ALL),
    ),
    Golden(
        "two_gradient_slots",
        "With two slots for gradients, one is written while the next block computes.",
        ABC,
        {"home": Home.DISK, "pins": Pins(weight_slots=2, gradient_slots=2)},
    ),
    Golden(
        "one_slot_of_each",
        "The least memory that works: what is read next waits until what is there was computed with.",
        ABC,
        {"home": Home.DISK, "pins": Pins(weight_slots=1, gradient_slots=1)},
    ),
    Golden(
        "everything_stays",
        "All planes stay in memory: nothing is read; updates and sums of gradients remain.",
        ABC,
        {"home": Home.HOST},
        Occupancy(pending=ALL),
    ),
    Golden(
        "a_part_stays",
        "Memory holds two of nine groups of planes beside the slots: weights first, which move most often.",
        ABC,
        {"pins": Pins(weight_slots=1, gradient_slots=1, resident_bytes=10_000)},
        Occupancy(pending=ALL),
    ),
    Golden(
        "a_tied_table",
        "The table T is the first block and the last: its gradient is summed over both of its visits, in fp32, and "
        "the visit as an embedding needs no weights to go back.",
        [
            *forward("T", "A", "B", "T"),
            *backward("T", "B", "A"),
            *backward("T", needs_weights=False),
        ],
        occupancy=Occupancy(pending={"T", "A", "B"}),
    ),
    Golden(
        "no_recompute_blocks",
        "B and C keep their activations for the backward, and so their weights stay; A is computed again.",
        ABC,
        {"home": Home.DISK, "kept": frozenset("BC")},
        Occupancy(pending=ALL),
    ),
    Golden(
        "a_frozen_block",
        "B does not train: the backward passes through it, and it has neither gradient nor update.",
        [*forward("A", "B", "C"), *backward("C"), *backward("B", trains=False), *backward("A")],
        occupancy=Occupancy(pending={"A", "C"}),
        frozen=frozenset("B"),
    ),
    Golden(
        "an_update_in_backward",
        "A is not visited forward, as a part of a model that one call skips, and has an update to apply: it does so "
        "in the backward, before its gradient is summed.",
        [*forward("B", "C"), *backward("C", "B", "A")],
        occupancy=Occupancy(pending=ALL),
    ),
    Golden(
        "joined_visits",
        "A layer whose parameters are in two blocks is one visit: gradients are written after both.",
        [
            *forward("A"),
            Visit("B", Direction.FORWARD, joins_next=True),
            Visit("C", Direction.FORWARD),
            Visit("B", Direction.BACKWARD, trains=True, joins_next=True),
            Visit("C", Direction.BACKWARD, trains=True),
            *backward("A"),
        ],
        {"home": Home.DISK, "pins": Pins(weight_slots=3, gradient_slots=2)},
    ),
    Golden(
        "reading_only",
        "Nothing trains, as in generating text: weights stream from their files, and stay in their slots until "
        "others need them.",
        [*forward("A", "B", "C"), *forward("A", "B", "C")],
        frozen=ALL,
    ),
    Golden(
        "one_parameter_is_read",
        "A parameter of B is looked at between steps: its update is applied, and nothing is computed.",
        [Visit("B", Direction.TOUCH)],
        occupancy=Occupancy(held=("C", "A"), pending=ALL),
        sizes={"A": 1024, "C": 1024},
    ),
    Golden(
        "two_sizes_of_blocks",
        "A large table and small layers have slots of their own, so that no layer waits for the table to leave.",
        [*forward("T", "A", "B"), *backward("B", "A", "T")],
        sizes={"T": 65_536},
    ),
    Golden(
        "a_device_and_memory",
        "Blocks compute on a device that holds the slots; all else lives in the memory of the host.",
        ABC,
        {"device_bytes": 1 << 20, "home": Home.HOST},
        Occupancy(pending=ALL),
    ),
    Golden(
        "a_device_that_holds_a_block",
        "One whole block stays on the device and moves nothing; the others live in the memory of the host.",
        ABC,
        {"device_bytes": 1 << 20, "pins": Pins(1, 1, resident_bytes=16_384)},
        Occupancy(pending=ALL),
    ),
]


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for golden in GOLDEN:
        (FOLDER / f"{golden.name}.txt").write_text(golden.text())
