"""The memory budget of one model: it measures limits, has calls planned within them, and keeps the ledger of the result.

The process itself comes first, then activations as the dry run found them, then the arenas that planes are placed in.
Between visits, freed memory goes back to the system if the next visit would exceed the limit.

A device with memory of its own has its own limit, for activations, slots and the planes that live there. The host's limit
then covers planes in host memory and the buffers that planes pass through.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import final

import torch

from outsize.block import Record
from outsize.config import Home, OnDeviceFull, Settings, format_bytes
from outsize.errors import BudgetError
from outsize.plan import Placement, memory_estimate
from outsize.plan.ledger import ACTIVATIONS, WAITING, Ledger, Purpose, larger, placed
from outsize.plan.limits import LEAST_FREED_BYTES, UNPLANNED_BYTES, Limits
from outsize.plan.place import with_pieces
from outsize.plan.planner import Planner, tile_rows_to_try
from outsize.plan.search import Choice, CostModel, Way
from outsize.plan.workload import Call
from outsize.store import finalizers, memory
from outsize.store.commit_store import Layout
from outsize.store.scratch import disk_bytes
from outsize.tier import Device

WORTH_FILLING_BYTES = 16 << 20
"""Memory that calls leave unused is filled with weights where it is more."""

WORTH_COLLECTING_BYTES = 64 << 20
"""Other models that hold more memory may be garbage that was not collected yet."""


@final
class Budget:
    """The limit on the whole process, and how it is divided, which `place` decides.

    `always_resident` names blocks that cannot be streamed. `reading_bytes` returns what reading any of some records from
    the source takes beside the memory they are read into. A limit that the user leaves open is the memory that is free when
    `place` is called.
    """

    def __init__(
        self,
        settings: Settings,
        always_resident: frozenset[str],
        device: Device,
        reading_bytes: Callable[[Sequence[Record]], int],
        free_host_bytes: Callable[[], int] = memory.available_bytes,
    ) -> None:
        self.settings = settings
        """What the user asked for; what is placed from now on follows them."""
        self.limits = Limits(settings.budgets.host_bytes or 0)
        """As measured when memory was placed."""
        self.placement: Placement | None = None
        self.choices: list[Choice] = []
        """What was simulated, the fastest first; empty if nothing is known of the machine."""
        self.visit_bytes = 0
        """The most host memory that a visit of the last call takes beside its weights."""
        self.call_bytes = 0
        """Activations of the last call, where blocks compute."""
        self.always_resident = always_resident
        self._device = device
        self._reading_bytes = reading_bytes
        self._free_host_bytes = free_host_bytes
        self._most_tile_tokens: int | None = None
        self._planner: Planner | None = None
        self._way: Way | None = None
        self._planned: Placement | None = None
        self._placed = Ledger()
        self._ceiling: memory.Ceiling | None = None

    @property
    def ledger(self) -> Ledger:
        """All memory and disk that the model takes as placed; before `place`, what is taken or promised already."""
        taken = self.limits.taken
        return taken if self._way is None else taken + self._way.activations + self._placed

    @property
    def expected_bytes(self) -> int:
        """The expected peak of the process: the ledger, freed memory that is kept for reuse, and slack."""
        assert self._way is not None
        freed = self._way.freed_bytes
        expected = self.ledger + Ledger.of(Home.HOST, freed=freed, slack=UNPLANNED_BYTES)
        return min(expected.total(Home.HOST), self.limits.host_bytes)

    @property
    def records(self) -> Sequence[Record]:
        """The records that were placed; none before."""
        return self._planner.records if self._planner is not None else ()

    def place(
        self,
        records: Sequence[Record],
        calls: Sequence[Call],
        cost_model: CostModel | None = None,
    ) -> Placement:
        """Place `records` for `calls`: the fastest plan by the cost model, else the one with the largest tiles.

        Raises BudgetError if none fits, naming budgets that would.
        """
        self._planner = self._planner_for(records, calls)
        self._way, self._planned, self.choices = self._planner.plan(cost_model)
        self.use(self._planned)
        self._ceiling = memory.Ceiling(self.limits.host_bytes - self.limits.slack_bytes // 4)
        if self._way.is_roomy:
            expected = self.ledger.total(Home.HOST) + max(self._way.freed_bytes, LEAST_FREED_BYTES)
            self._ceiling.expected_bytes = min(expected, self._ceiling.limit_bytes)
        return self._planned

    def use(self, placement: Placement | None) -> None:
        """Account for `placement` from now on, which may differ from the plan; None if nothing is placed any more."""
        self.placement, self._placed = placement, Ledger()
        if placement is None:
            self._way = None
            return
        self._placed = placed(self.records, placement, self.limits.computes_in)
        store_bytes = _disk_bytes(self.settings, placement, self.records)
        if placement.inputs is Home.DISK:
            store_bytes -= placement.inputs_bytes
        self._placed += Ledger.of(Home.DISK, spare=store_bytes - self._placed.total(Home.DISK))

    def fits(self, records: Sequence[Record], call: Call) -> bool:
        """Whether a call fits, with the margin that hints add; nothing is placed."""
        return self._planner_for(records, [call]).fits()

    def choices_with(self, more_bytes: int, cost_model: CostModel) -> list[Choice]:
        """The choices with `more_bytes` more of the host's memory, the fastest first; nothing is placed."""
        assert self._planner is not None and self._way is not None
        return self._planner.with_more(more_bytes, self._way, cost_model)

    def _planner_for(self, records: Sequence[Record], calls: Sequence[Call]) -> Planner:
        self.limits = self._measured(self._reading_bytes(records))
        return Planner(
            records,
            calls,
            self.limits,
            self.settings,
            partial(_disk_bytes, self.settings),
            always_resident=self.always_resident,
            most_tile_tokens=self._most_tile_tokens,
        )

    def _measured(self, reading_bytes: int) -> Limits:
        """The limits, and what the process takes now."""
        free_dropped_models()
        base = memory.resident_bytes()
        limits = Limits(
            self.settings.budgets.host_bytes or base + int(0.9 * self._free_host_bytes()),
            Ledger.of(Home.HOST, process=base),
            reading_bytes,
            others=_open_models_text(),
        )
        own_memory = self._device.own_memory
        if own_memory is None:
            return limits
        free, taken = own_memory
        return replace(
            limits,
            taken=limits.taken + Ledger.of(Home.DEVICE, process=taken),
            device_bytes=self.settings.budgets.device_bytes or int(0.95 * free),
            device_free_bytes=free,
        )

    def begin_call(self, call: Call) -> int:
        """Return the rows of the largest tile whose activations fit beside the arenas.

        Raises BudgetError if not even the smallest tile fits.
        """
        assert self.placement is not None
        computes_in, pins = self.limits.computes_in, self.settings.pins
        room = self._room_bytes - call.workload.pages_bytes
        inputs, kept = self.placement.inputs or computes_in, self.placement.kept
        for tile_rows in tile_rows_to_try(call.shape, pins, computes_in, self._most_tile_tokens):
            needed = memory_estimate.estimate(*call, tile_rows, computes_in, inputs, kept)
            moved, num_bytes = needed[inputs, Purpose.INPUTS], needed.total(computes_in, *ACTIVATIONS)
            if moved > self.placement.inputs_bytes:
                raise BudgetError(
                    f"the inputs of blocks take {format_bytes(moved)} for a batch of {call.shape.rows or 1} rows, "
                    f"{format_bytes(self.placement.inputs_bytes)} of the {inputs} were set aside for them",
                    hint="make the first call with the largest batch",
                )
            if num_bytes <= room:
                self.visit_bytes, self.call_bytes = needed[Home.HOST, Purpose.VISIT], num_bytes
                return tile_rows
        raise BudgetError(
            f"a batch of {call.shape.rows or 1} rows takes {format_bytes(num_bytes)} of activations, "
            f"{format_bytes(room)} are left beside the arenas",
            hint="use fewer rows or shorter sequences, give more memory with "
            f"{computes_in}=, or make the first call with the largest batch",
        )

    def admit(self, call: Call) -> None:
        """Count a call that reads KV pages, for which nothing was placed. Raises BudgetError if it does not fit."""
        assert self._way is not None
        computes_in, room = self.limits.computes_in, self._room_bytes
        needed = memory_estimate.estimate(*call, 1, computes_in, computes_in)
        self.call_bytes = needed.total(computes_in, *ACTIVATIONS)
        if self.call_bytes + call.workload.pages_bytes > room:
            raise BudgetError(
                f"the KV cache takes {format_bytes(call.workload.pages_bytes)} beside {format_bytes(self.call_bytes)} of "
                f"activations, {format_bytes(max(0, room))} are left beside the model, which was called before",
                hint="open the engine before the first call of the model, or give less with kv=",
            )
        self._way = replace(self._way, activations=larger(self._way.activations, needed))

    @property
    def _room_bytes(self) -> int:
        """What the activations and KV pages of a call may take beside what is placed."""
        computes_in = self.limits.computes_in
        arenas = self._placed.total(computes_in) + self.ledger.total(computes_in, *WAITING)
        return self.limits.room_bytes(computes_in) - (arenas - self._extra_bytes)

    def free_bytes(self) -> int:
        """Memory where blocks compute that is free now: of the limits or, once planes are placed, for calls."""
        if self._way is not None:
            return max(0, self._room_bytes)
        limits = self._measured(0)
        return max(0, limits.free_bytes(limits.computes_in))

    @property
    def _extra_bytes(self) -> int:
        """Bytes of single entries that came to stay in memory since the plan was made."""
        assert self.placement is not None and self._planned is not None
        return self.placement.pieces_bytes - self._planned.pieces_bytes

    def with_what_is_left(self, needed_bytes: int) -> Placement | None:
        """The placement for a call that takes `needed_bytes`: with more single entries of streamed blocks in memory where
        the process leaves some unused, with fewer where it would not suffice; None where nothing changes.

        Call it between calls, after one was made: what the plan left for the unforeseen is then known.
        """
        assert self.placement is not None and self._planned is not None and self._planner is not None
        pins = self.settings.pins
        is_pinned = pins.resident is not None or pins.resident_bytes is not None
        if is_pinned or self.settings.home is not None:
            return None
        left = self.limits.host_bytes - self.limits.slack_bytes // 2 - needed_bytes - memory.resident_bytes()
        if left >= WORTH_FILLING_BYTES:
            placement = with_pieces(self.placement, self.records, left, self._planner.idle)
        elif left < 0:
            num_bytes = max(0, self._extra_bytes + left)
            placement = with_pieces(self._planned, self.records, num_bytes, self._planner.idle)
        else:
            return None
        if placement.pieces == self.placement.pieces:
            return None
        self.use(placement)
        return placement

    def shrink_tiles(self, num_tokens: int) -> None:
        """Limit tiles of future calls to `num_tokens`, even pinned ones; a tile has at least one row."""
        self._most_tile_tokens = num_tokens

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether a host that does not compute has room for `num_bytes` more beside what is placed."""
        return self.ledger.total(Home.HOST) + num_bytes + self.limits.slack_bytes <= self.limits.host_bytes

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn an out-of-memory error of the device into a BudgetError that names what would fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            what = str(error).partition(". ")[0]
            fewer = "let blocks compute fewer rows at once (--pin tile_rows=1)"
            if self.settings.on_device_full is OnDeviceFull.ERROR:
                fewer += ', or try again with fewer by itself (on_device_full="retry")'
            raise BudgetError(
                f"the device ran out of memory ({what}); {format_bytes(self.ledger.total(Home.DEVICE))} of "
                f"{format_bytes(self.limits.device_bytes or 0)} were planned",
                hint=f"another process may have taken it; else {fewer}, or give less with device=",
            ) from error

    def make_room(self, visit_bytes: int) -> None:
        """Called before each visit, which takes `visit_bytes`: give freed memory back where it would pass the limit."""
        assert self._ceiling is not None
        self._ceiling.make_room(visit_bytes)


def free_dropped_models() -> None:
    """Give back the memory of models that were dropped; those that hold much may wait in cycles for the collector."""
    finalizers.finish()
    if sum(num_bytes for _, num_bytes in memory.open_models()) >= WORTH_COLLECTING_BYTES:
        gc.collect()
        finalizers.finish()
    memory.give_back()


def _open_models_text() -> str:
    """The largest of the other models that hold memory, as part of a sentence."""
    for model, num_bytes in memory.open_models():
        if num_bytes >= WORTH_COLLECTING_BYTES:
            return f"of which {model}, which is still open, holds {format_bytes(num_bytes)}, "
    return ""


def _disk_bytes(settings: Settings, placement: Placement, records: Sequence[Record]) -> int:
    """Bytes that `placement` takes on disk. Raises BudgetError if the disks may not hold that much."""
    commits = settings.commits
    versions_bytes = Layout.of(records, placement).num_bytes(commits) if commits else None
    return disk_bytes(placement, settings, versions_bytes)
