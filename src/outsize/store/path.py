"""Carriers: how a plane gets from its home to where blocks compute, and back.

`DirectCarrier` serves where the device is the host: the disk reads straight into a slot. `StagedCarrier` serves a device
with memory of its own: a plane whose home is the host is one copy; one whose home is the disk passes, chunk by chunk,
through pinned buffers, the disk and the link both busy. Both answer with transfers, which nobody has to wait for before
the bytes are needed; order between them is kept by `after`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from outsize.block import Extent
from outsize.tier import Device, Region, Slot, Tier, Transfer, Way, follow_all, wait_all, wait_over


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `[start, stop)` of a parcel, and where they are on the disk; at most what a relay's buffer holds."""

    start: int
    stop: int
    extent: Extent


@dataclass(eq=False)
class Parcel:
    """A plane of a record on its way, or an input of a block; `label` names it in the plan's words.

    `home` is its memory in the host, where it has any; otherwise it is on the disk, in `parts`. `place` is where it is
    computed with, `[num_elements]`: the first `place.nbytes` bytes from `byte_offset` of `slot`, or new memory.
    """

    label: str
    parts: tuple[Part, ...]
    home: torch.Tensor | None
    slot: Slot | None
    place: torch.Tensor
    byte_offset: int = 0


class Job:
    """A task of a worker thread, as a transfer."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Wait, and raise what the task raised."""
        self._future.result()

    def follow(self) -> None:
        """As `wait`."""
        self._future.result()

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._future.done()


class Carrier(ABC):
    """Moves planes; every transfer can be waited for and, by computing, followed."""

    @abstractmethod
    def fill(self, parcel: Parcel, ready: Sequence[Transfer] = ()) -> list[Transfer]:
        """Start bringing a plane from its home, which holds it once `ready` is over, into its place.

        On a `DirectCarrier` one transfer per chunk.
        """

    @abstractmethod
    def drain(self, parcel: Parcel) -> list[Transfer]:
        """Start sending a plane from its place to its home; over when it is there, and its slot's `after` is set."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until every transfer is on its way to its last leg: what remains is the disk's and the device's."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was started."""


class DirectCarrier(Carrier):
    """Between the disk and slots in the host's memory, which are the device's."""

    def __init__(self, disk: Tier | None) -> None:
        self._disk = disk

    def fill(self, parcel: Parcel, ready: Sequence[Transfer] = ()) -> list[Transfer]:
        """Read into the slot."""
        for transfer in ready:
            transfer.wait()
        return self._chunks(parcel, write=False)

    def drain(self, parcel: Parcel) -> list[Transfer]:
        """Write from the slot, which is used until then."""
        transfers = self._chunks(parcel, write=True)
        assert parcel.slot is not None
        parcel.slot.after = tuple(transfers)
        return transfers

    def finish(self) -> None:
        """Nothing to do: transfers are the disk's."""

    def close(self) -> None:
        """Nothing to do: transfers are the disk's."""

    def _chunks(self, parcel: Parcel, *, write: bool) -> list[Transfer]:
        assert self._disk is not None and parcel.slot is not None, f"{parcel.label} has no home on disk"
        start = self._disk.start_write if write else self._disk.start_read
        transfers = []
        for index, part in enumerate(parcel.parts):
            offset = parcel.byte_offset + part.extent.offset - parcel.parts[0].extent.offset
            buffer = parcel.slot.buffer[offset : offset + part.extent.num_bytes]
            transfers.append(start(part.extent.offset, buffer, f"{parcel.label}[{index}]"))
        return transfers


class StagedCarrier(Carrier):
    """Between the host's memory, or the disk by way of it, and a device, or memory of the host that the disk cannot reach.

    `buffers` are pinned, at least two for each way, each of the largest part.
    """

    def __init__(self, device: Device, disk: Tier | None, buffers: Sequence[Region]) -> None:
        self._device = device
        half = len(buffers) // 2
        self._relays = (
            {
                Way.UP: _Relay(device, disk, Way.UP, buffers[:half]),
                Way.DOWN: _Relay(device, disk, Way.DOWN, buffers[half:]),
            }
            if disk is not None and buffers
            else {}
        )

    def fill(self, parcel: Parcel, ready: Sequence[Transfer] = ()) -> list[Transfer]:
        """One copy, or a relay from the disk; neither before the slot's last use is over.

        New memory may have been given back by what is still to be computed.
        """
        after = parcel.slot.after if parcel.slot is not None else (self._device.mark(),)
        if parcel.home is not None:
            return [
                self._device.start_copy(
                    Way.UP, parcel.place, parcel.home, after=(*ready, *after), label=parcel.label
                )
            ]
        return [self._relays[Way.UP].start(parcel, after, ready)]

    def drain(self, parcel: Parcel) -> list[Transfer]:
        """One copy, or a relay to the disk, of what was computed so far."""
        after = (self._device.mark(),)
        if parcel.home is not None:
            copy = self._device.start_copy(
                Way.DOWN, parcel.home, parcel.place, after=after, label=parcel.label
            )
            left: Transfer = copy
        else:
            relayed = self._relays[Way.DOWN].start(parcel, after)
            copy, left = relayed, relayed.left
        if parcel.slot is not None:
            parcel.slot.after = (left,)
        return [copy]

    def finish(self) -> None:
        """Wait until the relays' threads are idle."""
        for relay in self._relays.values():
            relay.finish()

    def close(self) -> None:
        """End the relays' threads."""
        for relay in self._relays.values():
            relay.close()


@dataclass(eq=False)
class _Legs:
    """Transfers that a thread starts later; each can be waited for once all are started."""

    transfers: list[Transfer] = field(default_factory=list)
    error: BaseException | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait for all; raise what went wrong."""
        self._all_started()
        wait_all(self.transfers)

    def follow(self) -> None:
        """Block until all are started, then let computing come after them."""
        self._all_started()
        follow_all(self.transfers)

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self.started.is_set() and all(transfer.is_done() for transfer in self.transfers)

    def _all_started(self) -> None:
        self.started.wait()
        if self.error is not None:
            wait_over(self.transfers)  # those that were started before
            raise self.error


@dataclass(eq=False)
class _Relayed(_Legs):
    """A relay: over when its last leg is; `left` when the bytes have left where they were."""

    left: _Legs = field(default_factory=_Legs)

    def finish(self, error: BaseException | None) -> None:
        """All legs are started, or none will be."""
        self.error = self.left.error = error
        self.left.started.set()
        self.started.set()


class _Relay:
    """A thread that moves planes one way, chunk by chunk, each over two legs with a buffer between them."""

    def __init__(self, device: Device, disk: Tier | None, way: Way, buffers: Sequence[Region]) -> None:
        self._device = device
        self._disk = disk
        self._way = way
        self._buffers: deque[tuple[Region, Transfer | None]] = deque((buffer, None) for buffer in buffers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"outsize-relay-{way}")

    def start(self, parcel: Parcel, after: Sequence[Transfer], ready: Sequence[Transfer] = ()) -> _Relayed:
        """Move a plane; the leg on the device's side comes after `after`, everything after `ready`."""
        relayed = _Relayed()
        self._thread.submit(self._run, parcel, tuple(after), tuple(ready), relayed)
        return relayed

    def finish(self) -> None:
        """Wait until what was started has started its last leg."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what was started."""
        self._thread.shutdown()

    def _run(
        self,
        parcel: Parcel,
        after: tuple[Transfer, ...],
        ready: tuple[Transfer, ...],
        relayed: _Relayed,
    ) -> None:
        error: BaseException | None = None
        under_way: deque[tuple[Region, int, Transfer]] = deque()
        try:
            for transfer in ready:
                transfer.wait()
            for index in range(len(parcel.parts)):
                if not self._buffers:
                    self._second_leg(parcel, after, relayed, *under_way.popleft())
                buffer, busy = self._buffers.popleft()
                try:
                    if busy is not None:
                        wait_over([busy])  # its own parcel raises what went wrong
                    first = self._first_leg(parcel, after, buffer, index)
                except BaseException:
                    self._buffers.append((buffer, None))
                    raise
                relayed.left.transfers.append(first)
                under_way.append((buffer, index, first))
            while under_way:
                self._second_leg(parcel, after, relayed, *under_way.popleft())
        except BaseException as failure:
            error = failure
        for buffer, _, first in under_way:
            self._buffers.append((buffer, first))
        relayed.finish(error)

    def _first_leg(self, parcel: Parcel, after: tuple[Transfer, ...], buffer: Region, index: int) -> Transfer:
        if self._way is Way.DOWN:
            source, target = self._both(parcel, buffer, index)
            return self._device.start_copy(
                Way.DOWN, target, source, after=after, label=f"{parcel.label}[{index}]"
            )
        return self._disk_leg(parcel, buffer, index)

    def _second_leg(
        self,
        parcel: Parcel,
        after: tuple[Transfer, ...],
        relayed: _Relayed,
        buffer: Region,
        index: int,
        first: Transfer,
    ) -> None:
        busy: Transfer | None = None  # after an error too the first leg is over
        try:
            first.wait()
            if self._way is Way.DOWN:
                busy = self._disk_leg(parcel, buffer, index)
            else:
                target, source = self._both(parcel, buffer, index)
                label = f"{parcel.label}[{index}]"
                busy = self._device.start_copy(Way.UP, target, source, after=after, label=label)
            relayed.transfers.append(busy)
        finally:
            self._buffers.append((buffer, busy))

    @staticmethod
    def _both(parcel: Parcel, buffer: Region, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A part where it is computed with, and in the buffer."""
        part = parcel.place[parcel.parts[index].start : parcel.parts[index].stop]
        return part, buffer.tensor(part.dtype, part.numel())

    def _disk_leg(self, parcel: Parcel, buffer: Region, index: int) -> Transfer:
        assert self._disk is not None, f"{parcel.label} has no home"
        extent = parcel.parts[index].extent
        start = self._disk.start_write if self._way is Way.DOWN else self._disk.start_read
        return start(extent.offset, buffer.buffer[: extent.num_bytes], f"{parcel.label}[{index}]")


class Staging:
    """Whole planes of host memory for weights that come from a checkpoint and have no home in memory."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)
        self._idle: SimpleQueue[tuple[Region, Sequence[Transfer]]]
        self.reset()

    def reset(self) -> None:
        """Take all regions back; nothing may use one."""
        self._idle = SimpleQueue()
        for region in self._regions:
            self._idle.put((region, ()))

    def take(self) -> Region:
        """A region that nothing reads any more; blocks until there is one."""
        region, transfers = self._idle.get()
        wait_over(transfers)  # what needed those bytes raises what went wrong
        return region

    def give(self, region: Region, after: Sequence[Transfer]) -> None:
        """Take a region back that is used until `after` is done."""
        self._idle.put((region, after))
