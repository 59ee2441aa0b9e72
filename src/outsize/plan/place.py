"""Which planes stay in memory, and how many slots the others pass through.

Memory is spent in this order: the least that works (one weight slot and one gradient slot per class, the chunk
buffers), then slots that let transfers run beside computing, then resident planes, those first that save most traffic
per byte: weights move three times per step (read forward and backward, written by the update), gradients and state
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize.block import ALIGNMENT, CHUNK, Plane, Record, align
from outsize.config import Home, Pins, format_bytes
from outsize.errors import BudgetError

GRADIENT_SUM_BYTES = 4
"""Gradients are summed in fp32, whatever the type they are stored in."""

WANTED_WEIGHT_SLOTS = 3
WANTED_GRADIENT_SLOTS = 2
CHUNK_BUFFERS = 4
_ABSENT = 0


@dataclass(frozen=True, slots=True)
class SlotClass:
    """Slots of one size, and the blocks that pass through them."""

    slot_bytes: int
    count: int
    blocks: frozenset[str]

    @property
    def num_bytes(self) -> int:
        """Memory of all slots of the class."""
        return self.slot_bytes * self.count


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every plane lives between visits, and the buffers it passes through. All figures are bytes or counts.

    `resident` holds `(block, plane)` for WEIGHT, GRADIENT and, standing for all state planes, MOMENT1.
    """

    resident: frozenset[tuple[str, Plane]]
    weight_classes: tuple[SlotClass, ...]
    gradient_classes: tuple[SlotClass, ...]
    chunk_buffers: int
    chunk_bytes: int
    resident_bytes: int
    disk_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Memory of slots and chunk buffers."""
        slots = sum(group.num_bytes for group in self.weight_classes + self.gradient_classes)
        return slots + self.chunk_buffers * self.chunk_bytes

    @property
    def arena_bytes(self) -> int:
        """Memory of everything the arena holds."""
        return self.buffer_bytes + self.resident_bytes

    def is_resident(self, block: str, plane: Plane) -> bool:
        """Whether `plane` of `block` stays in memory (any state plane stands for all)."""
        group = plane if plane in (Plane.WEIGHT, Plane.GRADIENT) else Plane.MOMENT1
        return (block, group) in self.resident


def group_bytes(record: Record, group: Plane) -> int:
    """Memory of one resident group of planes of `record`: the weights, the gradient, or all of the state."""
    if group is Plane.MOMENT1:
        return sum(record.plane_bytes(plane) for plane in record.state)
    if group is Plane.GRADIENT and not record.num_trainable:
        return _ABSENT
    return record.plane_bytes(group)


def place(
    records: Sequence[Record],
    *,
    arena_bytes: int,
    home: Home | None,
    has_disk: bool,
    always_resident: frozenset[str] = frozenset(),
    pins: Pins,
) -> Placement:
    """The placement that uses `arena_bytes` best.

    `home` pins where planes live (`HOST`: all resident, `DISK`: none but `always_resident`); without it memory that is
    left after the slots holds planes. Raises BudgetError, naming the least arena that works, where nothing fits.
    """
    groups = [
        (record, group)
        for group in (Plane.WEIGHT, Plane.GRADIENT, Plane.MOMENT1)
        for record in records
        if group_bytes(record, group)
    ]
    everything = frozenset((record.name, group) for record, group in groups)
    whole = _placed(records, everything, 1, 1)
    if home in (Home.HOST, Home.DEVICE) or not has_disk:
        if whole.arena_bytes > arena_bytes:
            raise BudgetError(
                f"all planes in memory take {format_bytes(whole.arena_bytes)}, "
                f"the budget leaves {format_bytes(arena_bytes)} for them",
                hint='give a folder on an SSD with disk="...", or more memory with host="..."',
            )
        return whole
    limit = pins.resident_bytes if pins.resident_bytes is not None else (0 if home is Home.DISK else None)
    if limit is None and whole.arena_bytes <= arena_bytes:
        return whole

    resident = frozenset(key for key in everything if key[0] in always_resident)
    weight_slots = pins.weight_slots or WANTED_WEIGHT_SLOTS
    gradient_slots = pins.gradient_slots or WANTED_GRADIENT_SLOTS
    placement = _placed(records, resident, weight_slots, gradient_slots)
    while placement.arena_bytes > arena_bytes:
        if weight_slots > 1 and pins.weight_slots is None and weight_slots >= gradient_slots:
            weight_slots -= 1
        elif gradient_slots > 1 and pins.gradient_slots is None:
            gradient_slots -= 1
        else:
            raise BudgetError(
                f"the slots and buffers that streaming needs take {format_bytes(placement.arena_bytes)}, "
                f"the budget leaves {format_bytes(arena_bytes)} for them",
                hint="give more memory with host=, a smaller batch or shorter sequences",
            )
        placement = _placed(records, resident, weight_slots, gradient_slots)

    left = arena_bytes - placement.arena_bytes
    if limit is not None:
        left = min(left, limit)
    chosen = set(resident)
    for record, group in groups:
        cost = group_bytes(record, group)
        if (record.name, group) not in chosen and cost <= left:
            chosen.add((record.name, group))
            left -= cost
    return _placed(records, frozenset(chosen), weight_slots, gradient_slots)


def _placed(
    records: Sequence[Record], resident: frozenset[tuple[str, Plane]], weight_slots: int, gradient_slots: int
) -> Placement:
    streamed = {
        record.name: record.plane_bytes(Plane.WEIGHT)
        for record in records
        if (record.name, Plane.WEIGHT) not in resident
    }
    summed = {
        record.name: sum_bytes(record)
        for record in records
        if record.num_trainable and not sums_in_place(record, (record.name, Plane.GRADIENT) in resident)
    }
    trainable = [record for record in records if record.num_trainable and record.state]
    chunk_bytes = max((_chunk_bytes(record, resident) for record in trainable), default=0)
    return Placement(
        resident=resident,
        weight_classes=_classes(streamed, weight_slots),
        gradient_classes=_classes(summed, gradient_slots),
        chunk_buffers=CHUNK_BUFFERS if chunk_bytes else 0,
        chunk_bytes=chunk_bytes,
        resident_bytes=sum(group_bytes(r, g) for r in records for n, g in resident if n == r.name),
        disk_bytes=sum(
            record.num_bytes
            for record in records
            if any(
                group_bytes(record, g) and (record.name, g) not in resident
                for g in (Plane.WEIGHT, Plane.GRADIENT, Plane.MOMENT1)
            )
        ),
    )


def sum_bytes(record: Record) -> int:
    """Bytes of a slot for the fp32 sum of `record`'s gradient.

    A narrower stored gradient is read to the end of the slot and widened in place, front to back; the extra page
    keeps what is written from overtaking what is read, whatever the rounding to pages.
    """
    is_narrow = record.element_bytes[Plane.GRADIENT] < GRADIENT_SUM_BYTES
    return align(record.num_trainable * GRADIENT_SUM_BYTES) + (ALIGNMENT if is_narrow else 0)


def sums_in_place(record: Record, gradient_is_resident: bool) -> bool:
    """Whether backward can add straight into the resident gradient plane: it is fp32 already."""
    return gradient_is_resident and record.element_bytes[Plane.GRADIENT] == GRADIENT_SUM_BYTES


def _chunk_bytes(record: Record, resident: frozenset[tuple[str, Plane]]) -> int:
    num_elements = min(CHUNK, record.num_trainable)
    state = 0 if (record.name, Plane.MOMENT1) in resident else record.state_bytes(num_elements)
    gradient = align(num_elements * record.element_bytes[Plane.GRADIENT])
    return state + (0 if (record.name, Plane.GRADIENT) in resident else gradient)


def _classes(sizes: dict[str, int], count: int) -> tuple[SlotClass, ...]:
    """Group blocks so that no slot is more than twice as large as a block that uses it."""
    classes: list[SlotClass] = []
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    while names:
        largest = sizes[names[0]]
        members = [name for name in names if 2 * sizes[name] > largest]
        names = names[len(members) :]
        classes.append(SlotClass(largest, min(count, len(members)), frozenset(members)))
    return tuple(classes)
