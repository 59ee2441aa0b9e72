"""Ways to compute a call within limits: which fit, and which of them is the fastest.

A pure function of its inputs: it asks neither the clock nor the system, so that all processes of a run decide alike, and a
plan can be made for any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from outsize.block import Group, Record
from outsize.config import Home, Pins, Settings, format_bytes
from outsize.errors import BudgetError
from outsize.plan.limits import DEVICE_SLACK_BYTES, Limits
from outsize.plan.lower import Costs
from outsize.plan.memory_estimate import MemoryEstimate, Variant, estimate_of
from outsize.plan.place import GROUPS, Placement, group_bytes, is_stored, place
from outsize.plan.planner import Choice, choose, prefer, waits
from outsize.plan.profile import Profile
from outsize.plan.workload import BatchShape, Workload

HINT_MARGIN_BYTES = 16 << 20
"""Added to what a hint names: the process may have grown when it is tried."""

TILE_TOKENS = 2048
"""Tokens that a tile aims at: enough for full matmul speed; fewer if memory is short. Adding up the gradients of
512 instead costs 8 % of a step, of 2,048 less than 2."""

TILE_TOKENS_ON_DEVICE = 8192
"""The same on an accelerator: its products need more rows for full speed."""

FEWEST_TILE_TOKENS = 512
"""Before tiles become smaller than this, inputs of blocks go to the disk, if there is one."""


class DiskShortage(BudgetError):
    """The disk is what is short; the hint names a size of it that works."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant that fits: `room` bytes are left for planes where blocks compute, `home_room` in a host that does not."""

    variant: Variant
    memory: MemoryEstimate
    room: int
    home_room: int
    placement: Placement

    @property
    def tile_rows(self) -> int:
        """Rows that a layer computes at once."""
        return self.variant.tile_rows


@dataclass(frozen=True, slots=True)
class CostModel:
    """What placements are compared with: the machine, and what computing costs by rows of a tile."""

    profile: Profile
    costs: Callable[[int], Costs]

    def uncut(self, rows: int) -> CostModel:
        """For calls with a cache: all `rows` are computed at once, whatever a tile is."""
        return CostModel(self.profile, lambda tile_rows: self.costs(rows))


def wanted_tile_rows(shape: BatchShape, pins: Pins, *, is_host: bool, most_tokens: int | None = None) -> int:
    """Rows of the largest tile that is worth computing, of at most `most_tokens`; at least one."""
    tokens = TILE_TOKENS if is_host else TILE_TOKENS_ON_DEVICE
    wanted = pins.tile_rows or -(-tokens // shape.row_tokens)
    if most_tokens is not None:
        wanted = min(wanted, most_tokens // shape.row_tokens)
    return max(1, min(shape.rows or 1, wanted))


@final
class Planner:
    """Plans calls of one `shape` of a `workload` on `records`.

    `always_resident`: blocks that cannot be streamed. `disk_bytes` says what a placement takes on disk, and raises
    BudgetError if that is more than the disks may hold. `most_tile_tokens` limits tiles whatever is pinned.
    """

    def __init__(
        self,
        records: Sequence[Record],
        workload: Workload,
        shape: BatchShape,
        limits: Limits,
        settings: Settings,
        disk_bytes: Callable[[Placement, Sequence[Record]], int],
        *,
        always_resident: frozenset[str] = frozenset(),
        most_tile_tokens: int | None = None,
    ) -> None:
        self.limits = limits
        self.idle = frozenset(r.name for r in records) - {visit.block for visit in workload.visits}
        """Blocks that no visit of the call needs."""
        self._records = records
        self._workload = workload
        self._shape = shape
        self._settings = settings
        self._pins = settings.pins
        self._disk_bytes = disk_bytes
        self._always_resident = always_resident
        self._most_tile_tokens = most_tile_tokens

    # -- what fits -----------------------------------------------------------------------------------------------

    def plan(self, cost_model: CostModel | None = None) -> tuple[Candidate, list[Choice[Candidate]]]:
        """The candidate to take: the fastest by the cost model, else the one with the largest tiles. And all choices that
        were compared, the fastest first.

        Raises BudgetError if nothing fits, naming what does.
        """
        candidates = list(self._fitting())
        candidate = self._simplest(candidates)
        if cost_model is None:
            return candidate, []
        others = [other for other in candidates if other is not candidate]
        choices = self._compared(candidate, others, cost_model)
        return replace(choices[0].way, placement=choices[0].placement), choices

    def fits(self, rows: int | None = None) -> bool:
        """Whether the call fits, or one of `rows`, with the margin that a hint has."""
        shape = self._shape if rows is None else replace(self._shape, rows=rows)
        for variant in self._variants(shape):
            with suppress(BudgetError):
                self._candidate(variant, shape, HINT_MARGIN_BYTES)
                return True
        return False

    def _variants(self, shape: BatchShape) -> Iterator[Variant]:
        """What is tried, the fastest first: inputs go to the disk only if tiles would become too small otherwise.

        A call that only reads has one large visit, of the head: there is nothing that freed memory has to fit into.
        """
        pins, is_host = self._pins, self.limits.is_host
        kept = pins.kept_blocks or 0
        sizes = [wanted_tile_rows(shape, pins, is_host=is_host, most_tokens=self._most_tile_tokens)]
        while sizes[-1] > 1 and pins.tile_rows is None:
            sizes.append(-(-sizes[-1] // 2))
        near: list[Home | None] = [None] if is_host else [None, Home.HOST]
        far: list[Home | None] = [Home.DISK] if self._settings.budgets.disks else []
        if pins.inputs is not None:
            stays = pins.inputs == Home.DEVICE or (is_host and pins.inputs == Home.HOST)
            near, far = [None if stays else Home(pins.inputs)], []
        if is_host and is_stored(self._records):
            yield Variant(sizes[0], True, near[0], kept)
        enough = [rows for rows in sizes if rows == sizes[0] or rows * shape.row_tokens >= FEWEST_TILE_TOKENS]
        for some, homes in ((enough, near), (sizes, far), (sizes[len(enough) :], near)):
            yield from (Variant(rows, False, home, kept) for rows in some for home in homes)

    def _candidate(self, variant: Variant, shape: BatchShape, spare_bytes: int = 0) -> Candidate:
        """Raises BudgetError if it does not fit in this way with `spare_bytes` left."""
        limits, memory = self.limits, estimate_of(variant, self._workload, shape)
        # Freed activations fit badly into one another; with room for a second visit, which is then all the slack there is,
        # nothing has to be given back.
        freed = max(0, memory.visit_bytes - limits.slack_bytes) if variant.is_roomy else 0
        taken = memory.num_bytes + freed + (memory.host_bytes if limits.is_host else 0)
        home_room = limits.host_room_bytes - memory.host_bytes - spare_bytes
        if home_room < 0:
            what = f"the inputs of blocks take {format_bytes(memory.host_bytes)} of the host's memory"
            raise BudgetError(
                f"{what if memory.host_bytes else 'nothing fits beside the process itself'}, "
                f"the budget leaves {format_bytes(max(0, limits.host_room_bytes))} for it"
            )
        room = max(0, limits.room_bytes - taken - spare_bytes)
        placement = self._place(memory, room, home_room, self._pins)
        return Candidate(variant, memory, room, home_room, placement)

    def _fitting(self) -> Iterator[Candidate]:
        """What fits: activations get memory first, then arenas. Raises BudgetError if nothing does."""
        least: MemoryEstimate | None = None
        error: BudgetError | None = None
        shortage: DiskShortage | None = None
        any_fits = False
        for variant in self._variants(self._shape):
            try:
                candidate = self._candidate(variant, self._shape)
            except BudgetError as failure:
                # With its frames it would hold, in a cycle, all that they hold: pages that are to be made smaller.
                error = failure.with_traceback(None)
                if isinstance(error, DiskShortage):
                    shortage = shortage or error  # memory was enough
                memory = estimate_of(variant, self._workload, self._shape)
                if (
                    least is None
                    or memory.num_bytes + memory.host_bytes <= least.num_bytes + least.host_bytes
                ):
                    least = memory
                continue
            any_fits = True
            yield candidate
        if any_fits:
            return
        if shortage is not None:
            raise DiskShortage(shortage.message, hint=shortage.hint)
        assert error is not None and least is not None
        raise self._too_large(error, least) from error

    def _simplest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The largest tiles that fit, unless too few slots are then left for transfers beside computing."""
        moves_for_slots = not self.limits.is_host and self._pins.inputs is None
        cramped: Candidate | None = None
        for candidate in candidates:
            inputs = candidate.variant.inputs
            if cramped is not None and inputs is None:
                break
            if inputs or not moves_for_slots or candidate.placement.is_roomy(self._pins):
                return candidate
            cramped = candidate
        assert cramped is not None
        return cramped

    # -- what is fastest -----------------------------------------------------------------------------------------

    def fastest(self, candidates: Iterable[Candidate], cost_model: CostModel) -> list[Choice[Candidate]]:
        """All placements for these variants that are worth simulating, the fastest first."""
        ways = (
            (
                candidate,
                partial(self._place, candidate.memory, candidate.room, candidate.home_room),
                partial(cost_model.costs, candidate.tile_rows),
            )
            for candidate in candidates
        )
        by_name = {record.name: record for record in self._records}
        has_home = self._settings.home is not None
        visits, profile = self._workload.visits, cost_model.profile
        choices = choose(ways, visits, by_name, profile, self._pins, has_home=has_home)
        return [replace(choice, pins=self._exact_pins(choice, by_name)) for choice in choices]

    def with_more(
        self, more_bytes: int, candidate: Candidate, cost_model: CostModel
    ) -> list[Choice[Candidate]]:
        """What could be chosen with `more_bytes` of the host's memory, the fastest first."""
        room = candidate.room + (more_bytes if self.limits.is_host else 0)
        larger = replace(candidate, room=room, home_room=candidate.home_room + more_bytes)
        return self.fastest([larger], cost_model)

    def _compared(
        self, candidate: Candidate, others: Sequence[Candidate], cost_model: CostModel
    ) -> list[Choice[Candidate]]:
        """All plans that are worth simulating, the fastest first: with more saved activations, and with smaller tiles.

        Tiles that are too small are among them if larger ones cost traffic of inputs to the disk.
        """
        saving = []
        if self._pins.kept_blocks is None:
            count = len(self._workload.activations)
            for part in (count, 3 * count // 4, count // 2, count // 4):
                with suppress(BudgetError):
                    variant = replace(candidate.variant, kept_blocks=part)
                    saving.append(self._candidate(variant, self._shape))
        best = self.fastest([candidate, *saving], cost_model)
        if waits(best[0].simulation):
            tokens = self._shape.row_tokens
            smaller = [
                other
                for other in others
                if min(candidate.tile_rows, other.tile_rows) * tokens >= FEWEST_TILE_TOKENS
            ]
            if candidate.variant.inputs is Home.DISK:
                smaller += [other for other in others if other.variant.inputs is not Home.DISK][:1]
            best = prefer(best, self.fastest(smaller, cost_model))
        return best

    def _exact_pins(self, choice: Choice[Candidate], records: Mapping[str, Record]) -> Pins:
        """Pins that lead to this choice and no other, whatever is known of the machine."""
        variant, placement = choice.way.variant, choice.placement
        resident = placement.at(Home.DEVICE)
        kept = {(name, group) for name, group in resident if name in placement.kept}
        always = {(name, group) for name, group in resident if name in self._always_resident}
        if self.limits.is_host:
            kept = {(name, group) for name, group in kept if group is Group.WEIGHT}
        everything = sum(group_bytes(record, group) for record in records.values() for group in GROUPS)
        is_whole = placement.resident_bytes == everything
        chosen = resident if is_whole else resident - kept - always
        slots = [
            max((group.count for group in classes), default=own)
            for classes, own in (
                (placement.weight_classes, choice.pins.weight_slots),
                (placement.gradient_classes, choice.pins.gradient_slots),
            )
        ]
        chosen_bytes = sum(group_bytes(records[name], group) for name, group in chosen)
        is_counted = choice.pins.resident is None
        return replace(
            choice.pins,
            weight_slots=slots[0],
            gradient_slots=slots[1],
            tile_rows=variant.tile_rows,
            kept_blocks=variant.kept_blocks,
            inputs=str(variant.inputs or self.limits.computes_in),
            resident_bytes=chosen_bytes + placement.pieces_bytes
            if is_counted
            else choice.pins.resident_bytes,
        )

    # -- placing -------------------------------------------------------------------------------------------------

    def _place(self, memory: MemoryEstimate, room: int, home_room: int, pins: Pins) -> Placement:
        """The placement that takes `room` for planes where blocks compute, and `home_room` in a host that does not.

        If the rule's takes too much of the disk, on which a record lies whole: one with whole blocks in memory.
        Raises BudgetError if none fits.
        """
        placement = self._place_anywhere(memory, room, home_room, pins, self._settings.home)
        try:
            self._disk_bytes(placement, self._records)
        except BudgetError:
            if not self.limits.is_host or self._settings.home is not None or pins.resident is not None:
                raise
            for count in range(len(self._records) if pins.resident_bytes is None else 0, 0, -1):
                with suppress(BudgetError):
                    return self._place(memory, room, home_room, replace(pins, resident=(count, count, count)))
            raise
        return placement

    def _place_anywhere(
        self, memory: MemoryEstimate, room: int, home_room: int, pins: Pins, home: Home | None
    ) -> Placement:
        """The same, however much of the disk that takes."""
        placement = place(
            self._records,
            {Home.DEVICE: room} if self.limits.is_host else {Home.DEVICE: room, Home.HOST: home_room},
            home=home,
            has_disk=self._can_stream,
            always_resident=self._always_resident,
            kept=memory.kept,
            idle=self.idle,
            pins=pins,
            commits=self._settings.commits > 0,
        )
        inputs = memory.inputs if memory.moved_bytes else None
        return replace(placement, kept=memory.kept, inputs=inputs, inputs_bytes=memory.moved_bytes)

    @property
    def _can_stream(self) -> bool:
        """Whether planes may be outside of memory: there is a disk, or nothing is ever written to one."""
        return self._settings.budgets.disks != () or not is_stored(self._records)

    # -- the error if nothing fits -------------------------------------------------------------------------------

    def _too_large(self, error: BudgetError, least: MemoryEstimate) -> BudgetError:
        """What is short, and the smallest budgets that work."""
        limits, smaller = self.limits, f"{self._fewer_rows()}{_pinned(self._pins)}"
        placement = self._least(least)
        host = limits.host_bytes - limits.host_room_bytes + least.host_bytes + HINT_MARGIN_BYTES
        if limits.device is None:
            message = f"{format_bytes(limits.host_bytes)}: {error.message}; {limits.taken_text}"
            message += f"activations take {format_bytes(least.num_bytes)}, "
            message += f"{format_bytes(limits.slack_bytes + limits.reading_bytes)} are kept free"
            budgets = f'host="{_mib(host + least.num_bytes + placement.arena_bytes)}"'
        else:
            message = (
                f"{format_bytes(limits.device.limit_bytes)} of the device and "
                f"{format_bytes(limits.host_bytes)} of the host: {error.message}; "
                f"activations take {format_bytes(least.num_bytes)} of the device"
            )
            device = limits.device.taken_bytes + least.num_bytes + placement.compute_bytes
            device += DEVICE_SLACK_BYTES + HINT_MARGIN_BYTES
            budgets = f'device="{_mib(device)}" with host="{_mib(host + placement.home_bytes)}"'
        hint = f"{budgets}{self._with_disk(placement)} works with this batch{smaller}"
        return BudgetError(
            f"the model does not fit into {message}",
            hint=hint if self._can_stream else f'{hint}; or give a folder on an SSD with disk="..."',
        )

    def _fewer_rows(self) -> str:
        """The largest batch that fits, of fewer rows, as a part of a hint."""
        most, too_many = 0, self._shape.rows or 1
        while too_many - most > 1:
            rows = (most + too_many) // 2
            if self.fits(rows):
                most = rows
            else:
                too_many = rows
        return f"; or a batch of {most} instead of {self._shape.rows}" if most else ""

    def _least(self, memory: MemoryEstimate) -> Placement:
        """The placement that takes the least memory."""
        pins, home = self._pins, self._settings.home
        if home is None and pins.resident is None:
            home = Home.DISK if self._can_stream else Home.HOST
        slots = replace(
            pins,
            weight_slots=pins.weight_slots or 1,
            gradient_slots=pins.gradient_slots or 1,
            resident_bytes=0,
        )
        return self._place_anywhere(memory, 1 << 60, 1 << 60, slots, home)

    def _with_disk(self, placement: Placement) -> str:
        """What a hint says of the disk, if less was given than the placement that it names takes."""
        try:
            self._disk_bytes(placement, self._records)
        except BudgetError as error:
            return f" with {(error.hint or '').removesuffix(' works')}"
        return ""


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // (1 << 20))}MiB"


def _pinned(pins: Pins) -> str:
    """The pins that take memory, as the end of a hint."""
    taken = {
        "weight_slots": pins.weight_slots,
        "gradient_slots": pins.gradient_slots,
        "resident": pins.resident,
    }
    named = [f"{name}={value}" for name, value in taken.items() if value is not None]
    return f"; or pin less than {', '.join(named)}" if named else ""
