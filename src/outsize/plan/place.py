"""Which planes stay in memory, and how many slots the others pass through.

Memory is spent in this order: the least that works (one weight slot and one gradient slot per class, the chunk
buffers), then slots that let transfers run beside computing, then resident planes. Those come first that save most
traffic per byte: weights move three times per step (read forward and backward, written by the update), gradients and
state twice; unless a plan that was simulated says of how many blocks each stays. Of the planes of one kind, those that
stay are spread evenly over the model, so that what still moves has time beside them, the ends of it last: what is visited
last forward is visited first backward, and stays in its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from outsize.block import ALIGNMENT, CHUNK, Plane, Record, align
from outsize.config import Home, Pins, format_bytes
from outsize.errors import BudgetError

GRADIENT_SUM_BYTES = 4
"""Gradients are summed in fp32, whatever the type they are stored in."""

WANTED_WEIGHT_SLOTS = 3
WANTED_WEIGHT_SLOTS_TO_READ = 2
"""Where nothing trains: one is filled while another computes."""
WANTED_GRADIENT_SLOTS = 2
CHUNK_BUFFERS = 4
BOUNCE_BUFFERS = 8
"""Four for each way: the disk fills two while the link empties two."""
STAGING_BUFFERS = 2
_ABSENT = 0

GROUPS = (Plane.WEIGHT, Plane.GRADIENT, Plane.MOMENT1)
"""What stays or moves as one; MOMENT1 stands for all state."""


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

    `resident` holds `(block, plane)`, for WEIGHT, GRADIENT and, standing for all state planes, MOMENT1, of what stays
    where blocks compute. Where that is a device with memory of its own, `hosted` holds what stays in the host's memory
    instead, and everything that moves passes through pinned buffers: chunks, `bounce_buffers` between disk and device,
    and `staging_buffers` for whole weight planes that come from a checkpoint. `kept` holds layers whose activations wait
    for the backward, which then does not compute them again; their weights are resident. `inputs` is where the inputs of
    blocks wait, at most `inputs_bytes` there; None where they stay where blocks compute. `pieces` holds `(block, index)` of
    single entries of streamed blocks whose weights stay in memory as well: filling a slot copies them from there instead of
    reading them from the model's files.
    """

    resident: frozenset[tuple[str, Plane]]
    weight_classes: tuple[SlotClass, ...]
    gradient_classes: tuple[SlotClass, ...]
    chunk_buffers: int
    chunk_bytes: int
    resident_bytes: int
    disk_bytes: int
    hosted: frozenset[tuple[str, Plane]] = frozenset()
    hosted_bytes: int = 0
    bounce_buffers: int = 0
    bounce_bytes: int = 0
    staging_buffers: int = 0
    staging_bytes: int = 0
    kept: frozenset[str] = frozenset()
    inputs: Home | None = None
    inputs_bytes: int = 0
    pieces: frozenset[tuple[str, int]] = frozenset()
    pieces_bytes: int = 0

    def is_roomy(self, pins: Pins) -> bool:
        """Whether there are as many slots as transfers beside computing can use, or as were pinned."""
        wanted_slots = WANTED_WEIGHT_SLOTS if self.gradient_classes else WANTED_WEIGHT_SLOTS_TO_READ
        return all(
            group.count >= min(wanted, len(group.blocks))
            for groups, wanted in (
                (self.weight_classes, pins.weight_slots or wanted_slots),
                (self.gradient_classes, pins.gradient_slots or WANTED_GRADIENT_SLOTS),
            )
            for group in groups
        )

    @property
    def slots_bytes(self) -> int:
        """Memory of all slots."""
        return sum(group.num_bytes for group in self.weight_classes + self.gradient_classes)

    @property
    def passage_bytes(self) -> int:
        """Memory of the buffers that planes pass through on their way to a slot."""
        chunks = self.chunk_buffers * self.chunk_bytes
        bounce = self.bounce_buffers * self.bounce_bytes
        return chunks + bounce + self.staging_buffers * self.staging_bytes

    @property
    def compute_bytes(self) -> int:
        """Memory where blocks compute: slots and what is resident."""
        return self.slots_bytes + self.resident_bytes + self.pieces_bytes

    @property
    def home_bytes(self) -> int:
        """Memory of the host beside that: what is hosted, and what planes pass through."""
        return self.hosted_bytes + self.passage_bytes

    @property
    def arena_bytes(self) -> int:
        """Memory of everything; all of it the host's where blocks compute there."""
        return self.compute_bytes + self.home_bytes

    def is_resident(self, block: str, plane: Plane) -> bool:
        """Whether `plane` of `block` stays where blocks compute (any state plane stands for all)."""
        return (block, _group(plane)) in self.resident

    def is_hosted(self, block: str, plane: Plane) -> bool:
        """Whether `plane` of `block` stays in the memory of a host that does not compute."""
        return (block, _group(plane)) in self.hosted


def _group(plane: Plane) -> Plane:
    return plane if plane in (Plane.WEIGHT, Plane.GRADIENT) else Plane.MOMENT1


def group_bytes(record: Record, group: Plane) -> int:
    """Memory of one resident group of planes of `record`: the weights, the gradient, or all of the state."""
    if group is Plane.MOMENT1:
        return record.whole_state_bytes
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
    kept: frozenset[str] = frozenset(),
    idle: frozenset[str] = frozenset(),
    pins: Pins,
) -> Placement:
    """The placement that uses `arena_bytes` best; the weights of blocks in `kept` stay in memory whatever else does, those
    of blocks in `idle`, which no visit needs, only where all do.

    `home` pins where planes live (`HOST`: all resident, `DISK`: none but `always_resident`); without it memory that is
    left after the slots holds planes. Raises BudgetError, naming the least arena that works, where nothing fits.
    """
    if home in (Home.HOST, Home.DEVICE) or not has_disk:
        whole = _placed(records, _everything(records), 1, 1)
        if whole.arena_bytes > arena_bytes:
            raise BudgetError(
                f"all planes in memory take {format_bytes(whole.arena_bytes)}, "
                f"the budget leaves {format_bytes(arena_bytes)} for them",
                hint='give a folder on an SSD with disk="...", or more memory with host="..."',
            )
        return whole
    limit = pins.resident_bytes if pins.resident_bytes is not None else (0 if home is Home.DISK else None)
    if pins.resident is None and limit != 0:
        whole = _placed(records, _everything(records), 1, 1)
        if whole.arena_bytes <= arena_bytes and (limit is None or whole.resident_bytes <= limit):
            return whole

    least = _least(records, always_resident, kept)
    if pins.resident is not None:
        if home is Home.DISK:
            raise BudgetError(
                f"Pins(resident={pins.resident}) keeps planes in memory, and home=disk keeps none",
                hint="leave one of them out",
            )
        least, limit = _kept(records, least, pins.resident), 0
    slots, placement = _with_slots(records, least, arena_bytes, pins)
    left = arena_bytes - placement.arena_bytes
    if limit is not None:
        left = min(left, limit)
    chosen = set(least)
    for record, group in _ordered([r for r in records if r.name not in idle]) if left else ():
        cost = group_bytes(record, group)
        if (record.name, group) not in chosen and cost <= left:
            chosen.add((record.name, group))
            left -= cost
    placement = _placed(records, frozenset(chosen), *slots)
    return placement if limit == 0 else with_pieces(placement, records, left, idle)


def _least(
    records: Sequence[Record], always_resident: frozenset[str], kept: frozenset[str]
) -> frozenset[tuple[str, Plane]]:
    """What stays in memory whatever else does: all planes of some blocks, the weights of others."""
    return frozenset(
        (name, group)
        for name, group in _everything([r for r in records if r.name in always_resident | kept])
        if name in always_resident or group is Plane.WEIGHT
    )


def _with_slots(
    records: Sequence[Record], resident: frozenset[tuple[str, Plane]], arena_bytes: int, pins: Pins
) -> tuple[tuple[int, int], Placement]:
    """As many slots as fit beside `resident`, and the placement with them. Raises BudgetError where the fewest do not."""
    for slots in _fewer_and_fewer(records, pins):
        placement = _placed(records, resident, *slots)
        if placement.arena_bytes <= arena_bytes:
            return slots, placement
    raise BudgetError(
        f"the slots and buffers that streaming needs take {format_bytes(placement.arena_bytes)}, "
        f"the budget leaves {format_bytes(arena_bytes)} for them",
        hint="give more memory with host=, a smaller batch or shorter sequences",
    )


def with_pieces(
    placement: Placement, records: Sequence[Record], num_bytes: int, idle: frozenset[str] = frozenset()
) -> Placement:
    """`placement` with entries of streamed blocks in `num_bytes` more memory, the largest of a block first.

    A block is large beside a small budget: what is left where no whole one fits would stay unused. Where something trains
    nothing changes: an update would have to write such an entry twice.
    """
    chosen: dict[tuple[str, int], int] = {}
    streamed = [r for r in records if r.name not in idle and not placement.is_resident(r.name, Plane.WEIGHT)]
    for record in _spread_evenly(streamed) if not is_stored(records) else ():
        sizes = {
            index: align(entry.piece.num_elements * record.element_bytes[Plane.WEIGHT])
            for index, entry in enumerate(record.entries)
        }
        for index in sorted(sizes, key=lambda index: (-sizes[index], index)):
            if 0 < sizes[index] <= num_bytes and (record.name, index) not in placement.pieces:
                chosen[record.name, index] = sizes[index]
                num_bytes -= sizes[index]
    return replace(
        placement,
        pieces=placement.pieces.union(chosen),
        pieces_bytes=placement.pieces_bytes + sum(chosen.values()),
    )


def _fewer_and_fewer(records: Sequence[Record], pins: Pins) -> Iterator[tuple[int, int]]:
    """Numbers of weight and gradient slots, from as many as transfers can use, or were pinned, down to the least."""
    wanted = WANTED_WEIGHT_SLOTS if is_stored(records) else WANTED_WEIGHT_SLOTS_TO_READ
    weight_slots = pins.weight_slots or wanted
    gradient_slots = pins.gradient_slots or WANTED_GRADIENT_SLOTS
    while True:
        yield weight_slots, gradient_slots
        if weight_slots > 1 and pins.weight_slots is None and weight_slots >= gradient_slots:
            weight_slots -= 1
        elif gradient_slots > 1 and pins.gradient_slots is None:
            gradient_slots -= 1
        else:
            return


def _kept(
    records: Sequence[Record], always: frozenset[tuple[str, Plane]], counts: tuple[int, int, int]
) -> frozenset[tuple[str, Plane]]:
    """`always`, and weights, gradients and state of so many blocks."""
    order = _spread_evenly(records)
    return always | {
        (record.name, group)
        for group, count in zip(GROUPS, counts, strict=True)
        for record in order[:count]
        if group_bytes(record, group)
    }


def place_apart(
    records: Sequence[Record],
    *,
    device_bytes: int,
    host_bytes: int,
    home: Home | None,
    has_disk: bool,
    always_resident: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
    pins: Pins,
    commits: bool = False,
) -> Placement:
    """The placement that uses `device_bytes` beside a device and `host_bytes` of the host's memory best.

    On the device, slots come first and the blocks in `kept`, then other whole blocks with gradient and state: such a
    block moves nothing and is updated there. They are spread evenly over the model, so that what still moves has time
    beside them (in the manner of the k-th block of Deep Optimizer States, https://arxiv.org/abs/2410.21316). The host's
    memory holds weights first, then gradients, then state, as far as it goes; the disk holds the rest. `home` pins all
    three: DEVICE, HOST or DISK. With `commits`, what lives on the device passes through bounce buffers to the disk.
    Raises BudgetError, naming what is short, where nothing fits.
    """
    groups = _ordered(records)
    everything = _everything(records)
    whole = _placed(records, everything, 1, 1, frozenset() if commits else None, commits)
    if pins.resident is not None:
        raise BudgetError(
            "Pins(resident=...) is for machines whose blocks compute in the host's memory",
            hint="with a device, give resident_bytes= instead",
        )
    limit = pins.resident_bytes if pins.resident_bytes is not None else (None if home is None else 0)
    if home is Home.DEVICE or (
        whole.compute_bytes <= device_bytes and (limit is None or whole.resident_bytes <= limit)
    ):
        if whole.compute_bytes > device_bytes:
            raise BudgetError(
                f"all planes beside the device take {format_bytes(whole.compute_bytes)}, "
                f"the budget leaves {format_bytes(device_bytes)} for them",
                hint="leave home= out: weights and state then live in the host's memory or on disk",
            )
        return whole
    resident = frozenset(key for key in everything if key[0] in always_resident | kept)
    for slots in _fewer_and_fewer(records, pins):
        placement = _placed(records, resident, *slots)
        if placement.compute_bytes <= device_bytes:
            break
    else:
        raise BudgetError(
            f"the slots that streaming needs take {format_bytes(placement.compute_bytes)} of the device, "
            f"the budget leaves {format_bytes(device_bytes)} for them",
            hint="give more memory with device=, a smaller batch or shorter sequences",
        )

    left = device_bytes - placement.compute_bytes
    resident |= _spread(records, everything - resident, left if limit is None else min(left, limit))
    hosted = _hosted(records, groups, resident, home, has_disk, host_bytes, slots)
    placement = _placed(records, resident, *slots, hosted, commits)
    if placement.home_bytes > host_bytes:
        raise BudgetError(
            f"what lives in the host's memory takes {format_bytes(placement.home_bytes)}, "
            f"the budget leaves {format_bytes(host_bytes)} for it",
            hint="give more memory with host="
            if has_disk
            else 'give a folder on an SSD with disk="...", or more memory with host=',
        )
    return placement


def is_stored(records: Sequence[Record]) -> bool:
    """Whether anything is ever written: where nothing trains, weights are read from where they came from, each time."""
    return any(record.num_trainable for record in records)


def evicted(placement: Placement, record: Record) -> Placement:
    """`placement`, with a block that stays on the device in the host's memory instead.

    It passes through slots that are there and large enough, or through one of its own. Nothing is kept for a backward any
    more, and so nothing has to stay for it.
    """
    keys = frozenset(key for key in placement.resident if key[0] == record.name)
    num_bytes = sum(group_bytes(record, group) for _, group in keys)
    gradients = placement.gradient_classes
    if record.num_trainable and slot_class_of(gradients, record.name) is None:
        gradients = _with_block(gradients, record.name, sum_bytes(record))
    return replace(
        placement,
        resident=placement.resident - keys,
        resident_bytes=placement.resident_bytes - num_bytes,
        hosted=placement.hosted | keys,
        hosted_bytes=placement.hosted_bytes + num_bytes,
        weight_classes=_with_block(placement.weight_classes, record.name, record.plane_bytes(Plane.WEIGHT)),
        gradient_classes=gradients,
        kept=frozenset(),
    )


def slot_class_of(classes: Sequence[SlotClass], block: str) -> int | None:
    """The index of the class whose slots `block` passes through; None for a block that stays."""
    return next((index for index, group in enumerate(classes) if block in group.blocks), None)


def _with_block(classes: tuple[SlotClass, ...], block: str, num_bytes: int) -> tuple[SlotClass, ...]:
    """`classes`, the smallest that is large enough with `block` in it, or with one more."""
    fitting = [index for index, group in enumerate(classes) if group.slot_bytes >= num_bytes]
    if not fitting:
        return (*classes, SlotClass(num_bytes, 1, frozenset((block,))))
    chosen = min(fitting, key=lambda index: classes[index].slot_bytes)
    joined = replace(classes[chosen], blocks=classes[chosen].blocks | {block})
    return (*classes[:chosen], joined, *classes[chosen + 1 :])


def _everything(records: Sequence[Record]) -> frozenset[tuple[str, Plane]]:
    """All groups of planes."""
    return frozenset((r.name, group) for r in records for group in GROUPS if group_bytes(r, group))


def _ordered(records: Sequence[Record]) -> list[tuple[Record, Plane]]:
    """All groups of planes, those first that save most by staying."""
    return [
        (record, group)
        for group in GROUPS
        for record in _spread_evenly(records)
        if group_bytes(record, group)
    ]


def _spread_evenly(records: Sequence[Record]) -> list[Record]:
    """`records` in an order of which every prefix is spread over the model: the middle, the middles of both halves, ..."""
    order: list[Record] = []
    spans = deque([(0, len(records))])
    while spans:
        start, stop = spans.popleft()
        if start < stop:
            middle = (start + stop) // 2
            order.append(records[middle])
            spans += [(start, middle), (middle + 1, stop)]
    return order


def _spread(
    records: Sequence[Record], keys: frozenset[tuple[str, Plane]], num_bytes: int
) -> frozenset[tuple[str, Plane]]:
    """All planes of as many whole blocks as fit, evenly over the model."""
    chosen: set[tuple[str, Plane]] = set()
    for record in _spread_evenly(records):
        planes = [group for group in GROUPS if (record.name, group) in keys]
        cost = sum(group_bytes(record, group) for group in planes)
        if cost <= num_bytes:
            chosen |= {(record.name, group) for group in planes}
            num_bytes -= cost
    return frozenset(chosen)


def _hosted(
    records: Sequence[Record],
    groups: Sequence[tuple[Record, Plane]],
    resident: frozenset[tuple[str, Plane]],
    home: Home | None,
    has_disk: bool,
    host_bytes: int,
    slots: tuple[int, int],
) -> frozenset[tuple[str, Plane]]:
    """What the host's memory holds, beside the buffers that the rest passes through."""
    moving = [(record, group) for record, group in groups if (record.name, group) not in resident]
    everything = frozenset((record.name, group) for record, group in moving)
    if home is Home.HOST or not has_disk:
        return everything
    if home is Home.DISK:
        return frozenset()
    if _placed(records, resident, *slots, everything).home_bytes <= host_bytes:
        return everything
    left = host_bytes - _placed(records, resident, *slots, frozenset()).passage_bytes
    hosted: set[tuple[str, Plane]] = set()
    for record, group in moving:
        cost = group_bytes(record, group)
        if cost <= left:
            hosted.add((record.name, group))
            left -= cost
    return frozenset(hosted)


def _placed(
    records: Sequence[Record],
    resident: frozenset[tuple[str, Plane]],
    weight_slots: int,
    gradient_slots: int,
    hosted: frozenset[tuple[str, Plane]] | None = None,
    commits: bool = False,
) -> Placement:
    """The placement with these homes; `hosted` is None where blocks compute in the host's memory."""
    is_apart = hosted is not None
    homes = resident | (hosted or frozenset())
    by_name = {record.name: record for record in records}
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
    if is_apart:
        trainable = [record for record in trainable if (record.name, Plane.MOMENT1) not in resident]
    chunk_bytes = max((_chunk_bytes(record, homes, is_apart) for record in trainable), default=0)
    from_disk = [
        record
        for record in records
        if is_apart
        and any(
            group_bytes(record, group) and (record.name, group) not in homes
            for group in (Plane.WEIGHT, Plane.GRADIENT)
        )
    ]
    is_bounced = bool(from_disk) or (commits and is_apart and bool(resident))
    staged = max(
        (r.plane_bytes(Plane.WEIGHT) for r in from_disk if (r.name, Plane.WEIGHT) not in homes), default=0
    )
    return Placement(
        resident=resident,
        weight_classes=_classes(streamed, weight_slots),
        gradient_classes=_classes(summed, gradient_slots),
        chunk_buffers=CHUNK_BUFFERS if chunk_bytes else 0,
        chunk_bytes=chunk_bytes,
        resident_bytes=sum(group_bytes(by_name[name], group) for name, group in resident),
        disk_bytes=sum(
            record.num_bytes
            for record in records
            if any(group_bytes(record, g) and (record.name, g) not in homes for g in GROUPS)
        )
        if is_stored(records)
        else 0,
        hosted=hosted or frozenset(),
        hosted_bytes=sum(group_bytes(by_name[name], group) for name, group in hosted or ()),
        bounce_buffers=BOUNCE_BUFFERS if is_bounced else 0,
        bounce_bytes=CHUNK * GRADIENT_SUM_BYTES if is_bounced else 0,
        staging_buffers=STAGING_BUFFERS if staged else 0,
        staging_bytes=staged,
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


def _chunk_bytes(record: Record, homes: frozenset[tuple[str, Plane]], is_apart: bool) -> int:
    """What an update of one chunk needs beside planes at home in memory; on a device weights pass through as well."""
    moving = [(record.name, group) not in homes for group in GROUPS]
    moving[0] = moving[0] and is_apart
    return sum(size for size, moves in zip(record.chunk_bytes, moving, strict=True) if moves)


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
