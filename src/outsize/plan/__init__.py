"""The plan as a value: operations, placement, building, checking. Imports no torch and holds no tensor."""

from outsize.plan.check import Peaks, PlanError, check
from outsize.plan.context import Context, Direction, Occupancy, Pass, Visit
from outsize.plan.op import (
    Backward,
    Claim,
    Copy,
    Fetch,
    Forward,
    Free,
    Held,
    Op,
    Read,
    Send,
    Update,
    Wait,
    Write,
)
from outsize.plan.passes import PASSES, make_plan
from outsize.plan.place import (
    GRADIENT_SUM_BYTES,
    IN_MEMORY,
    Placement,
    SlotClass,
    evicted,
    is_stored,
    place,
    sums_in_place,
)
from outsize.plan.plan import Plan

__all__ = [
    "GRADIENT_SUM_BYTES",
    "IN_MEMORY",
    "PASSES",
    "Backward",
    "Claim",
    "Context",
    "Copy",
    "Direction",
    "Fetch",
    "Forward",
    "Free",
    "Held",
    "Occupancy",
    "Op",
    "Pass",
    "Peaks",
    "Placement",
    "Plan",
    "PlanError",
    "Read",
    "Send",
    "SlotClass",
    "Update",
    "Visit",
    "Wait",
    "Write",
    "check",
    "evicted",
    "is_stored",
    "make_plan",
    "place",
    "sums_in_place",
]
