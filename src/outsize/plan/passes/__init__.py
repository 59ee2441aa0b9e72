"""Passes, one file each: a pass adds the operations of one policy to the plan that `build` makes."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.plan.build import build
from outsize.plan.context import Context, Pass
from outsize.plan.op import Hint
from outsize.plan.passes.activation_offload import offload_activations
from outsize.plan.passes.commits import add_commits
from outsize.plan.passes.updates import add_updates
from outsize.plan.plan import Plan

PASSES: tuple[Pass, ...] = (add_updates, add_commits, offload_activations)
"""What every plan goes through."""


def make_plan(context: Context, passes: Sequence[Pass] = PASSES) -> Plan:
    """The plan of a call: computing and slots, with what each pass adds."""
    plan = build(context)
    for add in passes:
        plan = add(plan, context)
    return Plan(tuple(op for op in plan if not isinstance(op, Hint)))
