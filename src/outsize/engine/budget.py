"""The memory of one model: what each part of it takes, and so which planes can stay.

Of the limit, the process itself comes first, then activations as the rehearsal measured them, then the arenas, into
which planes are placed. Between visits, freed memory is given back where the next one would pass the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize.block import Record
from outsize.config import Home, Pins, Settings, format_bytes
from outsize.engine import memory
from outsize.engine.probe import BatchShape, Rehearsal
from outsize.errors import BudgetError
from outsize.plan import Placement, place

SLACK_BYTES = 128 << 20
"""Memory left for what is not planned: malloc's remains, Python objects, thread stacks."""

HINT_MARGIN_BYTES = 8 << 20
"""Added to a budget that is recommended: two processes that do the same differ by 1 to 2 MiB."""

TILE_TOKENS = 2048
"""Tokens that a tile aims at: enough for full matmul speed; fewer where memory is short. Adding up the gradients of
512 instead costs 8 % of a step, of 2,048 less than 2."""


@dataclass(frozen=True, slots=True)
class _Needs:
    """What activations take: tensors kept between visits, and the most that one visit takes beside its weights."""

    boundary_bytes: int
    visit_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both."""
        return self.boundary_bytes + self.visit_bytes


class HostBudget:
    """A limit on the whole process, and what it is divided into; fixed by `place`.

    `always_resident`: blocks that cannot be streamed. The limit is the user's, or what is free when memory is placed.
    """

    def __init__(self, settings: Settings, always_resident: frozenset[str]) -> None:
        self.limit_bytes = 0
        self.base_bytes = 0
        self.activation_bytes = 0
        self.room_bytes = 0
        """What is left for activations and arenas together."""
        self.placement: Placement | None = None
        self._settings = settings
        self._always_resident = always_resident
        self._visit_bytes = 0
        self._ceiling: memory.Ceiling | None = None

    @property
    def num_times_given_back(self) -> int:
        """How often freed memory went back to the system before a visit."""
        return self._ceiling.num_times if self._ceiling is not None else 0

    def place(self, records: Sequence[Record], rehearsal: Rehearsal, shape: BatchShape) -> Placement:
        """Place `records` for calls of this shape. Raises BudgetError where they do not fit, naming what does."""
        memory.give_back()
        self.base_bytes = memory.resident_bytes()
        limit = self._settings.budgets.host_bytes
        self.limit_bytes = limit or self.base_bytes + int(0.9 * memory.available_bytes())
        self.room_bytes = self.limit_bytes - self.base_bytes - SLACK_BYTES - _source_bytes(records)
        self._ceiling = memory.Ceiling(self.limit_bytes - SLACK_BYTES // 2)
        self.placement = self._largest_that_fits(records, rehearsal, shape)
        return self.placement

    def begin_call(self, rehearsal: Rehearsal, shape: BatchShape) -> int:
        """The rows of the largest tile whose memory is within what is left beside the arenas.

        Raises BudgetError where not even the smallest is.
        """
        assert self.placement is not None
        room = self.room_bytes - self.placement.arena_bytes
        tile_rows = self._wanted_tile_rows(shape)
        while (needs := _needs(rehearsal, shape, tile_rows)).num_bytes > room:
            if tile_rows == 1 or self._settings.pins.tile_rows is not None:
                raise BudgetError(
                    f"a batch of {shape.rows or 1} rows takes {format_bytes(needs.num_bytes)} of activations, "
                    f"{format_bytes(room)} are left beside the arenas",
                    hint="use fewer rows or shorter sequences, give more memory with host=, or make the first "
                    "call with the largest batch",
                )
            tile_rows = -(-tile_rows // 2)
        self._visit_bytes = needs.visit_bytes
        return tile_rows

    def make_room(self) -> None:
        """Called before each visit: give freed memory back where the visit would pass the limit."""
        assert self._ceiling is not None
        self._ceiling.make_room(self._visit_bytes)

    def _largest_that_fits(
        self, records: Sequence[Record], rehearsal: Rehearsal, shape: BatchShape
    ) -> Placement:
        """Give memory to activations first, then to arenas; smaller tiles where that is what makes it fit."""
        settings = self._settings
        tile_rows = self._wanted_tile_rows(shape)
        keeps_freed = True
        while True:
            needs = _needs(rehearsal, shape, tile_rows)
            self.activation_bytes = needs.num_bytes
            # Freed activations fit badly into one another; with room for a second visit nothing has to be given back.
            taken = needs.num_bytes + (needs.visit_bytes if keeps_freed else 0)
            try:
                return place(
                    records,
                    arena_bytes=max(0, self.room_bytes - taken),
                    home=settings.home,
                    has_disk=settings.budgets.disk is not None,
                    always_resident=self._always_resident,
                    pins=settings.pins,
                )
            except BudgetError as error:
                if keeps_freed:
                    keeps_freed = False
                    continue
                if tile_rows > 1 and settings.pins.tile_rows is None:
                    tile_rows = -(-tile_rows // 2)
                    continue
                raise BudgetError(
                    f"the model does not fit into {format_bytes(self.limit_bytes)}: {error.message}; "
                    f"the process itself has {format_bytes(self.base_bytes)}, "
                    f"activations take {format_bytes(self.activation_bytes)}, "
                    f"{format_bytes(SLACK_BYTES + _source_bytes(records))} are kept free",
                    hint=self._hint(records, self.limit_bytes - self.room_bytes + self.activation_bytes),
                ) from error

    def _hint(self, records: Sequence[Record], fixed_bytes: int) -> str:
        """The smallest budget that works."""
        has_disk = self._settings.budgets.disk is not None
        pins = self._settings.pins
        least = place(
            records,
            arena_bytes=1 << 60,
            home=self._settings.home or Home.DISK,
            has_disk=has_disk,
            always_resident=self._always_resident,
            pins=Pins(
                weight_slots=pins.weight_slots or 1, gradient_slots=pins.gradient_slots or 1, resident_bytes=0
            ),
        )
        needed = -(-(fixed_bytes + least.arena_bytes + HINT_MARGIN_BYTES) // (1 << 20))
        hint = f'host="{needed}MiB" works with this batch'
        return hint if has_disk else f'{hint}; or give a folder on an SSD with disk="..."'

    def _wanted_tile_rows(self, shape: BatchShape) -> int:
        rows = shape.rows or 1
        wanted = self._settings.pins.tile_rows or -(-TILE_TOKENS // shape.row_tokens)
        return max(1, min(rows, wanted))


def disk_bytes(placement: Placement, records: Sequence[Record], settings: Settings) -> int:
    """What the store takes on disk; 0 where nothing lives there. Raises BudgetError where that is not allowed."""
    budget = settings.budgets.disk
    if not placement.disk_bytes or budget is None:
        return 0
    num_bytes = sum(record.num_bytes for record in records)
    if budget.num_bytes is not None and num_bytes > budget.num_bytes:
        raise BudgetError(
            f"the state takes {format_bytes(num_bytes)} on disk, "
            f"{budget.folder} may hold {format_bytes(budget.num_bytes)}",
            hint=f'disk="{budget.folder}:{-(-num_bytes // 2**20)}MiB" works',
        )
    return num_bytes


def _needs(rehearsal: Rehearsal, shape: BatchShape, tile_rows: int) -> _Needs:
    rows = shape.rows or 1
    is_tiled = bool(rehearsal.dims) and all(dims is not None for dims in rehearsal.dims.values())
    tile = rehearsal.tile_bytes.at(tile_rows if is_tiled else rows)
    return _Needs(rehearsal.boundary_bytes.at(rows), max(tile, rehearsal.loss_bytes.at(rows)))


def _source_bytes(records: Sequence[Record]) -> int:
    """What reading a block for the first time takes: a parameter in fp32, and what it is converted to."""
    return 8 * max((e.piece.num_elements for record in records for e in record.entries), default=0)
