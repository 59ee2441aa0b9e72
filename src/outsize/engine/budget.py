"""The memory of one model: what each part of it takes, and so which planes can stay.

Of the limit, the process itself comes first, then activations as the workload measured them, then the arenas, into
which planes are placed. Between visits, freed memory is given back where the next one would pass the limit.

A device with memory of its own has a limit of its own, for activations, slots and what is resident there; the host's is
then for what is hosted and for the buffers that planes pass through.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from outsize.block import Plane, Record
from outsize.config import Home, OnDeviceFull, Pins, Settings, format_bytes
from outsize.engine.needs import Attempt, Needs, needs_at, needs_of
from outsize.errors import BudgetError
from outsize.plan import Placement, is_stored, place, place_apart
from outsize.plan.place import GROUPS, group_bytes, with_pieces
from outsize.plan.planner import Choice, choose, prefer, waits
from outsize.plan.profile import Profile
from outsize.plan.simulate import Costs
from outsize.plan.workload import BatchShape, Workload
from outsize.store import finalizers, memory
from outsize.store.commit_store import Layout
from outsize.store.scratch import DiskShortage, disk_bytes
from outsize.tier import Device

SLACK_BYTES = 96 << 20
"""Memory left for what is not planned: malloc's remains, Python objects, thread stacks."""

SLACK_SHARE = 32
"""Of a large budget, its part that is left instead: visits are larger too, and what malloc wastes on them."""

WORTH_FILLING_BYTES = 16 << 20
"""Memory that calls leave unused is filled with weights where it is more."""

WORTH_COLLECTING_BYTES = 64 << 20
"""Other models that hold more memory may be garbage that was not collected yet."""

LEAST_FREED_BYTES = 64 << 20
"""Freed memory that is kept at least, where there is room for a second visit."""

UNPLANNED_BYTES = 48 << 20
"""What of that is taken as a rule: 16 to 100 MiB over a grid of runs (benchmarks/results)."""

HINT_MARGIN_BYTES = 16 << 20
"""Added to what a hint names: the process may have grown when it is tried."""

DEVICE_SLACK_BYTES = 64 << 20
"""Memory of the device left for what is not planned: torch's allocator takes pages of 20 MiB for large tensors and of 2
for small ones, and more than one stays partly used."""

TILE_TOKENS = 2048
"""Tokens that a tile aims at: enough for full matmul speed; fewer where memory is short. Adding up the gradients of
512 instead costs 8 % of a step, of 2,048 less than 2."""

TILE_TOKENS_ON_DEVICE = 8192
"""The same on an accelerator: its products need more rows for full speed."""

FEWEST_TILE_TOKENS = 512
"""Before tiles become smaller than this, inputs of blocks go to the disk, where there is one."""


@dataclass(frozen=True, slots=True)
class Fit:
    """An attempt that fits: `room` bytes are left for planes where blocks compute, `home_room` in a host that does not."""

    attempt: Attempt
    needs: Needs
    room: int
    home_room: int
    placement: Placement

    @property
    def tile_rows(self) -> int:
        """Rows that a block computes at once."""
        return self.attempt.tile_rows


@dataclass(frozen=True, slots=True)
class Foresight:
    """What the fastest of several placements is found with: the machine, and what computing costs by rows of a tile."""

    profile: Profile
    costs: Callable[[int], Costs]

    def uncut(self, rows: int) -> Foresight:
        """For calls with a cache: all `rows` are computed at once, whatever a tile is."""
        return Foresight(self.profile, lambda tile_rows: self.costs(rows))


class Budget:
    """A limit on the whole process, and what it is divided into; fixed by `place`.

    `always_resident`: blocks that cannot be streamed. `reading_bytes`: what reading any of them from where it comes from
    takes beside the memory that it is read into. A limit is the user's, or what is free when memory is placed.
    """

    def __init__(
        self,
        settings: Settings,
        always_resident: frozenset[str],
        device: Device,
        reading_bytes: Callable[[Sequence[Record]], int],
        free_host_bytes: Callable[[], int] = memory.available_bytes,
    ) -> None:
        self.limit_bytes = 0
        self.device_limit_bytes = 0
        self.device_taken_bytes = 0
        """What was in use of the device before anything was placed there."""
        self.base_bytes = 0
        self.reserved_bytes = 0
        """Memory of the host that is promised to something else: a KV cache, allocated once everything is placed."""
        self.activation_bytes = 0
        self.room_bytes = 0
        """What is left for activations and, beside them, arenas: of the device where that has memory of its own."""
        self.host_inputs_bytes = 0
        """Memory of the host for inputs of blocks that wait for their backward there, or pass through to the disk."""
        self.placement: Placement | None = None
        self._settings = settings
        self._device = device
        self._reading_bytes = reading_bytes
        self._free_host_bytes = free_host_bytes
        self._home_room_bytes = 0
        self.always_resident = always_resident
        self._idle = frozenset[str]()
        self._most_tile_tokens: int | None = None
        self.visit_bytes = 0
        """What a visit of the call that began last takes of the host's memory beside weights, at most."""
        self.call_bytes = 0
        """What the call that began last takes of activations where blocks compute."""
        self._fit: Fit | None = None
        self._least_needs = Needs(0, 0)
        self.choices: list[Choice[Fit]] = []
        """What was simulated, the fastest first; empty where nothing is known of the machine."""
        self._ceiling: memory.Ceiling | None = None

    @property
    def num_times_given_back(self) -> int:
        """How often freed memory went back to the system before a visit."""
        return self._ceiling.num_times if self._ceiling is not None else 0

    def change_settings(self, settings: Settings) -> None:
        """Place what comes by other settings."""
        self._settings = settings

    def place(
        self,
        records: Sequence[Record],
        workload: Workload,
        shape: BatchShape,
        foresight: Foresight | None = None,
    ) -> Placement:
        """Place `records` for calls of this shape; the fastest way that fits, as foreseen, else the largest tiles.

        Raises BudgetError where they do not fit, naming what does.
        """
        self._measure(records, workload)
        fits = list(self._fitting(records, workload, shape))
        self.choices = []
        fit = self._simplest(fits)
        if foresight is not None:
            others = [other for other in fits if other is not fit]
            self.choices = self._compared(fit, others, records, workload, shape, foresight)
            fit = replace(self.choices[0].way, placement=self.choices[0].placement)
        self.activation_bytes, self.host_inputs_bytes = fit.needs.num_bytes, fit.needs.host_bytes
        self._fit = fit
        self.placement = fit.placement
        self._ceiling = memory.Ceiling(self.limit_bytes - self._slack_bytes // 4)
        if self._device.is_host and fit.attempt.is_roomy:
            freed = max(fit.needs.visit_bytes, LEAST_FREED_BYTES)
            expected = self.host_bytes() + freed
            self._ceiling.expected_bytes = min(expected, self._ceiling.limit_bytes)
        return self.placement

    @property
    def _slack_bytes(self) -> int:
        """Left for what is not planned."""
        return max(SLACK_BYTES, self.limit_bytes // SLACK_SHARE)

    def fits(self, records: Sequence[Record], workload: Workload, shape: BatchShape) -> bool:
        """Whether calls of this shape fit, with as much to spare as what a hint names should have."""
        self._measure(records, workload)
        return self._any_fits(records, workload, shape)

    def _measure(self, records: Sequence[Record], workload: Workload) -> None:
        """What the process has now, and what that leaves; what a call does not need."""
        self._idle = frozenset(r.name for r in records) - {visit.block for visit in workload.visits}
        finalizers.finish()  # of models that were dropped, what they had is free
        if sum(num_bytes for _, num_bytes in memory.open_models()) >= WORTH_COLLECTING_BYTES:
            gc.collect()  # they may be dropped, and wait in cycles for the collector
            finalizers.finish()
        memory.give_back()
        self.base_bytes = memory.resident_bytes()
        limit = self._settings.budgets.host_bytes
        self.limit_bytes = limit or self.base_bytes + int(0.9 * self._free_host_bytes())
        taken = self.base_bytes + self.reserved_bytes + self._slack_bytes + self._reading_bytes(records)
        self._home_room_bytes = self.limit_bytes - taken
        self.room_bytes = self._home_room_bytes
        if not self._device.is_host:
            free, self.device_taken_bytes = self._device.free_bytes(), self._device.taken_bytes()
            self.device_limit_bytes = self._settings.budgets.device_bytes or int(0.95 * free)
            self.room_bytes = min(self.device_limit_bytes, free) - DEVICE_SLACK_BYTES

    def choices_with(
        self, more_bytes: int, records: Sequence[Record], workload: Workload, foresight: Foresight
    ) -> list[Choice[Fit]]:
        """What could be chosen with `more_bytes` of the host's memory, the fastest first; nothing is changed."""
        assert self._fit is not None
        fit = self._fit
        room, home_room = fit.room, fit.home_room
        if self._device.is_host:
            larger = replace(fit, room=room + more_bytes, home_room=home_room + more_bytes)
        else:
            larger = replace(fit, home_room=home_room + more_bytes)
        return self._fastest([larger], records, workload, foresight)

    def begin_call(self, workload: Workload, shape: BatchShape) -> int:
        """The rows of the largest tile whose memory is within what is left beside the arenas.

        Raises BudgetError where not even the smallest is.
        """
        assert self.placement is not None
        room = self._room_beside_inputs - self._beside_activations(self.placement)
        tile_rows = self._wanted_tile_rows(shape)
        inputs, kept = self.placement.inputs, self.placement.kept
        moved = needs_at(workload, shape, tile_rows, inputs).moved_bytes
        if inputs is not None and moved > self.placement.inputs_bytes:
            raise BudgetError(
                f"the inputs of blocks take {format_bytes(moved)} for a batch of {shape.rows or 1} rows, "
                f"{format_bytes(self.placement.inputs_bytes)} of the {inputs} were set aside for them",
                hint="make the first call with the largest batch",
            )
        while (needs := needs_at(workload, shape, tile_rows, inputs, kept)).num_bytes > room:
            if tile_rows == 1 or self._settings.pins.tile_rows is not None:
                raise BudgetError(
                    f"a batch of {shape.rows or 1} rows takes {format_bytes(needs.num_bytes)} of activations, "
                    f"{format_bytes(room)} are left beside the arenas",
                    hint=f"use fewer rows or shorter sequences, give more memory with {self._computes_in}=, or make the "
                    "first call with the largest batch",
                )
            tile_rows = -(-tile_rows // 2)
        self.visit_bytes = needs.visit_bytes if self._device.is_host else 0
        self.call_bytes = needs.num_bytes
        return tile_rows

    def with_what_is_left(self, records: Sequence[Record], needed_bytes: int) -> Placement | None:
        """The placement for a call that takes `needed_bytes`: with more single entries of streamed blocks in memory where
        the process leaves some unused, with fewer where it would not suffice; None where nothing changes.

        Call it between calls, after one was made: what the plan left for the unforeseen is then known.
        """
        assert self.placement is not None and self._fit is not None
        pins = self._settings.pins
        is_pinned = pins.resident is not None or pins.resident_bytes is not None
        if not self._device.is_host or is_stored(records) or is_pinned or self._settings.home is not None:
            return None
        left = self.limit_bytes - self._slack_bytes // 2 - needed_bytes - memory.resident_bytes()
        if left >= WORTH_FILLING_BYTES:
            placement = with_pieces(self.placement, records, left, self._idle)
        elif left < 0:
            planned = self._fit.placement
            extra = self.placement.pieces_bytes - planned.pieces_bytes
            placement = with_pieces(planned, records, max(0, extra + left), self._idle)
        else:
            return None
        changed = placement if placement.pieces != self.placement.pieces else None
        self.placement = placement
        return changed

    def shrink_tiles(self, num_tokens: int) -> None:
        """Let no tile of a call to come have more tokens, whatever is pinned; a tile has at least one row."""
        self._most_tile_tokens = num_tokens

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether a host that does not compute has so much memory left beside what is placed."""
        return self.host_bytes() + num_bytes + self._slack_bytes <= self.limit_bytes

    def host_bytes(self) -> int:
        """What the process takes of the host's memory, as placed."""
        assert self.placement is not None
        if self._device.is_host:
            arenas = self.placement.arena_bytes + self.host_inputs_bytes
            return self.base_bytes + self.reserved_bytes + self.activation_bytes + arenas
        return self.base_bytes + self.reserved_bytes + self.placement.home_bytes + self.host_inputs_bytes

    def expected_bytes(self) -> int:
        """What the process will have had at most: beside what is placed, freed memory that is kept where there is room."""
        assert self._fit is not None
        kept = self._fit.needs.visit_bytes if self._device.is_host and self._fit.attempt.is_roomy else 0
        return min(self.host_bytes() + kept + UNPLANNED_BYTES, self.limit_bytes)

    def device_bytes(self) -> int:
        """What is taken of a device with memory of its own, as placed, and what was taken before; else 0."""
        assert self.placement is not None
        if self._device.is_host:
            return 0
        return self.device_taken_bytes + self.activation_bytes + self.placement.compute_bytes

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, running out of the device's memory becomes a BudgetError that names what fits."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            what = str(error).partition(". ")[0]
            fewer = "let blocks compute fewer rows at once (--pin tile_rows=1)"
            if self._settings.on_device_full is OnDeviceFull.ERROR:
                fewer += ', or try again with fewer by itself (on_device_full="retry")'
            raise BudgetError(
                f"the device ran out of memory ({what}); {format_bytes(self.device_bytes())} of "
                f"{format_bytes(self.device_limit_bytes)} were planned",
                hint=f"another process may have taken it; else {fewer}, or give less with device=",
            ) from error

    def make_room(self, visit_bytes: int) -> None:
        """Called before each visit, which takes `visit_bytes`: give freed memory back where it would pass the limit."""
        assert self._ceiling is not None
        self._ceiling.make_room(visit_bytes)

    def _fitting(self, records: Sequence[Record], workload: Workload, shape: BatchShape) -> Iterator[Fit]:
        """What fits: activations get memory first, then arenas. Raises BudgetError where nothing does."""
        least: Needs | None = None
        error: BudgetError | None = None
        shortage: DiskShortage | None = None
        any_fits = False
        for attempt in self._attempts(records, shape):
            try:
                fit = self._fit_for(attempt, records, workload, shape)
            except BudgetError as failure:
                # Kept with its frames it would keep, in a cycle, all that they hold: pages that are to be made smaller.
                error = failure.with_traceback(None)
                if isinstance(error, DiskShortage):
                    shortage = shortage or error  # memory was enough
                needs = needs_of(attempt, workload, shape)
                if least is None or needs.num_bytes + needs.host_bytes <= least.num_bytes + least.host_bytes:
                    least = needs
                continue
            any_fits = True
            yield fit
        if any_fits:
            return
        if shortage is not None:
            raise DiskShortage(shortage.message, hint=shortage.hint)
        assert error is not None and least is not None
        self._least_needs = least
        self.activation_bytes, self.host_inputs_bytes = least.num_bytes, least.host_bytes
        fewer = self._most_rows(records, workload, shape)
        smaller = f"; or a batch of {fewer} instead of {shape.rows}" if fewer else ""
        smaller += _pinned(self._settings.pins)
        if not self._device.is_host:
            raise self._too_large_for_device(records, error, smaller) from error
        raise BudgetError(
            f"the model does not fit into {format_bytes(self.limit_bytes)}: {error.message}; "
            f"the process itself has {format_bytes(self.base_bytes)}, "
            f"{_open_models_text()}{self._reserved_text}"
            f"activations take {format_bytes(self.activation_bytes)}, "
            f"{format_bytes(self._slack_bytes + self._reading_bytes(records))} are kept free",
            hint=self._hint(
                records, self.limit_bytes - self._room_beside_inputs + self.activation_bytes, smaller
            ),
        ) from error

    @property
    def _reserved_text(self) -> str:
        return f"the KV cache takes {format_bytes(self.reserved_bytes)}, " if self.reserved_bytes else ""

    def _fit_for(
        self,
        attempt: Attempt,
        records: Sequence[Record],
        workload: Workload,
        shape: BatchShape,
        spare_bytes: int = 0,
    ) -> Fit:
        """Raises BudgetError where it does not fit in this way, with so much to spare."""
        needs = needs_of(attempt, workload, shape)
        # Freed activations fit badly into one another; with room for a second visit, which is then all the slack there is,
        # nothing has to be given back.
        freed = max(0, needs.visit_bytes - self._slack_bytes) if attempt.is_roomy else 0
        taken = needs.num_bytes + freed
        home_room = self._home_room_bytes - needs.host_bytes - spare_bytes
        if self._device.is_host:
            taken += needs.host_bytes
        if home_room < 0:
            what = f"the inputs of blocks take {format_bytes(needs.host_bytes)} of the host's memory"
            raise BudgetError(
                f"{what if needs.host_bytes else 'nothing fits beside the process itself'}, "
                f"the budget leaves {format_bytes(max(0, self._home_room_bytes))} for it"
            )
        room = max(0, self.room_bytes - taken - spare_bytes)
        placement = self._place(records, needs, room, home_room, self._settings.pins)
        return Fit(attempt, needs, room, home_room, placement)

    def _most_rows(self, records: Sequence[Record], workload: Workload, shape: BatchShape) -> int:
        """The largest batch that fits, of fewer rows than `shape` has; 0 where none does."""
        most, too_many = 0, shape.rows or 1
        while too_many - most > 1:
            rows = (most + too_many) // 2
            if self._any_fits(records, workload, replace(shape, rows=rows)):
                most = rows
            else:
                too_many = rows
        return most

    def _any_fits(self, records: Sequence[Record], workload: Workload, shape: BatchShape) -> bool:
        for attempt in self._attempts(records, shape):
            with suppress(BudgetError):
                self._fit_for(attempt, records, workload, shape, HINT_MARGIN_BYTES)
                return True
        return False

    def _simplest(self, fits: Sequence[Fit]) -> Fit:
        """The largest tiles that fit, unless too few slots are then left for transfers beside computing."""
        moves_for_slots = not self._device.is_host and self._settings.pins.inputs is None
        cramped: Fit | None = None
        for fit in fits:
            if cramped is not None and fit.attempt.inputs is None:
                break
            if fit.attempt.inputs or not moves_for_slots or fit.placement.is_roomy(self._settings.pins):
                return fit
            cramped = fit
        assert cramped is not None
        return cramped

    def _compared(
        self,
        fit: Fit,
        others: Sequence[Fit],
        records: Sequence[Record],
        workload: Workload,
        shape: BatchShape,
        foresight: Foresight,
    ) -> list[Choice[Fit]]:
        """All plans that are worth simulating, the fastest first: with more activations kept, and with smaller tiles.

        Tiles that are too small are among them where larger ones cost traffic of inputs to the disk.
        """
        keeping = []
        if self._settings.pins.kept_blocks is None:
            count = len(workload.activations)
            for part in (count, 3 * count // 4, count // 2, count // 4):
                with suppress(BudgetError):
                    attempt = replace(fit.attempt, kept_blocks=part)
                    keeping.append(self._fit_for(attempt, records, workload, shape))
        best = self._fastest([fit, *keeping], records, workload, foresight)
        if waits(best[0].simulation):
            smaller = [
                other
                for other in others
                if min(fit.tile_rows, other.tile_rows) * shape.row_tokens >= FEWEST_TILE_TOKENS
            ]
            if fit.attempt.inputs is Home.DISK:
                smaller += [other for other in others if other.attempt.inputs is not Home.DISK][:1]
            best = prefer(best, self._fastest(smaller, records, workload, foresight))
        return best

    def _fastest(
        self, fits: Iterable[Fit], records: Sequence[Record], workload: Workload, foresight: Foresight
    ) -> list[Choice[Fit]]:
        ways = (
            (
                fit,
                partial(self._place, records, fit.needs, fit.room, fit.home_room),
                partial(foresight.costs, fit.tile_rows),
            )
            for fit in fits
        )
        by_name = {record.name: record for record in records}
        has_home = self._settings.home is not None
        choices = choose(
            ways, workload.visits, by_name, foresight.profile, self._settings.pins, has_home=has_home
        )
        return [replace(choice, pins=self._exact_pins(choice, by_name)) for choice in choices]

    def _exact_pins(self, choice: Choice[Fit], records: Mapping[str, Record]) -> Pins:
        """Pins that lead to this choice and no other, whatever is known of the machine."""
        attempt, placement = choice.way.attempt, choice.placement
        kept = {(name, group) for name, group in placement.resident if name in placement.kept}
        always = {(name, group) for name, group in placement.resident if name in self.always_resident}
        if self._device.is_host:
            kept = {(name, group) for name, group in kept if group is Plane.WEIGHT}
        everything = sum(group_bytes(record, group) for record in records.values() for group in GROUPS)
        is_whole = placement.resident_bytes == everything
        chosen = placement.resident if is_whole else placement.resident - kept - always
        slots = [
            max((group.count for group in classes), default=own)
            for classes, own in (
                (placement.weight_classes, choice.pins.weight_slots),
                (placement.gradient_classes, choice.pins.gradient_slots),
            )
        ]
        return replace(
            choice.pins,
            weight_slots=slots[0],
            gradient_slots=slots[1],
            tile_rows=attempt.tile_rows,
            kept_blocks=attempt.kept_blocks,
            inputs=str(attempt.inputs or self._computes_in),
            resident_bytes=sum(group_bytes(records[name], group) for name, group in chosen)
            + placement.pieces_bytes
            if choice.pins.resident is None
            else choice.pins.resident_bytes,
        )

    @property
    def _room_beside_inputs(self) -> int:
        """What is left where blocks compute, beside the memory in which inputs wait or through which they pass."""
        unplanned = 0
        if self.placement is not None and self._fit is not None:
            unplanned = self.placement.pieces_bytes - self._fit.placement.pieces_bytes
        return self.room_bytes + unplanned - (self.host_inputs_bytes if self._device.is_host else 0)

    def _attempts(self, records: Sequence[Record], shape: BatchShape) -> Iterator[Attempt]:
        """What is tried, the fastest first: inputs go to the disk only where tiles would become too small otherwise.

        A call that only reads has one large visit, of the head: there is nothing that it has to fit into.
        """
        pins, is_host = self._settings.pins, self._device.is_host
        kept = pins.kept_blocks or 0
        sizes = [self._wanted_tile_rows(shape)]
        while sizes[-1] > 1 and pins.tile_rows is None:
            sizes.append(-(-sizes[-1] // 2))
        near: list[Home | None] = [None] if is_host else [None, Home.HOST]
        far: list[Home | None] = [Home.DISK] if self._settings.budgets.disks else []
        if pins.inputs is not None:
            stays = pins.inputs == Home.DEVICE or (is_host and pins.inputs == Home.HOST)
            near, far = [None if stays else Home(pins.inputs)], []
        if is_host and is_stored(records):
            yield Attempt(sizes[0], True, near[0], kept)
        enough = [rows for rows in sizes if rows == sizes[0] or rows * shape.row_tokens >= FEWEST_TILE_TOKENS]
        for some, homes in ((enough, near), (sizes, far), (sizes[len(enough) :], near)):
            yield from (Attempt(rows, False, home, kept) for rows in some for home in homes)

    def _place(
        self, records: Sequence[Record], needs: Needs, room: int, home_room: int, pins: Pins
    ) -> Placement:
        """The placement that needs `room` for planes where blocks compute, and `home_room` in a host that does not.

        Where the rule's takes too much of the disk, on which a record lies whole: one with whole blocks in memory.
        Raises BudgetError where none fits.
        """
        placement = self._place_anywhere(records, needs, room, home_room, pins, self._settings.home)
        commits = self._settings.commits
        versions_bytes = Layout.of(records, placement).num_bytes(commits) if commits else None
        try:
            disk_bytes(placement, self._settings, versions_bytes)
        except BudgetError:
            if not self._device.is_host or self._settings.home is not None or pins.resident is not None:
                raise
            for count in range(len(records) if pins.resident_bytes is None else 0, 0, -1):
                with suppress(BudgetError):
                    whole = replace(pins, resident=(count, count, count))
                    return self._place(records, needs, room, home_room, whole)
            raise
        return placement

    def _place_anywhere(
        self,
        records: Sequence[Record],
        needs: Needs,
        room: int,
        home_room: int,
        pins: Pins,
        home: Home | None,
    ) -> Placement:
        """The same, however much of the disk that takes."""
        has_disk = self._can_stream(records)
        if self._device.is_host:
            placement = place(
                records,
                arena_bytes=room,
                home=home,
                has_disk=has_disk,
                always_resident=self.always_resident,
                kept=needs.kept,
                idle=self._idle,
                pins=pins,
            )
        else:
            placement = place_apart(
                records,
                device_bytes=room,
                host_bytes=home_room,
                home=home,
                has_disk=has_disk,
                always_resident=self.always_resident,
                kept=needs.kept,
                pins=pins,
                commits=self._settings.commits > 0,
            )
        inputs = needs.inputs if needs.moved_bytes else None
        return replace(placement, kept=needs.kept, inputs=inputs, inputs_bytes=needs.moved_bytes)

    @property
    def _computes_in(self) -> str:
        return "host" if self._device.is_host else "device"

    def _beside_activations(self, placement: Placement) -> int:
        return placement.arena_bytes if self._device.is_host else placement.compute_bytes

    def _can_stream(self, records: Sequence[Record]) -> bool:
        """Whether not everything has to stay in memory: there is a disk, or nothing is ever written to one."""
        return self._settings.budgets.disks != () or not is_stored(records)

    def _least(self, records: Sequence[Record]) -> Placement:
        """The placement that takes the least memory."""
        pins = self._settings.pins
        home = self._settings.home
        if home is None and pins.resident is None:
            home = Home.DISK if self._can_stream(records) else Home.HOST
        slots = replace(
            pins,
            weight_slots=pins.weight_slots or 1,
            gradient_slots=pins.gradient_slots or 1,
            resident_bytes=0,
        )
        return self._place_anywhere(records, self._least_needs, 1 << 60, 1 << 60, slots, home)

    def _with_disk(self, least: Placement) -> str:
        """What a hint says of the disk, where less was given than the placement that it names takes."""
        try:
            disk_bytes(least, self._settings)
        except BudgetError as error:
            return f" with {(error.hint or '').removesuffix(' works')}"
        return ""

    def _too_large_for_device(
        self, records: Sequence[Record], error: BudgetError, smaller: str
    ) -> BudgetError:
        """What is short, on the device or in the host's memory, and the smallest budgets that work."""
        least = self._least(records)
        device = self.device_taken_bytes + self.activation_bytes + least.compute_bytes
        device += DEVICE_SLACK_BYTES + HINT_MARGIN_BYTES
        host = (
            self.limit_bytes
            - self._home_room_bytes
            + self.host_inputs_bytes
            + least.home_bytes
            + HINT_MARGIN_BYTES
        )
        has_disk = self._can_stream(records)
        hint = (
            f'device="{-(-device // 2**20)}MiB" with host="{-(-host // 2**20)}MiB"{self._with_disk(least)} '
            f"works with this batch{smaller}"
        )
        return BudgetError(
            f"the model does not fit into {format_bytes(self.device_limit_bytes)} of the device and "
            f"{format_bytes(self.limit_bytes)} of the host: {error.message}; activations take "
            f"{format_bytes(self.activation_bytes)} of the device",
            hint=hint if has_disk else f'{hint}; or give a folder on an SSD with disk="..."',
        )

    def _hint(self, records: Sequence[Record], fixed_bytes: int, smaller: str) -> str:
        """The smallest budget that works."""
        has_disk = self._can_stream(records)
        least = self._least(records)
        needed = -(-(fixed_bytes + least.arena_bytes + HINT_MARGIN_BYTES) // (1 << 20))
        hint = f'host="{needed}MiB"{self._with_disk(least)} works with this batch{smaller}'
        return hint if has_disk else f'{hint}; or give a folder on an SSD with disk="..."'

    def _wanted_tile_rows(self, shape: BatchShape) -> int:
        rows = shape.rows or 1
        tokens = TILE_TOKENS if self._device.is_host else TILE_TOKENS_ON_DEVICE
        wanted = self._settings.pins.tile_rows or -(-tokens // shape.row_tokens)
        if self._most_tile_tokens is not None:
            wanted = min(wanted, self._most_tile_tokens // shape.row_tokens)
        return max(1, min(rows, wanted))


def _open_models_text() -> str:
    """Names the largest of the other models that hold memory, as a part of a sentence."""
    for model, num_bytes in memory.open_models():
        if num_bytes >= WORTH_COLLECTING_BYTES:
            return f"of which {model}, which is still open, holds {format_bytes(num_bytes)}, "
    return ""


def _pinned(pins: Pins) -> str:
    """The pins that take memory, as the end of a hint."""
    taken = {
        "weight_slots": pins.weight_slots,
        "gradient_slots": pins.gradient_slots,
        "resident": pins.resident,
    }
    named = [f"{name}={value}" for name, value in taken.items() if value is not None]
    return f"; or pin less than {', '.join(named)}" if named else ""
