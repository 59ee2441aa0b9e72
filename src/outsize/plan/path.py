"""Where bytes pass between the home they live in and the place where blocks compute: a path of legs.

    DISK, FILE --DRIVE--> HOST --LINK--> DEVICE      blocks compute on a device with memory of its own
    DISK, FILE --DRIVE--> DEVICE                     the processor computes: the host's memory is the device's

`outsize.store.path` moves bytes along these legs, and `lower` says how long each takes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from outsize.config import Home
from outsize.plan.profile import Resource


class Leg(NamedTuple):
    """A hop between two neighbouring memories: what it keeps busy on the way to computing, and on the way back."""

    inward: Resource
    outward: Resource


DRIVE = Leg(Resource.READ, Resource.WRITE)
LINK = Leg(Resource.UP, Resource.DOWN)


@cache
def legs(start: Home, end: Home, host: Home) -> tuple[Leg, ...]:
    """The path from `start` to `end`, in the direction of computing; `host` is the host's memory (`Placement.host`)."""
    if start is end:
        return ()
    if start is Home.HOST:
        return (LINK,)
    return (DRIVE, *legs(host, end, host))
