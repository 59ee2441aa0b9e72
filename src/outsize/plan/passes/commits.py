"""Commits: a block joins the commit under way as soon as its update is applied, and before the next one."""

from __future__ import annotations

from collections.abc import Iterator

from outsize.block import Plane, Record
from outsize.plan.context import Context
from outsize.plan.op import Copy, Op, Wait
from outsize.plan.place import IN_MEMORY, Placement
from outsize.plan.plan import Plan


def add_commits(plan: Plan, context: Context) -> Plan:
    """Copy each block that a commit waits for once its weights are current."""
    waiting = set(context.occupancy.committing)

    def after(op: Op) -> Iterator[Op]:
        yield op
        if isinstance(op, Wait) and op.plane is Plane.WEIGHT and op.block in waiting:
            waiting.discard(op.block)
            record = context.records[op.block]
            yield Copy(op.block, sum(copied_bytes(record, context.placement).values()))

    return plan.expanded(after) if waiting else plan


def copied_bytes(record: Record, placement: Placement) -> dict[Plane, int]:
    """Bytes of the planes of a block that live in memory, which a commit copies to the disk."""
    return {
        plane: int(len(record.stored_range(plane)) * record.element_bytes[plane])
        for plane in (Plane.WEIGHT, *record.state)
        if placement.home(record.name, plane.group) in IN_MEMORY
    }
