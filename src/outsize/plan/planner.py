"""Which of the placements that fit takes the least time: each is simulated, and the fastest is taken.

What is tried: how many slots weights and gradients pass through, of how many blocks weights, gradients and state stay in
memory, and, for each way of computing that the caller offers (rows of a tile, where inputs wait), what that leaves room
for. A way with smaller tiles never computes faster, so it is tried only where computing waits for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from outsize.block import Record
from outsize.config import Pins
from outsize.errors import BudgetError
from outsize.plan.build import Visit
from outsize.plan.place import Placement
from outsize.plan.profile import Profile
from outsize.plan.simulate import Costs, Simulation, simulate

SLOTS = ((3, 2), (2, 2), (2, 1), (1, 1), (4, 3), (6, 4))
"""Weight slots and gradient slots that are tried; the first is what is taken where nothing is known of the machine."""

PARTS = 4
"""Into as many parts the blocks are taken whose weights, or gradients, stay in memory."""

WORTH_A_CHANGE = 0.02
"""A way that computes less at once is tried only where computing waits for more than this part of a step, and taken only
where it saves as much: costs are timed, and times are never exact."""

Way = TypeVar("Way")


@dataclass(frozen=True)
class Choice(Generic[Way]):
    """A placement that fits, simulated; `pins` lead to it."""

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
) -> list[Choice[Way]]:
    """All that fits, the fastest first; of equals, what was tried first. What is pinned is left as it is.

    Each way comes with a function that places planes beside it, which raises BudgetError where they do not fit, and one
    that gives what computing costs, asked only where something fits. Empty where nothing does.
    """
    found: list[Choice[Way]] = []
    for way, place, costs_of in ways:
        for own, placement in _placements(place, len(records), pins):
            costs = costs_of()
            found.append(
                Choice(way, own, placement, costs, simulate(visits, records, placement, profile, costs))
            )
    return sorted(found, key=lambda choice: choice.step_s)


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
    place: Callable[[Pins], Placement], num_blocks: int, pins: Pins
) -> Iterator[tuple[Pins, Placement]]:
    """The placements that differ, with pins that lead to them."""
    seen: set[Placement] = set()
    for own in _variants(place, num_blocks, pins):
        placement = _try(place, own)
        if placement is not None and placement not in seen:
            seen.add(placement)
            yield own, placement


def _variants(place: Callable[[Pins], Placement], num_blocks: int, pins: Pins) -> Iterator[Pins]:
    yield pins
    for weight_slots, gradient_slots in SLOTS:
        own = replace(
            pins,
            weight_slots=pins.weight_slots or weight_slots,
            gradient_slots=pins.gradient_slots or gradient_slots,
        )
        yield own
        if (
            pins.resident is None
            and pins.resident_bytes is None
            and _try(place, replace(own, resident=(0, 0, 0)))
        ):
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
