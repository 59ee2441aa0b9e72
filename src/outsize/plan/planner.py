"""The planner: which ways to compute a call fit within limits, and which of them is the fastest.

A pure function of its inputs: it asks neither the clock nor the system, so that all processes of a run decide alike, and a
plan can be made for any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import final

from outsize.block import Group, Record
from outsize.config import Home, Pins, Settings, format_bytes
from outsize.errors import BudgetError
from outsize.plan import memory_estimate
from outsize.plan.ledger import ACTIVATIONS, WAITING, Ledger, Purpose, larger, placed
from outsize.plan.limits import HINT_MARGIN_BYTES, Limits
from outsize.plan.place import GROUPS, Placement, is_stored, place, units
from outsize.plan.search import Choice, CostModel, Search, Way, prefer, waits, worth_it_s
from outsize.plan.workload import BatchShape, Call, Workload

TILE_TOKENS = {Home.HOST: 2048, Home.DEVICE: 8192}
"""Tokens that a tile aims at, by where blocks compute; fewer if memory is short. Enough for full matmul speed, which takes
more rows on an accelerator. On a host, adding up the gradients of 512 instead costs 8 % of a step, of 2,048 less than 2."""

FEWEST_TILE_TOKENS = 512
"""Before tiles become smaller than this, inputs of blocks go to the disk, if there is one."""


class DiskShortage(BudgetError):
    """The disk is what is short; the hint names a size of it that works."""


def tile_rows_to_try(
    shape: BatchShape, pins: Pins, computes_in: Home, most_tokens: int | None = None
) -> Iterator[int]:
    """Rows of a tile: the most that are worth computing, of at most `most_tokens`, and then half as many, down to one.

    What is pinned is not halved.
    """
    wanted = pins.tile_rows or -(-TILE_TOKENS[computes_in] // shape.row_tokens)
    if most_tokens is not None:
        wanted = min(wanted, most_tokens // shape.row_tokens)
    rows = max(1, min(shape.rows or 1, wanted))
    yield rows
    while rows > 1 and pins.tile_rows is None:
        rows = -(-rows // 2)
        yield rows


@final
@dataclass(frozen=True, eq=False)
class Planner:
    """Plans one placement of `records` for `calls`, which follow one another: the first is made fast, and all of them fit.

    Training and the passes of an engine on one copy of the weights are two calls: they share slots, and what one takes
    beside them is free for the other.

    `always_resident` names blocks that cannot be streamed. `disk_bytes` returns what a placement takes on disk, and raises
    BudgetError if the disks may not hold that much. `most_tile_tokens` limits tiles, even pinned ones.
    """

    records: Sequence[Record]
    calls: Sequence[Call]
    limits: Limits
    settings: Settings
    disk_bytes: Callable[[Placement, Sequence[Record]], int]
    always_resident: frozenset[str] = frozenset()
    most_tile_tokens: int | None = None

    @property
    def workload(self) -> Workload:
        """What the first call does, the one that is made fast."""
        return self.calls[0].workload

    @property
    def shape(self) -> BatchShape:
        """The batch of the first call."""
        return self.calls[0].shape

    @property
    def idle(self) -> frozenset[str]:
        """Blocks that no visit of any call needs."""
        visited = {visit.block for workload, _ in self.calls for visit in workload.visits}
        return frozenset(record.name for record in self.records) - visited

    # -- what fits -----------------------------------------------------------------------------------------------

    def plan(self, cost_model: CostModel | None = None) -> tuple[Way, Placement, list[Choice]]:
        """Return the way and the placement to take, and all choices that were compared, the fastest first.

        Without a cost model nothing is compared, and the largest tiles that fit are taken. Raises BudgetError if nothing
        fits, naming budgets that would.
        """
        fitting = self._fitting()
        way, placement = _simplest(fitting, self.limits, self.settings.pins)
        if cost_model is None:
            return way, placement, []
        choices = self._compared(way, [other for other, _ in fitting if other is not way], cost_model)
        return choices[0].way, choices[0].placement, choices

    def fits(self, rows: int | None = None) -> bool:
        """Whether the call fits, or one of `rows` rows, with the margin that hints add."""
        for way in self._ways(self.shape if rows is None else replace(self.shape, rows=rows)):
            with suppress(BudgetError):
                self._fit(way, HINT_MARGIN_BYTES)
                return True
        return False

    def _ways(self, shape: BatchShape) -> Iterator[Way]:
        """The ways to try, the fastest first: inputs go to the disk only if tiles would become too small otherwise.

        A call that only reads weights has one large visit, that of the head, and needs no room for freed memory.
        """
        pins, computes_in = self.settings.pins, self.limits.computes_in
        sizes = list(tile_rows_to_try(shape, pins, computes_in, self.most_tile_tokens))
        near = list(dict.fromkeys((computes_in, Home.HOST)))
        far = [Home.DISK] if self.settings.budgets.disks else []
        if pins.inputs is not None:
            near, far = [computes_in if pins.inputs == Home.DEVICE else Home(pins.inputs)], []
        kept, with_memory = pins.kept_blocks or 0, self._with_memory
        if self.limits.keeps_freed and is_stored(self.records):
            yield with_memory(Way(sizes[0], near[0], kept, is_roomy=True), shape)
        enough = [rows for rows in sizes if rows == sizes[0] or rows * shape.row_tokens >= FEWEST_TILE_TOKENS]
        for some, homes in ((enough, near), (sizes, far), (sizes[len(enough) :], near)):
            yield from (with_memory(Way(rows, home, kept), shape) for rows in some for home in homes)

    def _with_memory(self, way: Way, shape: BatchShape) -> Way:
        """The way with what the calls take beside planes, the first of them with a batch of `shape`."""
        kept, computes_in = self.workload.last_layers(way.kept_blocks), self.limits.computes_in
        own = memory_estimate.estimate(self.workload, shape, way.tile_rows, computes_in, way.inputs, kept)
        others = (
            memory_estimate.estimate(
                workload, other, min(way.tile_rows, other.rows or 1), computes_in, computes_in
            )
            for workload, other in self.calls[1:]
        )
        return replace(way, activations=larger(own, *others))

    def _fit(self, way: Way, spare_bytes: int = 0) -> tuple[Way, Placement]:
        """Return the way with the room it leaves for planes, and a placement there.

        Raises BudgetError unless `spare_bytes` stay free.
        """
        limits, needed = self.limits, way.activations
        if way.is_roomy:
            # Freed activations fit badly into one another; with room for a second visit, which is then all the slack there
            # is, nothing has to be given back.
            visit = needed[limits.computes_in, Purpose.VISIT]
            needed += Ledger.of(limits.computes_in, freed=max(0, visit - limits.slack_bytes))
        waiting, host_room = needed.total(Home.HOST, *WAITING), limits.room_bytes(Home.HOST)
        if waiting + spare_bytes > host_room:
            what = f"the inputs of blocks take {format_bytes(waiting)} of the host's memory"
            raise BudgetError(
                f"{what if waiting else 'nothing fits beside the process itself'}, "
                f"the budget leaves {format_bytes(max(0, host_room))} for it"
            )
        rooms = {
            home: max(0, limits.room_bytes(where) - needed.total(where) - spare_bytes)
            for home, where in limits.memories.items()
        }
        way = replace(way, rooms=rooms)
        return way, self._place(way, self.settings.pins)

    def _fitting(self) -> list[tuple[Way, Placement]]:
        """The ways that fit, with their placements: activations get memory first. Raises BudgetError if none does."""
        fitting: list[tuple[Way, Placement]] = []
        error: BudgetError | None = None
        shortage: DiskShortage | None = None
        for way in self._ways(self.shape):
            try:
                fitting.append(self._fit(way))
            except BudgetError as failure:
                # With its frames it would hold, in a cycle, all that they hold: pages that are to be made smaller.
                error = failure.with_traceback(None)
                if isinstance(error, DiskShortage):
                    shortage = shortage or error  # memory was enough
        if fitting:
            return fitting
        if shortage is not None:
            raise DiskShortage(shortage.message, hint=shortage.hint)
        assert error is not None
        raise self._too_large(error) from error

    # -- what is fastest -----------------------------------------------------------------------------------------

    def fastest(self, ways: Iterable[Way], cost_model: CostModel, below_s: float = math.inf) -> list[Choice]:
        """All placements for these ways that are worth simulating, the fastest first, as `Search.choose`."""
        search = Search(
            self.workload.visits,
            {record.name: record for record in self.records},
            cost_model,
            self.settings.pins,
            self._place,
            has_home=self.settings.home is not None,
        )
        return [replace(choice, pins=self._exact_pins(choice)) for choice in search.choose(ways, below_s)]

    def with_more(self, more_bytes: int, way: Way, cost_model: CostModel) -> list[Choice]:
        """The choices with `more_bytes` more of the host's memory, the fastest first."""
        rooms = {
            home: num_bytes + more_bytes if self.limits.memories[home] is Home.HOST else num_bytes
            for home, num_bytes in way.rooms.items()
        }
        return self.fastest([replace(way, rooms=rooms)], cost_model)

    def _compared(self, way: Way, others: Sequence[Way], cost_model: CostModel) -> list[Choice]:
        """All plans worth simulating, the fastest first, among them plans with more saved activations and smaller tiles.

        If the inputs of `way` go to the disk, a way that leaves them in memory is compared too, however small its tiles.
        """
        saving: list[Way] = []
        if self.settings.pins.kept_blocks is None:
            count = len(self.workload.activations)
            for part in (count, 3 * count // 4, count // 2, count // 4):
                with suppress(BudgetError):
                    saving.append(self._fit(self._with_memory(replace(way, kept_blocks=part), self.shape))[0])
        best = self.fastest([way, *saving], cost_model)
        if waits(best[0].simulation):
            tokens = self.shape.row_tokens
            smaller = [
                other
                for other in others
                if min(way.tile_rows, other.tile_rows) * tokens >= FEWEST_TILE_TOKENS
            ]
            if way.inputs is Home.DISK:
                smaller += [other for other in others if other.inputs is not Home.DISK][:1]
            best = prefer(best, self.fastest(smaller, cost_model, worth_it_s(best[0])))
        return best

    def _exact_pins(self, choice: Choice) -> Pins:
        """Pins that lead to this choice alone, on any profile."""
        pins, placement = choice.pins, choice.placement
        weight_slots, gradient_slots = (
            max((each.count for each in placement.slots[group]), default=own)
            for group, own in ((Group.WEIGHT, pins.weight_slots), (Group.GRADIENT, pins.gradient_slots))
        )
        resident_bytes = pins.resident_bytes
        if pins.resident is None:
            resident_bytes = (
                _chosen_bytes(self.records, placement, self.always_resident) + placement.pieces_bytes
            )
        return replace(
            pins,
            weight_slots=weight_slots,
            gradient_slots=gradient_slots,
            tile_rows=choice.way.tile_rows,
            kept_blocks=choice.way.kept_blocks,
            inputs=str(choice.way.inputs),
            resident_bytes=resident_bytes,
        )

    # -- placing -------------------------------------------------------------------------------------------------

    def _place(self, way: Way, pins: Pins) -> Placement:
        """The placement that makes the best use of the room that `way` leaves.

        A record lies whole on the disk. If that is too much for the disks, whole blocks stay in memory instead. Raises
        BudgetError if no placement fits.
        """
        placement = self._place_anywhere(way, pins, self.settings.home)
        try:
            self.disk_bytes(placement, self.records)
        except BudgetError:
            if self.settings.home is not None or pins.resident is not None:
                raise
            for count in range(len(self.records) if pins.resident_bytes is None else 0, 0, -1):
                with suppress(BudgetError):
                    return self._place(way, replace(pins, resident=(count, count, count)))
            raise
        return placement

    def _place_anywhere(self, way: Way, pins: Pins, home: Home | None) -> Placement:
        """The same without regard to the size of the disks."""
        kept = self.workload.last_layers(way.kept_blocks)
        placement = place(
            self.records,
            way.rooms,
            home=home,
            has_disk=self._can_stream,
            always_resident=self.always_resident,
            kept=kept,
            idle=self.idle,
            pins=pins,
            commits=self.settings.commits > 0,
        )
        moved = way.activations[way.inputs, Purpose.INPUTS]
        return replace(placement, kept=kept, inputs=way.inputs if moved else None, inputs_bytes=moved)

    @property
    def _can_stream(self) -> bool:
        """Whether planes may live outside of memory: on a disk, or in the model's files where nothing is written."""
        return self.settings.budgets.disks != () or not is_stored(self.records)

    # -- the error if nothing fits -------------------------------------------------------------------------------

    def _too_large(self, error: BudgetError) -> BudgetError:
        """The error that names what is short, and the smallest budgets that work."""
        limits = self.limits
        way, placement = self._least()
        needed = (
            limits.taken
            + limits.spare
            + way.activations
            + placed(self.records, placement, limits.computes_in)
        )
        host, device = (_mib(needed.total(home) + HINT_MARGIN_BYTES) for home in (Home.HOST, Home.DEVICE))
        activations = format_bytes(way.activations.total(limits.computes_in, *ACTIVATIONS))
        pages = way.activations[limits.computes_in, Purpose.KV]
        kv = f"the KV cache takes {format_bytes(pages)}, " if pages else ""
        if limits.device_bytes is None:
            message = f"{format_bytes(limits.host_bytes)}: {error.message}; {limits.taken_text}{kv}"
            message += f"activations take {activations}, "
            message += f"{format_bytes(limits.spare.total(Home.HOST))} are kept free"
            budgets = f'host="{host}"'
        else:
            message = (
                f"{format_bytes(limits.device_bytes)} of the device and "
                f"{format_bytes(limits.host_bytes)} of the host: {error.message}; "
                f"{kv}activations take {activations} of the device"
            )
            budgets = f'device="{device}" with host="{host}"'
        smaller = f"{self._fewer_rows()}{_pinned(self.settings.pins)}"
        hint = f"{budgets}{self._with_disk(placement)} works with this batch{smaller}"
        return BudgetError(
            f"the model does not fit into {message}",
            hint=hint if self._can_stream else f'{hint}; or give a folder on an SSD with disk="..."',
        )

    def _least(self) -> tuple[Way, Placement]:
        """The way and the placement that take the least memory."""
        ways = [*self._ways(self.shape)]
        way = min(reversed(ways), key=lambda each: sum(map(each.activations.total, (Home.DEVICE, Home.HOST))))
        pins, home = self.settings.pins, self.settings.home
        if home is None and pins.resident is None:
            home = Home.DISK if self._can_stream else Home.HOST
        slots = replace(
            pins,
            weight_slots=pins.weight_slots or 1,
            gradient_slots=pins.gradient_slots or 1,
            resident_bytes=0,
        )
        return way, self._place_anywhere(
            replace(way, rooms=dict.fromkeys(self.limits.memories, 1 << 60)), slots, home
        )

    def _fewer_rows(self) -> str:
        """The largest smaller batch that fits, as part of a hint."""
        most, too_many = 0, self.shape.rows or 1
        while too_many - most > 1:
            rows = (most + too_many) // 2
            if self.fits(rows):
                most = rows
            else:
                too_many = rows
        return f"; or a batch of {most} instead of {self.shape.rows}" if most else ""

    def _with_disk(self, placement: Placement) -> str:
        """The size of disk that a hint has to name, if the disks are too small for the placement it names."""
        try:
            self.disk_bytes(placement, self.records)
        except BudgetError as error:
            return f" with {(error.hint or '').removesuffix(' works')}"
        return ""


def _simplest(fitting: Sequence[tuple[Way, Placement]], limits: Limits, pins: Pins) -> tuple[Way, Placement]:
    """The largest tiles that fit, unless too few slots are then left for transfers beside computing."""
    moves_for_slots = len(limits.memories) > 1 and pins.inputs is None
    cramped: tuple[Way, Placement] | None = None
    for way, placement in fitting:
        is_moving = way.inputs is not limits.computes_in
        if cramped is not None and not is_moving:
            break
        if is_moving or not moves_for_slots or placement.is_roomy(pins):
            return way, placement
        cramped = way, placement
    assert cramped is not None
    return cramped


def _chosen_bytes(records: Sequence[Record], placement: Placement, always_resident: frozenset[str]) -> int:
    """The `resident_bytes` of a placement: planes that stay where blocks compute by choice, or all of them."""
    sizes = {(r.name, group): r.group_bytes[group] for r in records for group in GROUPS}
    here = placement.at(Home.DEVICE)
    if placement.resident_bytes == sum(sizes.values()):
        return placement.resident_bytes
    kept = {(name, group) for name in placement.kept for group in units(placement.host)[0]}
    return sum(sizes[key] for key in here - kept if key[0] not in always_resident)


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // (1 << 20))}MiB"


def _pinned(pins: Pins) -> str:
    """The pins that cost memory, as the end of a hint."""
    values = ((name, getattr(pins, name)) for name in ("weight_slots", "gradient_slots", "resident"))
    named = [f"{name}={value}" for name, value in values if value is not None]
    return f"; or pin less than {', '.join(named)}" if named else ""
