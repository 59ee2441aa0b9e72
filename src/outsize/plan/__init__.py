"""The plan as a value: operations, placement, building, checking. Imports no torch and holds no tensor."""

from outsize.plan.build import Direction, Occupancy, Visit, build
from outsize.plan.check import Peaks, PlanError, check
from outsize.plan.op import Backward, Claim, Forward, Free, Held, Op, Read, Update, Wait, Write
from outsize.plan.place import (
    GRADIENT_SUM_BYTES,
    IN_MEMORY,
    Placement,
    SlotClass,
    evicted,
    is_stored,
    place,
    slot_class_of,
    sums_in_place,
)
from outsize.plan.plan import Plan

__all__ = [
    "GRADIENT_SUM_BYTES",
    "IN_MEMORY",
    "Backward",
    "Claim",
    "Direction",
    "Forward",
    "Free",
    "Held",
    "Occupancy",
    "Op",
    "Peaks",
    "Placement",
    "Plan",
    "PlanError",
    "Read",
    "SlotClass",
    "Update",
    "Visit",
    "Wait",
    "Write",
    "build",
    "check",
    "evicted",
    "is_stored",
    "place",
    "slot_class_of",
    "sums_in_place",
]
