"""Where each group of planes of each block lives, and the slots and buffers that the others pass through.

Memory is spent in this order: the least that works (one weight slot and one gradient slot per class, the chunk buffers),
then slots that let transfers run beside computing, then homes, from the fastest memory down. A home in memory goes first to
the groups that save most traffic per byte: weights move three times per step (read forward and backward, written by the
update), gradients and state twice; unless a plan that was simulated says of how many blocks each stays. A device with
memory of its own takes whole blocks instead, which it then updates itself. The blocks of which a group stays are spread
evenly over the model, so that what still moves has time beside them (in the manner of the k-th block of Deep Optimizer
States, https://arxiv.org/abs/2410.21316), the ends of the model last: what is visited last forward is visited first
backward, and stays in its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import TypeAlias

from outsize.block import ALIGNMENT, CHUNK, Group, Plane, Record, align
from outsize.config import Home, Pins, format_bytes
from outsize.errors import BudgetError
from outsize.plan.path import DRIVE, Leg, legs

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

GROUPS = (Group.WEIGHT, Group.GRADIENT, Group.STATE)
"""Those that save most traffic per byte first."""

IN_MEMORY = (Home.DEVICE, Home.HOST)

Key: TypeAlias = tuple[str, Group]
"""A block and a group of its planes."""

Room: TypeAlias = Mapping[Home, int]
"""Bytes of memory by home: DEVICE where blocks compute, and HOST if that is a device with memory of its own."""


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
class Buffers:
    """`count` buffers of `each_bytes`; none where nothing needs them."""

    count: int = 0
    each_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all."""
        return self.count * self.each_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every group of planes lives between visits, and what it passes through. Figures are bytes.

    `homes` has one word for every group of every block, and `host` is the word for the host's memory: HOST beside a device
    with memory of its own; DEVICE where the processor computes, and then no group has HOST. Weights and gradients that
    do not live where blocks compute pass through `slots` there, and through buffers in the host's memory: `chunks` of an
    update, `bounce` buffers between disk and device, `staging` buffers for whole weight planes from a checkpoint.

    `kept` holds layers whose activations wait for the backward, which then does not compute them again; their weights
    stay where they compute. `inputs` is where the inputs of blocks wait, at most `inputs_bytes` there; None where they
    stay where blocks compute. `pieces` holds `(block, index)` of single entries of streamed blocks whose weights stay in
    memory as well: a slot is filled from there instead of the model's files.
    """

    homes: Mapping[Key, Home] = field(hash=False)
    slots: Mapping[Group, tuple[SlotClass, ...]] = field(hash=False)
    resident_bytes: int
    disk_bytes: int
    hosted_bytes: int = 0
    host: Home = Home.DEVICE
    chunks: Buffers = Buffers()
    bounce: Buffers = Buffers()
    staging: Buffers = Buffers()
    kept: frozenset[str] = frozenset()
    inputs: Home | None = None
    inputs_bytes: int = 0
    pieces: frozenset[tuple[str, int]] = frozenset()
    pieces_bytes: int = 0

    def home(self, block: str, group: Group) -> Home:
        """Where `group` of `block` lives between visits."""
        if group is Group.INPUT:
            return Home.DEVICE if self.inputs is None or block in self.kept else self.inputs
        return self.homes[block, group]

    def legs(self, start: Home, end: Home = Home.DEVICE) -> tuple[Leg, ...]:
        """The path from one home to another, which is nearer to where blocks compute."""
        return legs(start, end, self.host)

    def homes_of(self, block: str) -> dict[Group, Home]:
        """Where each group of `block` lives."""
        return {group: self.homes[block, group] for group in GROUPS}

    def at(self, home: Home) -> frozenset[Key]:
        """All that lives in `home`."""
        return frozenset(key for key, own in self.homes.items() if own is home)

    def slot_class(self, block: str, group: Group) -> int | None:
        """The index of the class whose slots this group of `block` passes through; None where it stays."""
        classes = self.slots[group]
        return next((index for index, each in enumerate(classes) if block in each.blocks), None)

    def is_roomy(self, pins: Pins) -> bool:
        """Whether there are as many slots as transfers beside computing can use, or as were pinned."""
        trains = bool(self.slots[Group.GRADIENT])
        wanted = dict(zip(self.slots, _wanted_slots(pins, trains), strict=True))
        return all(
            each.count >= min(wanted[group], len(each.blocks))
            for group, classes in self.slots.items()
            for each in classes
        )

    @property
    def slots_bytes(self) -> int:
        """Memory of all slots."""
        return sum(each.num_bytes for classes in self.slots.values() for each in classes)

    @property
    def passage_bytes(self) -> int:
        """Memory of the buffers that planes pass through on their way to a slot."""
        return self.chunks.num_bytes + self.bounce.num_bytes + self.staging.num_bytes

    def bytes_in(self, home: Home) -> int:
        """Memory of `home`, DEVICE or HOST, that planes, slots and buffers take."""
        passage = self.passage_bytes if home is self.host else 0
        if home is Home.HOST:
            return self.hosted_bytes + passage
        return self.slots_bytes + self.resident_bytes + self.pieces_bytes + passage


def _wanted_slots(pins: Pins, trains: bool) -> tuple[int, int]:
    """Weight and gradient slots that transfers can use, or that were pinned."""
    weight_slots = WANTED_WEIGHT_SLOTS if trains else WANTED_WEIGHT_SLOTS_TO_READ
    return pins.weight_slots or weight_slots, pins.gradient_slots or WANTED_GRADIENT_SLOTS


def units(host: Home) -> tuple[tuple[Group, ...], ...]:
    """The groups of a block that stay where blocks compute only together, those with the weights first.

    Beyond a link that is the whole block, which is then updated there.
    """
    return (GROUPS,) if legs(host, Home.DEVICE, host) else tuple((group,) for group in GROUPS)


def is_stored(records: Sequence[Record]) -> bool:
    """Whether anything is ever written: where nothing trains, weights are read from where they came from, each time."""
    return any(record.num_trainable for record in records)


def place(
    records: Sequence[Record],
    room: Room,
    *,
    home: Home | None,
    has_disk: bool,
    always_resident: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
    idle: frozenset[str] = frozenset(),
    pins: Pins,
    commits: bool = False,
) -> Placement:
    """The placement that uses `room` best.

    All planes of the blocks in `always_resident`, and the weights of those in `kept`, stay where blocks compute whatever
    else does; none of those in `idle`, which no visit needs, unless all blocks do. `home` pins where all others live. With
    `commits`, what lives on a device passes through bounce buffers to the disk. Raises BudgetError, naming what is short,
    where nothing fits.
    """
    host = Home.HOST if Home.HOST in room else Home.DEVICE
    if host is Home.HOST and pins.resident is not None:
        raise BudgetError(
            "Pins(resident=...) is for machines whose blocks compute in the host's memory",
            hint="with a device, give resident_bytes= instead",
        )
    if host is Home.DEVICE and (home is Home.HOST or not has_disk):
        home = Home.DEVICE  # the only memory, and the only home
    if home is Home.DISK and pins.resident is not None:
        raise BudgetError(
            f"Pins(resident={pins.resident}) keeps planes in memory, and home=disk keeps none",
            hint="leave one of them out",
        )
    limit = pins.resident_bytes if home is None or pins.resident_bytes is not None else 0
    if pins.resident is not None:
        limit = 0  # nothing beside the blocks that are pinned
    placer = _Placer(records, room, host, commits)
    if home is Home.DEVICE or limit != 0:
        whole = placer.with_all(Home.DEVICE)
        fits = placer.left(whole, Home.DEVICE) >= 0
        if home is Home.DEVICE and not fits:
            raise placer.too_little(whole, Home.DEVICE, "all planes take", _WHOLE_HINTS[host])
        if home is Home.DEVICE or (fits and (limit is None or whole.resident_bytes <= limit)):
            return whole
    placer.pin(always_resident, kept, pins.resident or (0, 0, 0))
    left = placer.take_slots(pins)
    left = placer.fill(Home.DEVICE, left if limit is None else min(left, limit), idle)
    if host is Home.HOST:
        return placer.beside_device(home, has_disk)
    placement = placer.placement()
    return placement if limit == 0 else with_pieces(placement, records, left, idle)


_WHOLE_HINTS = {
    Home.DEVICE: 'give a folder on an SSD with disk="...", or more memory with host="..."',
    Home.HOST: "leave home= out: weights and state then live in the host's memory or on disk",
}


class _Placer:
    """Gives homes to groups of planes. At first all live where they move from: on disk, or in the model's files."""

    def __init__(self, records: Sequence[Record], room: Room, host: Home, commits: bool) -> None:
        self._num_bytes = {(r.name, group): r.group_bytes[group] for r in records for group in GROUPS}
        stored = {r.name for r in records if r.num_stored} if is_stored(records) else set()
        self._homes = {key: Home.DISK if key[0] in stored else Home.FILE for key in self._num_bytes}
        self._slots = (1, 1)
        self._lay_out = partial(lay_out, records, host=host, commits=commits)
        self._records = records
        self._room = room
        self._host = host

    def placement(self) -> Placement:
        """The placement with the homes that were given, and the slots that were taken."""
        return self._lay_out(self._homes, self._slots)

    def with_all(self, home: Home) -> Placement:
        """The placement where all that has no home in memory lives in `home`."""
        return self._lay_out({**self._homes, **self._given(home, self._homes)}, self._slots)

    def left(self, placement: Placement, home: Home) -> int:
        """Bytes of the room that `placement` leaves of a memory."""
        return self._room[home] - placement.bytes_in(home)

    def pin(self, whole: frozenset[str], weights: frozenset[str], counts: tuple[int, int, int]) -> None:
        """Let all of the blocks in `whole`, the weights of those in `weights`, and groups of `counts` blocks stay."""
        order, with_weights = _spread_evenly(self._records), units(self._host)[0]
        keys = {(r.name, group) for group, count in zip(GROUPS, counts, strict=True) for r in order[:count]}
        for name, group in self._homes:
            if name in whole or (name in weights and group in with_weights):
                keys.add((name, group))
        self._homes |= self._given(Home.DEVICE, keys)

    def take_slots(self, pins: Pins) -> int:
        """Take as many slots as fit, and say how many bytes are left where blocks compute. Raises BudgetError."""
        for slots in _fewer_and_fewer(self._records, pins):
            self._slots = slots
            placement = self.placement()
            left = self.left(placement, Home.DEVICE)
            if left >= 0:
                return left
        computes_in = "device" if self._host is Home.HOST else "host"
        hint = f"give more memory with {computes_in}=, a smaller batch or shorter sequences"
        raise self.too_little(placement, Home.DEVICE, "the slots and buffers that streaming needs take", hint)

    def fill(self, home: Home, num_bytes: int, idle: frozenset[str] = frozenset()) -> int:
        """Give homes in `num_bytes` of memory to what has none; say how many bytes are left.

        A device with memory of its own takes whole blocks, all other memory single groups, and none of blocks in `idle`.
        """
        if num_bytes <= 0:
            return num_bytes
        units: list[tuple[Key, ...]]
        if home is Home.DEVICE and self._host is Home.HOST:
            units = [tuple((r.name, group) for group in GROUPS) for r in _spread_evenly(self._records)]
        else:
            order = _spread_evenly([record for record in self._records if record.name not in idle])
            units = [((record.name, group),) for group in GROUPS for record in order]
        for unit in units:
            given = self._given(home, unit)
            cost = sum(self._num_bytes[key] for key in given)
            if cost <= num_bytes:
                self._homes |= given
                num_bytes -= cost
        return num_bytes

    def beside_device(self, home: Home | None, has_disk: bool) -> Placement:
        """The placement in which the host's memory holds what does not stay on the device, as far as `home` lets it.

        Raises BudgetError where that memory does not suffice.
        """
        placement, hosted = self.placement(), self.with_all(Home.HOST)
        if home is Home.HOST or not has_disk or (home is None and self.left(hosted, Home.HOST) >= 0):
            placement = hosted
        elif home is None:
            self.fill(Home.HOST, self._room[Home.HOST] - placement.passage_bytes)
            placement = self.placement()
        if self.left(placement, Home.HOST) < 0:
            more = "" if has_disk else 'give a folder on an SSD with disk="...", or '
            hint = f"{more}give more memory with host="
            raise self.too_little(placement, Home.HOST, "what does not stay on the device takes", hint)
        return placement

    def too_little(self, placement: Placement, home: Home, what: str, hint: str) -> BudgetError:
        """The error if `placement` takes more of a memory than there is room for."""
        memory = "host" if home is self._host else str(home)
        taken, room = format_bytes(placement.bytes_in(home)), format_bytes(self._room[home])
        return BudgetError(f"{what} {taken} of the {memory}'s memory, the budget leaves {room}", hint=hint)

    def _given(self, home: Home, keys: Iterable[Key]) -> dict[Key, Home]:
        """A home for those of `keys` that take memory and have none there yet."""
        return {key: home for key in keys if self._num_bytes[key] and self._homes[key] not in IN_MEMORY}


def lay_out(
    records: Sequence[Record],
    homes: Mapping[Key, Home],
    slots: tuple[int, int],
    host: Home = Home.DEVICE,
    commits: bool = False,
) -> Placement:
    """Lay out the slots and buffers that `homes` needs, with at most `slots` weight and gradient slots per class.

    A path of two legs needs bounce buffers, and staging buffers for weights that come from a checkpoint. An update needs
    chunk buffers for what comes from the disk; where weights pass the drive alone, it changes them in their slot.
    """
    paths = {home: legs(home, Home.DEVICE, host) for home in Home}
    is_far = len(paths[Home.DISK]) > 1
    is_bounced = commits and is_far and Home.DEVICE in homes.values()
    in_memory = dict.fromkeys(Home, 0)
    chunk_bytes = staged_bytes = disk_bytes = 0
    sizes: dict[Group, dict[str, int]] = {Group.WEIGHT: {}, Group.GRADIENT: {}}
    for record in records:
        num_bytes, own = record.group_bytes, [homes[record.name, group] for group in GROUPS]
        for group, home in zip(GROUPS, own, strict=True):
            in_memory[home] += num_bytes[group]
        for group, home in zip(sizes, own, strict=False):
            is_bounced |= num_bytes[group] > 0 and len(paths[home]) > 1
            sizes[group][record.name] = slot_bytes(record, group, home)
        if num_bytes[Group.WEIGHT] and len(paths[own[0]]) > 1:
            staged_bytes = max(staged_bytes, sizes[Group.WEIGHT][record.name])
        if any(home is Home.DISK and num_bytes[group] for group, home in zip(GROUPS, own, strict=True)):
            disk_bytes += record.num_bytes
        if record.num_trainable and record.state:
            streams = [DRIVE in paths[home] for home in own]
            streams[0] &= is_far
            chunk_bytes = max(chunk_bytes, sum(compress(record.chunk_bytes, streams)))
    weight_slots, gradient_slots = slots
    return Placement(
        homes=dict(homes),
        slots={
            Group.WEIGHT: _classes(sizes[Group.WEIGHT], weight_slots),
            Group.GRADIENT: _classes(sizes[Group.GRADIENT], gradient_slots),
        },
        host=host,
        chunks=_buffers(CHUNK_BUFFERS, chunk_bytes),
        bounce=_buffers(BOUNCE_BUFFERS, is_bounced * CHUNK * GRADIENT_SUM_BYTES),
        staging=_buffers(STAGING_BUFFERS, staged_bytes),
        resident_bytes=in_memory[Home.DEVICE],
        hosted_bytes=in_memory[Home.HOST],
        disk_bytes=disk_bytes,
    )


def _buffers(count: int, each_bytes: int) -> Buffers:
    return Buffers(count, each_bytes) if each_bytes else Buffers()


def with_pieces(
    placement: Placement, records: Sequence[Record], num_bytes: int, idle: frozenset[str] = frozenset()
) -> Placement:
    """`placement` with entries of streamed blocks in `num_bytes` more memory, the largest of a block first.

    A block is large beside a small budget: what is left where no whole one fits would stay unused. Where something trains
    nothing changes: an update would have to write such an entry twice. Neither does it where blocks compute beyond a link.
    """
    chosen: dict[tuple[str, int], int] = {}
    streamed = [
        r for r in records if r.name not in idle and placement.home(r.name, Group.WEIGHT) is not Home.DEVICE
    ]
    stays_as_it_is = is_stored(records) or placement.legs(placement.host)
    for record in () if stays_as_it_is else _spread_evenly(streamed):
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
    weight_slots, gradient_slots = _wanted_slots(pins, is_stored(records))
    while True:
        yield weight_slots, gradient_slots
        if weight_slots > 1 and pins.weight_slots is None and weight_slots >= gradient_slots:
            weight_slots -= 1
        elif gradient_slots > 1 and pins.gradient_slots is None:
            gradient_slots -= 1
        else:
            return


def evicted(placement: Placement, record: Record) -> Placement:
    """`placement`, with a block that stays on the device in the host's memory instead.

    It passes through slots that are there and large enough, or through one of its own. Nothing is kept for a backward any
    more, and so nothing has to stay for it.
    """
    keys = [key for key in placement.at(Home.DEVICE) if key[0] == record.name]
    num_bytes = sum(record.group_bytes[group] for _, group in keys)
    slots = {
        group: _with_block(classes, record.name, slot_bytes(record, group, Home.HOST))
        for group, classes in placement.slots.items()
    }
    return replace(
        placement,
        homes={**placement.homes, **dict.fromkeys(keys, Home.HOST)},
        slots=slots,
        resident_bytes=placement.resident_bytes - num_bytes,
        hosted_bytes=placement.hosted_bytes + num_bytes,
        kept=frozenset(),
    )


def _with_block(classes: tuple[SlotClass, ...], block: str, num_bytes: int) -> tuple[SlotClass, ...]:
    """`classes`, the smallest that is large enough with `block` in it, or with one more; unless it has or needs no slot."""
    if not num_bytes or any(block in each.blocks for each in classes):
        return classes
    fitting = [index for index, group in enumerate(classes) if group.slot_bytes >= num_bytes]
    if not fitting:
        return (*classes, SlotClass(num_bytes, 1, frozenset((block,))))
    chosen = min(fitting, key=lambda index: classes[index].slot_bytes)
    joined = replace(classes[chosen], blocks=classes[chosen].blocks | {block})
    return (*classes[:chosen], joined, *classes[chosen + 1 :])


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


def slot_bytes(record: Record, group: Group, home: Home) -> int:
    """Bytes of a slot for the weights of `record`, or for the fp32 sum of its gradient; 0 where that needs none.

    A narrower stored gradient is read to the end of the slot and widened in place, front to back; the extra page
    keeps what is written from overtaking what is read, whatever the rounding to pages.
    """
    if group is Group.WEIGHT:
        return 0 if home is Home.DEVICE else align(record.num_elements * record.element_bytes[Plane.WEIGHT])
    if not record.num_trainable or sums_in_place(record, home is Home.DEVICE):
        return 0
    is_narrow = record.element_bytes[Plane.GRADIENT] < GRADIENT_SUM_BYTES
    return align(record.num_trainable * GRADIENT_SUM_BYTES) + (ALIGNMENT if is_narrow else 0)


def sums_in_place(record: Record, gradient_is_resident: bool) -> bool:
    """Whether backward can add straight into the resident gradient plane: it is fp32 already."""
    return gradient_is_resident and record.element_bytes[Plane.GRADIENT] == GRADIENT_SUM_BYTES


def _classes(sizes: dict[str, int], count: int) -> tuple[SlotClass, ...]:
    """Group blocks that need a slot so that none is more than twice as large as a block that uses it."""
    classes: list[SlotClass] = []
    names = sorted(filter(sizes.get, sizes), key=lambda name: (-sizes[name], name))
    while names:
        largest = sizes[names[0]]
        members = [name for name in names if 2 * sizes[name] > largest]
        names = names[len(members) :]
        classes.append(SlotClass(largest, min(count, len(members)), frozenset(members)))
    return tuple(classes)
