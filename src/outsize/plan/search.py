"""The search for the fastest plan: placements that fit are simulated, and compared by the time of a step.

The search varies how many slots weights and gradients pass through, and of how many blocks weights, gradients and state
stay in memory, for each way to compute that the planner offers (rows of a tile, where inputs wait). A way with smaller
tiles never computes faster, so it is tried only where computing waits for something else.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeAlias, final

from outsize.block import Record
from outsize.config import Home, Pins
from outsize.errors import BudgetError
from outsize.plan.context import Context, Visit
from outsize.plan.ledger import EMPTY, Ledger, Purpose
from outsize.plan.lower import Costs
from outsize.plan.place import Placement, Room
from outsize.plan.plan import Plan
from outsize.plan.profile import Profile
from outsize.plan.simulate import Simulation, least_s, plan_steps, simulate_steps

SLOTS = ((3, 2), (2, 2), (2, 1), (1, 1), (4, 3), (6, 4))
"""Numbers of weight slots and gradient slots to try; the first is taken where nothing is known of the machine."""

NUM_GRIDS = 4
"""The first of these are tried with all that may stay in memory."""

PARTS = 4
"""The steps in which the number of blocks grows whose weights, or gradients, stay in memory."""

WORTH_A_CHANGE = 0.02
"""A way that computes less at once is tried only where computing waits for more than this part of a step, and taken only
where it saves as much: costs are timed, and times are never exact."""

FAR = 1.5
"""A placement is not simulated if its busiest resource alone takes longer than the fastest step by this factor."""

CLOSE = 0.01
ENOUGH = 48
"""After this many simulations, a placement that cannot be faster by more than CLOSE is not simulated either."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute a call, the activations that this takes, and the memory that it leaves for planes."""

    tile_rows: int
    """Rows that a layer computes at once."""
    inputs: Home
    """Where inputs of blocks wait for their backward, possibly where blocks compute."""
    kept_blocks: int = 0
    """Layers that save their activations instead of computing them again."""
    is_roomy: bool = False
    """Whether there is room for the freed memory of a second visit."""
    activations: Ledger = EMPTY
    rooms: Room = field(default_factory=dict)
    """Bytes for planes where blocks compute, and in a host that does not."""

    @property
    def freed_bytes(self) -> int:
        """Freed memory of a visit that is kept for the next one, if there is room for two."""
        return self.activations[Home.HOST, Purpose.VISIT] if self.is_roomy else 0


Attempt: TypeAlias = Callable[[Pins], Placement | None]
"""Places planes by some pins; None where they do not fit."""


@dataclass(frozen=True, slots=True)
class Choice:
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


@dataclass(frozen=True, slots=True)
class CostModel:
    """What placements are compared with: the machine, and what computing costs by rows of a tile."""

    profile: Profile
    costs: Callable[[int], Costs]

    def uncut(self, rows: int) -> CostModel:
        """For calls with a cache: all `rows` are computed at once, whatever a tile is."""
        return CostModel(self.profile, lambda tile_rows: self.costs(rows))


@final
@dataclass(frozen=True, eq=False, slots=True)
class Search:
    """Compares placements of `records` for calls that make `visits`.

    `place(way, pins)` places planes beside a way to compute, and raises BudgetError where they do not fit. What is pinned
    is left as it is, and what stays in memory also where planes have a home (`has_home`) that says so. What computing a
    tile costs is asked only where something fits.
    """

    visits: Sequence[Visit]
    records: Mapping[str, Record]
    cost_model: CostModel
    pins: Pins
    place: Callable[[Way, Pins], Placement]
    has_home: bool = False

    def choose(self, ways: Iterable[Way], below_s: float = math.inf) -> list[Choice]:
        """What fits, the fastest first; of equals, what was tried first. Empty where nothing fits.

        The numbers of slots are varied for all ways; for the fastest of them, what stays in memory too. Steps of `below_s`
        or more are of no use: what cannot be shorter is left out where that is known beforehand.
        """
        found = []
        for way in ways:
            attempt = self._attempt(way)
            found.append((attempt, self._simulated(way, attempt, self._slots(), below_s)))
        fitting = [(attempt, choices) for attempt, choices in found if choices]
        if not fitting:
            return []
        if not self.has_home:
            attempt, best = min(fitting, key=lambda each: each[1][0].step_s)
            seen, best_s = {choice.placement for choice in best}, min(below_s, best[0].step_s)
            best += self._simulated(best[0].way, attempt, self._stays(attempt), below_s, seen, best_s)
        return sorted((choice for _, choices in fitting for choice in choices), key=lambda each: each.step_s)

    def _simulated(
        self,
        way: Way,
        attempt: Attempt,
        variants: Iterable[Pins],
        below_s: float,
        seen: Set[Placement] = frozenset(),
        best_s: float = math.inf,
    ) -> list[Choice]:
        """The placements that are not in `seen` and may be as fast as `best_s`, or not much slower, the fastest first."""
        tried: dict[Placement, Pins] = {}
        with _uncollected():
            for pins in variants:
                placement = attempt(pins)
                if placement is not None and placement not in seen:
                    tried.setdefault(placement, pins)
        if not tried:
            return []
        profile, costs = self.cost_model.profile, self.cost_model.costs(way.tile_rows)
        found: dict[Placement, Choice] = {}
        if costs.computing_s(self.visits, next(iter(tried)).kept) >= below_s:
            return []
        with _uncollected():
            steps = {each: self._steps(each, costs) for each in tried}
            least = {each: least_s(steps[each][-1], self.records, each, profile, costs) for each in tried}
            for placement in sorted(tried, key=lambda each: least[each]):
                if least[placement] > min(below_s, best_s * (FAR if len(found) < ENOUGH else 1 - CLOSE)):
                    break
                plans = steps.pop(placement)
                simulation = simulate_steps(plans, self.records, placement, profile, costs).figures()
                found[placement] = Choice(way, tried[placement], placement, costs, simulation)
                best_s = min(best_s, simulation.step_s)
        in_order = (found[placement] for placement in tried if placement in found)
        return sorted(in_order, key=lambda choice: choice.step_s)

    def _slots(self) -> Iterator[Pins]:
        """The pins, and with all numbers of slots that they leave open."""
        yield self.pins
        for weight_slots, gradient_slots in SLOTS:
            yield replace(
                self.pins,
                weight_slots=self.pins.weight_slots or weight_slots,
                gradient_slots=self.pins.gradient_slots or gradient_slots,
            )

    def _stays(self, attempt: Attempt) -> Iterator[Pins]:
        """The pins with what stays in memory, where they leave that open: of some blocks, or, on a device, parts of all."""
        if self.pins.resident is not None or self.pins.resident_bytes is not None:
            return
        counts = sorted({round(len(self.records) * part / PARTS) for part in range(PARTS + 1)})
        whole = sum(record.num_bytes for record in self.records.values())
        for own in list(self._slots())[1 : 1 + NUM_GRIDS]:
            if attempt(replace(own, resident=(0, 0, 0))) is None:
                for part in range(PARTS):
                    yield replace(own, resident_bytes=whole * part // PARTS)
            else:
                for weights in counts:
                    for gradients in counts:
                        yield self._filled(attempt, own, (weights, gradients, 0))

    def _filled(self, attempt: Attempt, pins: Pins, counts: tuple[int, int, int]) -> Pins:
        """`pins` with `counts` of blocks in memory, and more where there is room: of state first, which they leave out."""

        def fits(counts: tuple[int, int, int]) -> bool:
            return attempt(replace(pins, resident=counts)) is not None

        for group in (2, 0, 1) if fits(counts) else ():
            least, most = counts[group], len(self.records)
            if not fits(_with(counts, group, min(least + 1, most))):
                continue
            while least <= most:
                middle = (least + most + 1) // 2
                if fits(trial := _with(counts, group, middle)):
                    counts, least = trial, middle + 1
                else:
                    most = middle - 1
        return replace(pins, resident=counts)

    def _steps(self, placement: Placement, costs: Costs) -> list[Plan]:
        return plan_steps(Context(self.visits, self.records, placement, input_bytes=costs.input_bytes))

    def _attempt(self, way: Way) -> Attempt:
        """What places planes beside `way`, once for the same pins."""

        @cache
        def attempt(pins: Pins) -> Placement | None:
            with suppress(BudgetError):
                return self.place(way, pins)
            return None

        return attempt


@contextmanager
def _uncollected() -> Iterator[None]:
    """Suspend the cycle collector: placing and simulating create no cycles, but enough objects to make it scan them all."""
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


def worth_it_s(choice: Choice) -> float:
    """Seconds of a step below which another way is worth a change."""
    return choice.step_s * (1 - WORTH_A_CHANGE)


def prefer(own: list[Choice], others: list[Choice]) -> list[Choice]:
    """All, the fastest first, but the first of `own` before the others where these are hardly faster."""
    is_worth_it = bool(others) and others[0].step_s < worth_it_s(own[0])
    return sorted(
        [*own, *others], key=lambda choice: (not is_worth_it and choice is not own[0], choice.step_s)
    )


def _with(counts: tuple[int, int, int], index: int, count: int) -> tuple[int, int, int]:
    weights, gradients, state = (count if at == index else each for at, each in enumerate(counts))
    return weights, gradients, state
