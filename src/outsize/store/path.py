"""How a tensor gets from its home to where blocks compute, and back, along the legs of `outsize.plan.path`.

Over the drive alone the disk reads straight into a slot; over the link alone one copy is made. Over both the bytes pass,
chunk by chunk, through pinned bounce buffers, which keeps the disk and the link busy at once. All return transfers, which
need not be waited for before the bytes are needed; `after` keeps them in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from outsize.block import Extent
from outsize.plan.path import DRIVE, Leg
from outsize.tier import Device, Region, Slot, Tier, Transfer, Way, follow_all, wait_all, wait_over


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements `[start, stop)` of a tensor and where they are on disk; `label` names them, as in `L07.weight[3]`."""

    start: int
    stop: int
    extent: Extent
    label: str

    def start_read(self, disk: Tier | None, buffer: memoryview) -> Transfer:
        """Start reading the chunk into the first bytes of `buffer`."""
        assert disk is not None, f"{self.label} has no home on disk"
        return disk.start_read(self.extent.offset, buffer[: self.extent.num_bytes], self.label)

    def start_write(self, disk: Tier | None, buffer: memoryview) -> Transfer:
        """Start writing the chunk from the first bytes of `buffer`."""
        assert disk is not None, f"{self.label} has no home on disk"
        return disk.start_write(self.extent.offset, buffer[: self.extent.num_bytes], self.label)


@dataclass(eq=False)
class Route:
    """The two ends of a move, and the legs between them: the home of a plane, or of a block's input, and its place.

    `place` is where it is computed with, `[num_elements]`: the first `place.nbytes` bytes from `byte_offset` of `slot`, or
    memory of its own. `home` is its home in host memory; None where that is on disk, in `chunks`, each of which fits into a
    bounce buffer. `buffer` are the bytes that `place` is in, where the disk reads and writes them there.
    """

    label: str
    legs: tuple[Leg, ...]
    chunks: tuple[Chunk, ...]
    place: torch.Tensor
    home: torch.Tensor | None = None
    slot: Slot | None = None
    buffer: memoryview | None = None
    byte_offset: int = 0

    def buffers(self) -> Iterator[tuple[Chunk, memoryview]]:
        """Each chunk, with the bytes of `buffer` that begin with its own."""
        assert self.buffer is not None, self.label
        for chunk in self.chunks:
            yield chunk, self.buffer[self.byte_offset + chunk.start * self.place.itemsize :]


class Path:
    """Moves tensors between their homes and where blocks compute.

    `buffers` are pinned, each as large as the largest chunk, at least two for each way; a path over both legs needs them.
    """

    def __init__(self, device: Device, disk: Tier | None, buffers: Sequence[Region]) -> None:
        self._device = device
        self._disk = disk
        half = len(buffers) // 2
        self._bouncers = (
            {
                Way.UP: _Bouncer(device, disk, Way.UP, buffers[:half]),
                Way.DOWN: _Bouncer(device, disk, Way.DOWN, buffers[half:]),
            }
            if disk is not None and buffers
            else {}
        )

    def fill(self, route: Route, ready: Sequence[Transfer] = ()) -> list[Transfer]:
        """Start moving a tensor to its place; its home holds it once `ready` is over.

        Over the drive alone this waits for `ready`, and returns one transfer per chunk. Over the link it comes after the
        last use of the slot; without a slot the place was just allocated, and what was computed before may still use it.
        """
        if route.legs == (DRIVE,):
            for transfer in ready:
                transfer.wait()
            return [chunk.start_read(self._disk, buffer) for chunk, buffer in route.buffers()]
        after = route.slot.after if route.slot is not None else (self._device.mark(),)
        if route.home is None:
            return [self._bouncers[Way.UP].start(route, after, ready)]
        copied_after = (*ready, *after)
        return [
            self._device.start_copy(Way.UP, route.place, route.home, after=copied_after, label=route.label)
        ]

    def drain(self, route: Route) -> list[Transfer]:
        """Start moving what was computed so far to its home; `after` of its slot says until when that is in use."""
        left: Sequence[Transfer]
        after = (self._device.mark(),)
        if route.legs == (DRIVE,):
            moved = left = [chunk.start_write(self._disk, buffer) for chunk, buffer in route.buffers()]
        elif route.home is None:
            bounced = self._bouncers[Way.DOWN].start(route, after)
            moved, left = [bounced], [bounced.left]
        else:
            copy = self._device.start_copy(Way.DOWN, route.home, route.place, after=after, label=route.label)
            moved = left = [copy]
        if route.slot is not None:
            route.slot.after = tuple(left)
        return moved

    def finish(self) -> None:
        """Wait until the last leg of every move has started: only the disk and the device may still be busy."""
        for bouncer in self._bouncers.values():
            bouncer.finish()

    def close(self) -> None:
        """Finish what was started, and end the threads that fill and empty bounce buffers."""
        for bouncer in self._bouncers.values():
            bouncer.close()


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
class _Bounced(_Legs):
    """A move through bounce buffers: over when its last leg is; `left` when the bytes have left where they were."""

    left: _Legs = field(default_factory=_Legs)

    def finish(self, error: BaseException | None) -> None:
        """All legs are started, or none will be."""
        self.error = self.left.error = error
        self.left.started.set()
        self.started.set()


class _Bouncer:
    """A thread that moves tensors one way, chunk by chunk, each over two legs with a bounce buffer between them."""

    def __init__(self, device: Device, disk: Tier | None, way: Way, buffers: Sequence[Region]) -> None:
        self._device = device
        self._disk = disk
        self._way = way
        self._buffers: deque[tuple[Region, Transfer | None]] = deque((buffer, None) for buffer in buffers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"outsize-bounce-{way}")

    def start(self, route: Route, after: Sequence[Transfer], ready: Sequence[Transfer] = ()) -> _Bounced:
        """Move a tensor; the leg on the device's side comes after `after`, everything after `ready`."""
        bounced = _Bounced()
        self._thread.submit(self._run, route, tuple(after), tuple(ready), bounced)
        return bounced

    def finish(self) -> None:
        """Wait until what was started has started its last leg."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what was started."""
        self._thread.shutdown()

    def _run(
        self, route: Route, after: tuple[Transfer, ...], ready: tuple[Transfer, ...], bounced: _Bounced
    ) -> None:
        error: BaseException | None = None
        under_way: deque[tuple[Region, Chunk, Transfer]] = deque()
        try:
            for transfer in ready:
                transfer.wait()
            for chunk in route.chunks:
                if not self._buffers:
                    self._second_leg(route, after, bounced, *under_way.popleft())
                buffer, busy = self._buffers.popleft()
                try:
                    if busy is not None:
                        wait_over([busy])  # its own move raises what went wrong
                    first = self._first_leg(route, after, buffer, chunk)
                except BaseException:
                    self._buffers.append((buffer, None))
                    raise
                bounced.left.transfers.append(first)
                under_way.append((buffer, chunk, first))
            while under_way:
                self._second_leg(route, after, bounced, *under_way.popleft())
        except BaseException as failure:
            error = failure
        for buffer, _, first in under_way:
            self._buffers.append((buffer, first))
        bounced.finish(error)

    def _first_leg(self, route: Route, after: tuple[Transfer, ...], buffer: Region, chunk: Chunk) -> Transfer:
        if self._way is Way.DOWN:
            return self._device_leg(route, after, buffer, chunk)
        return chunk.start_read(self._disk, buffer.buffer)

    def _second_leg(
        self,
        route: Route,
        after: tuple[Transfer, ...],
        bounced: _Bounced,
        buffer: Region,
        chunk: Chunk,
        first: Transfer,
    ) -> None:
        busy: Transfer | None = None  # after an error too the first leg is over
        try:
            first.wait()
            if self._way is Way.DOWN:
                busy = chunk.start_write(self._disk, buffer.buffer)
            else:
                busy = self._device_leg(route, after, buffer, chunk)
            bounced.transfers.append(busy)
        finally:
            self._buffers.append((buffer, busy))

    def _device_leg(
        self, route: Route, after: tuple[Transfer, ...], buffer: Region, chunk: Chunk
    ) -> Transfer:
        """Copy a chunk between where it is computed with and the buffer."""
        place = route.place[chunk.start : chunk.stop]
        bounce = buffer.tensor(place.dtype, place.numel())
        target, source = (place, bounce) if self._way is Way.UP else (bounce, place)
        return self._device.start_copy(self._way, target, source, after=after, label=chunk.label)


class Staging:
    """Buffers in host memory for whole weight planes on their way from the source to a device."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)
        self._idle: SimpleQueue[tuple[Region, Sequence[Transfer]]]
        self.reset()

    def reset(self) -> None:
        """Take all buffers back; none may be in use."""
        self._idle = SimpleQueue()
        for region in self._regions:
            self._idle.put((region, ()))

    def take(self) -> Region:
        """A buffer that is no longer in use; blocks until there is one."""
        region, transfers = self._idle.get()
        wait_over(transfers)  # what needed those bytes raises what went wrong
        return region

    def give(self, region: Region, after: Sequence[Transfer]) -> None:
        """Take back a buffer that is in use until `after` is over."""
        self._idle.put((region, after))
