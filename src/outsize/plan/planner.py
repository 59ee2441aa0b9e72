"""Which of the placements that fit takes the least time: each is simulated, and the fastest is taken.

What is tried: how many slots weights and gradients pass through, of how many blocks weights, gradients and state stay in
memory, and, for each way of computing that the caller offers (rows of a tile, where inputs wait), what that leaves room
for. A way with smaller tiles never computes faster, so it is tried only where computing waits for something else.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from outsize.block import Record
from outsize.config import Pins
from outsize.errors import BudgetError
from outsize.plan.context import Visit
from outsize.plan.lower import Costs
from outsize.plan.place import Placement
from outsize.plan.profile import Profile
from outsize.plan.simulate import Simulation, least_s, simulate

SLOTS = ((3, 2), (2, 2), (2, 1), (1, 1), (4, 3), (6, 4))
"""Weight slots and gradient slots that are tried; the first is what is taken where nothing is known of the machine."""

NUM_GRIDS = 4
"""Of these, the first are tried with all that may stay in memory."""

PARTS = 4
"""Into as many parts the blocks are taken whose weights, or gradients, stay in memory."""

WORTH_A_CHANGE = 0.02
"""A way that computes less at once is tried only where computing waits for more than this part of a step, and taken only
where it saves as much: costs are timed, and times are never exact."""

FAR = 1.5
"""What takes longer than the fastest by this factor, even if the busiest resource never waited, is not simulated."""

CLOSE = 0.01
ENOUGH = 48
"""After so many simulations, what cannot be faster by more than this part is not simulated either."""

Way = TypeVar("Way")


@dataclass(frozen=True)
class Choice(Generic[Way]):
    """A placement that fits, and the figures of its simulation; `pins` lead to it."""

    way: Way
    pins: Pins
    placement: Placement
    costs: Costs
    simulation: Simulation

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.simulation.step_s


def choose(
    ways: Iterable[tuple[Way, Callable[[Pins], Placement], Callable[[], Costs]]],
    visits: Sequence[Visit],
    records: Mapping[str, Record],
    profile: Profile,
    pins: Pins,
    *,
    has_home: bool = False,
) -> list[Choice[Way]]:
    """What fits, the fastest first; of equals, what was tried first. What is pinned is left as it is, and what stays in
    memory also where planes have a home (`has_home`) that says so.

    Each way comes with a function that places planes beside it, which raises BudgetError where they do not fit, and one
    that gives what computing costs, asked only where something fits. Of all ways the numbers of slots are tried; of the
    fastest, what stays in memory too. Empty where nothing fits.
    """
    found: dict[int, list[Choice[Way]]] = {}
    known = list(ways)
    for index, (way, place, costs_of) in enumerate(known):
        tried = _placements(place, _slots(pins), set())
        found[index] = _simulated(tried, way, costs_of, visits, records, profile)
    if not any(found.values()):
        return []
    best = min((index for index in found if found[index]), key=lambda index: found[index][0].step_s)
    way, place, costs_of = known[best]
    seen = {choice.placement for choice in found[best]}
    stays = () if has_home else _stays(place, records, pins)
    tried = _placements(place, stays, seen)
    found[best] += _simulated(tried, way, costs_of, visits, records, profile, found[best][0].step_s)
    return sorted((each for some in found.values() for each in some), key=lambda choice: choice.step_s)


def _simulated(
    tried: Iterable[tuple[Pins, Placement]],
    way: Way,
    costs_of: Callable[[], Costs],
    visits: Sequence[Visit],
    records: Mapping[str, Record],
    profile: Profile,
    best_s: float = math.inf,
) -> list[Choice[Way]]:
    """Those of `tried` that may be as fast as `best_s`, or not much slower, the fastest first."""
    known = list(tried)
    found: dict[int, Choice[Way]] = {}
    with _uncollected():
        least = [least_s(visits, records, placement, profile, costs_of()) for _, placement in known]
        for index in sorted(range(len(known)), key=lambda index: least[index]):
            if least[index] > best_s * (FAR if len(found) < ENOUGH else 1 - CLOSE):
                break
            own, placement = known[index]
            simulation = simulate(visits, records, placement, profile, costs_of()).figures()
            found[index] = Choice(way, own, placement, costs_of(), simulation)
            best_s = min(best_s, simulation.step_s)
    return [choice for _, choice in sorted(found.items(), key=lambda item: (item[1].step_s, item[0]))]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: a simulation makes none, but so many objects that all of the process is searched."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def waits(simulation: Simulation) -> bool:
    """Whether computing waits so long that computing less at once may pay."""
    return sum(simulation.stall_s.values()) > WORTH_A_CHANGE * simulation.step_s


def prefer(own: list[Choice[Way]], others: list[Choice[Way]]) -> list[Choice[Way]]:
    """All, the fastest first, but `own` first where the others are hardly faster."""
    both = sorted([*own, *others], key=lambda choice: choice.step_s)
    if others and others[0].step_s < own[0].step_s * (1 - WORTH_A_CHANGE):
        return both
    return [own[0], *(choice for choice in both if choice is not own[0])]


def _placements(
    place: Callable[[Pins], Placement], variants: Iterable[Pins], seen: set[Placement]
) -> Iterator[tuple[Pins, Placement]]:
    """The placements that differ from each other and those in `seen`, with pins that lead to them."""
    for own in variants:
        placement = _try(place, own)
        if placement is not None and placement not in seen:
            seen.add(placement)
            yield own, placement


def _slots(pins: Pins) -> Iterator[Pins]:
    """`pins`, and with all numbers of slots that they leave open."""
    yield pins
    for weight_slots, gradient_slots in SLOTS:
        yield replace(
            pins,
            weight_slots=pins.weight_slots or weight_slots,
            gradient_slots=pins.gradient_slots or gradient_slots,
        )


def _stays(place: Callable[[Pins], Placement], records: Mapping[str, Record], pins: Pins) -> Iterator[Pins]:
    """The same with what stays in memory, where that is left open: of so many blocks, or, on a device, parts of all."""
    num_blocks, whole = len(records), sum(record.num_bytes for record in records.values())
    sizes = [whole * part // PARTS for part in range(PARTS)]
    if pins.resident is not None or pins.resident_bytes is not None:
        return
    for own in list(_slots(pins))[1 : 1 + NUM_GRIDS]:
        if _try(place, replace(own, resident=(0, 0, 0))) is None:
            for num_bytes in sizes:
                yield replace(own, resident_bytes=num_bytes)
        else:
            for weights in _parts(num_blocks):
                for gradients in _parts(num_blocks):
                    yield _filled(place, num_blocks, own, (weights, gradients, 0))


def _parts(count: int) -> list[int]:
    return sorted({round(count * part / PARTS) for part in range(PARTS + 1)})


def _filled(
    place: Callable[[Pins], Placement], num_blocks: int, pins: Pins, counts: tuple[int, int, int]
) -> Pins:
    """`pins` with as much in memory as there is room for beside `counts`: state first, which is what they leave out."""
    own = replace(pins, resident=counts)
    if _try(place, own) is None:
        return own
    for index in (2, 0, 1):
        fits, least = counts[index], counts[index]
        most = num_blocks
        if _try(place, replace(pins, resident=_with(counts, index, min(fits + 1, most)))) is None:
            continue
        while least <= most:
            middle = (least + most + 1) // 2
            trial = _with(counts, index, middle)
            if _try(place, replace(pins, resident=trial)) is None:
                most = middle - 1
            else:
                fits, least = middle, middle + 1
        counts = _with(counts, index, fits)
    return replace(pins, resident=counts)


def _try(place: Callable[[Pins], Placement], pins: Pins) -> Placement | None:
    try:
        return place(pins)
    except BudgetError:
        return None


def _with(counts: tuple[int, int, int], index: int, count: int) -> tuple[int, int, int]:
    weights, gradients, state = (count if at == index else each for at, each in enumerate(counts))
    return weights, gradients, state
