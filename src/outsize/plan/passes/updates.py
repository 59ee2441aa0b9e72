"""Pending updates: each block applies its own before its first visit."""

from __future__ import annotations

from outsize.plan.context import Context
from outsize.plan.op import Hint, Update
from outsize.plan.plan import Plan


def add_updates(plan: Plan, context: Context) -> Plan:
    """Start each pending update as soon as the weights that it changes are there or on their way."""
    pending = context.occupancy.pending
    return plan.expanded(
        lambda op: (op, Update(op.block)) if isinstance(op, Hint) and op.block in pending else (op,)
    )
