"""The ledger: the only accounting of memory and disk, a value that says how many bytes of each home are for what.

Every part of a run contributes a ledger of its own (the process, the activations of a call, the planes and slots of a
placement, a KV cache). Their sum is what a budget is compared with, a preview and a report print, and an error names: two
figures of the same memory cannot differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import final

from outsize.block import Group, Plane, Record
from outsize.config import Home, format_bytes
from outsize.plan.place import Placement


class Purpose(StrEnum):
    """What bytes are for, named as in a table and in the order of its rows."""

    WEIGHTS = "weights"
    STATE = "optimizer state"
    GRADIENTS = "gradients"
    FILES = "weights, in their files"
    """Weights that are read from the model's own files each time; they take no memory and no disk of ours."""
    SPARE = "reserved for whole records and commits"
    """A record lies whole on the disk as soon as a part of it does, and a commit keeps a version of it."""
    SLOTS = "slots"
    BUFFERS = "buffers"
    """Planes pass through them on their way to a slot."""
    INPUTS = "inputs of blocks"
    """They wait here for their backward."""
    INPUT_BUFFERS = "buffers of inputs"
    ACTIVATIONS = "activations (most)"
    """Tensors between visits, where blocks compute."""
    VISIT = "a visit"
    """The most that one visit takes beside its weights; a table adds it to the activations."""
    KV = "KV cache"
    PROCESS = "Python and libraries"
    """What was taken before anything was placed; of a device, by libraries and by tensors of others."""
    READING = "reading"
    """What reading a block from its source takes beside the memory that it is read into."""
    FREED = "freed memory"
    """Freed activations fit badly into one another; they are kept where there is room for a second visit."""
    SLACK = "slack"
    """Left for what is not planned."""


PURPOSE_OF = {
    Group.WEIGHT: Purpose.WEIGHTS,
    Group.GRADIENT: Purpose.GRADIENTS,
    Group.STATE: Purpose.STATE,
}
"""What each group of planes is for."""

ACTIVATIONS = (Purpose.ACTIVATIONS, Purpose.VISIT)
"""Of a call, where blocks compute."""

WAITING = (Purpose.INPUTS, Purpose.INPUT_BUFFERS)
"""Of a call, where inputs wait and on their way there."""


@dataclass(frozen=True, slots=True)
class Row:
    """`num_bytes` of `what` live in `tier`."""

    tier: str
    what: str
    num_bytes: int


@final
@dataclass(frozen=True)
class Ledger:
    """Bytes by home and purpose; a line that is not there reads as 0."""

    lines: Mapping[tuple[Home, Purpose], int] = field(default_factory=dict)

    @classmethod
    def of(cls, home: Home, **purposes: int) -> Ledger:
        """Lines of one home, by the names of their purposes in lower case; those of 0 bytes are left out."""
        return cls({(home, Purpose[name.upper()]): size for name, size in purposes.items() if size})

    def __getitem__(self, line: tuple[Home, Purpose]) -> int:
        return self.lines.get(line, 0)

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger({line: self[line] + other[line] for line in {**self.lines, **other.lines}})

    def total(self, home: Home, *purposes: Purpose) -> int:
        """Bytes of a home, for `purposes` or, if none are given, for all."""
        return sum(
            num_bytes
            for (where, purpose), num_bytes in self.lines.items()
            if where is home and (not purposes or purpose in purposes)
        )

    def rows(self) -> tuple[Row, ...]:
        """The lines of a table, by home and in the order of purposes; those of 0 bytes are left out."""
        found: Counter[tuple[Home, Purpose]] = Counter()
        for home in Home:
            for purpose in Purpose:
                # Weights in the model's own files are listed beside what is on our disks.
                where = Home.DISK if home is Home.FILE else home
                row = Purpose.ACTIVATIONS if purpose is Purpose.VISIT else purpose
                found[where, row] += self[home, purpose]
        return tuple(Row(str(home), str(row), size) for (home, row), size in found.items() if size)

    def __str__(self) -> str:
        rows = self.rows()
        tier = max((len(row.tier) for row in rows), default=0)
        what = max((len(row.what) for row in rows), default=0)
        return "\n".join(
            f"{row.tier:<{tier}}  {row.what:<{what}}  {format_bytes(row.num_bytes):>10}" for row in rows
        )


EMPTY = Ledger()


def larger(*uses: Ledger) -> Ledger:
    """The peak of calls that follow one another: in each home, the lines of the call that takes most there.

    Memory in which inputs wait stays allocated between calls, so the most of it is in the peak whatever else a call takes.
    """
    lines: Counter[tuple[Home, Purpose]] = Counter()
    for home in Home:
        transient = [purpose for purpose in Purpose if purpose not in WAITING]
        most = max(uses, key=lambda use: use.total(home, *transient))
        lines.update({(home, purpose): most[home, purpose] for purpose in transient})
        lines.update({(home, purpose): max(use[home, purpose] for use in uses) for purpose in WAITING})
    return Ledger({line: size for line, size in lines.items() if size})


def placed(records: Sequence[Record], placement: Placement, computes_in: Home) -> Ledger:
    """What a placement takes: planes in their homes, and the slots and buffers that those which move pass through."""
    lines: Counter[tuple[Home, Purpose]] = Counter()
    by_name = {record.name: record for record in records}
    for (name, group), home in placement.homes.items():
        where = computes_in if home is Home.DEVICE else home
        purpose = Purpose.FILES if home is Home.FILE else PURPOSE_OF[group]
        lines[where, purpose] += by_name[name].group_bytes[group]
    for name, index in placement.pieces:
        record = by_name[name]
        size = record.entries[index].piece.num_elements * record.element_bytes[Plane.WEIGHT]
        lines[Home.FILE, Purpose.FILES] -= int(size)
    lines[computes_in, Purpose.WEIGHTS] += placement.pieces_bytes
    lines[computes_in, Purpose.SLOTS] += placement.slots_bytes
    lines[Home.HOST, Purpose.BUFFERS] += placement.passage_bytes
    ledger = Ledger(lines)
    return ledger + Ledger.of(Home.DISK, spare=max(0, placement.disk_bytes - ledger.total(Home.DISK)))
