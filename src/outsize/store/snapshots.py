"""The commits of a store of blocks, one on its way at a time: what each block adds to it, and when.

A block is taken down when its pending update is applied, by the thread that computes. What of it is on disk is noted
where it lies; what lives in memory is copied first, by one thread, a chunk at a time, so that reads come first, and before
the block's next update, which waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outsize.block import Extent, Plane
from outsize.errors import StorageError
from outsize.store.path import Carrier, Job, Parcel, Part
from outsize.store.updates import UpdateJob
from outsize.tier import Region, Stored, Transfer, VersionedTier, wait_all

if TYPE_CHECKING:
    from outsize.store.blocks import BlockStore
    from outsize.store.state import BlockState


@dataclass(frozen=True, slots=True)
class SnapshotBlock:
    """A block as a commit has it: its cells, by offsets from the record's own; none where it was never stored."""

    name: str
    base: int
    cells: tuple[Stored, ...]
    is_stored: bool


class Snapshot:
    """One commit on its way. `waiting` are blocks whose update is not applied yet.

    `complete` is called once, by the thread that captured the last block; `wait` then waits for what is being written.
    """

    def __init__(self, blocks: Iterable[str], complete: Callable[[Snapshot], None]) -> None:
        self.waiting = set(blocks)
        self.has_begun = False
        """Whether the store knows that this commit waits for no further update."""
        self.blocks: dict[str, SnapshotBlock] = {}
        self._missing = set(self.waiting)
        self._complete = complete
        self._transfers: list[Transfer] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def add(self, block: SnapshotBlock, transfers: Iterable[Transfer] = ()) -> None:
        """`block` is captured; it is there when `transfers` are over."""
        with self._lock:
            self.blocks[block.name] = block
            self._transfers += transfers
        self._settle(block.name)

    def fail(self, block: str, error: BaseException) -> None:
        """`block` could not be captured."""
        with self._lock:
            self._error = self._error or error
        self._settle(block)

    def interrupted(self) -> tuple[str, ...]:
        """Blocks that were taken down and never arrived here; to be asked while nothing is being copied."""
        with self._lock:
            return tuple(sorted(self._missing - self.waiting))

    def wait(self) -> None:
        """Wait for what is being written. Raises the first error that any block met."""
        transfers, self._transfers = self._transfers, []
        wait_all(transfers)
        if self._error is not None:
            raise self._error

    def _settle(self, block: str) -> None:
        with self._lock:
            self._missing.discard(block)
            is_last = not self._missing
        if is_last:
            self._complete(self)


class Snapshots:
    """Takes the blocks of `store` down, whose disk is `versions`; `thread` copies what lives in memory."""

    def __init__(self, store: BlockStore, versions: VersionedTier, carrier: Carrier) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="outsize-copy")
        self._store = store
        self._versions = versions
        self._carrier = carrier
        self._capture: Snapshot | None = None

    def begin(self, complete: Callable[[Snapshot], None]) -> None:
        """From now on note each block once its pending update is applied, as it is then; `complete` follows the last.

        What an earlier capture waits for must have been applied (`Executor.settle_updates`).
        """
        assert not self.is_under_way, "a commit is being taken down"
        self._capture = capture = Snapshot(self._store.states, complete)
        for state in self._store:
            if state.pending is None:
                self._take_down(state, capture)

    @property
    def is_under_way(self) -> bool:
        """Whether a commit waits for pending updates."""
        return self._capture is not None and bool(self._capture.waiting)

    def applied(self, state: BlockState) -> None:
        """The weights of a block in memory are the updated ones."""
        if (capture := self._waits_for(state)) is not None:
            self._take_down(state, capture)

    def failed(self, state: BlockState, error: BaseException) -> None:
        """A block's update went wrong: so does the commit."""
        if (capture := self._waits_for(state)) is not None:
            self._is_taken(state, capture)
            capture.fail(state.name, error)

    def recover(self) -> None:
        """Let the commit under way fail where taking a block down was interrupted: it would never be complete."""
        self.finish()
        capture = self._capture
        if capture is None:
            return
        for name in capture.interrupted():
            capture.fail(name, StorageError(f"the commit was interrupted while it took down block {name}"))

    def settle(self) -> None:
        """Note blocks that no visit came to because an error was in between; what is wrong with them is the commit's."""
        for state in self._store:
            if state.pending is None:
                with suppress(Exception):
                    self.applied(state)

    def finish(self) -> None:
        """Wait until what is being copied is on disk; errors are the commit's."""
        self.thread.submit(lambda: None).result()

    def restore(self, blocks: Iterable[str]) -> None:
        """Take `blocks` from the disk, where an earlier process left them; planes that live in memory are read now."""
        transfers: list[Transfer] = []
        for name in blocks:
            state = self._store[name]
            state.is_stored = state.is_loaded = True
            state.copying_at = state.copied_at = state.num_steps
            for parcel in self._at_home(state):
                if parcel.home is None:
                    transfers += self._carrier.fill(parcel)
                for label, extent, buffer in self._host_parts(state, parcel):
                    transfers.append(self._versions.start_read(extent.offset, buffer, label))
        wait_all(transfers)

    # -- taking down ---------------------------------------------------------------------------------------------

    def _waits_for(self, state: BlockState) -> Snapshot | None:
        capture = self._capture
        return capture if capture is not None and state.name in capture.waiting else None

    def _take_down(self, state: BlockState, capture: Snapshot) -> None:
        """Note a block as it is now, or let it be copied and noted before its next update."""
        try:
            if state.update is not None:
                state.update.wait_applied()
            parcels = self._at_home(state) if state.is_stored else []
            drained: list[Transfer] = []
            is_new = bool(parcels) and state.copying_at != state.num_steps
            if is_new:
                for parcel in parcels:
                    for chunk in parcel.parts:
                        self._versions.claim(chunk.extent, parcel.label)
                    if parcel.home is None:
                        # A device's planes are copied in the order of computing, beginning here.
                        drained += self._carrier.drain(parcel)
        except Exception as error:
            self.failed(state, error)
            raise
        self._is_taken(state, capture)
        if not parcels:
            self._note(state, capture, state.update)
            return
        state.copying_at = state.num_steps
        copied = drained if is_new else None
        state.copy = Job(
            self.thread.submit(self._copy, state, capture, copied, state.num_steps, state.update)
        )

    def _is_taken(self, state: BlockState, capture: Snapshot) -> None:
        """Nothing that comes will change what the commit has of this block."""
        if capture.waiting <= {state.name} and not capture.has_begun:
            capture.has_begun = True
            self._versions.begin_commit()
        capture.waiting.discard(state.name)

    def _copy(
        self,
        state: BlockState,
        capture: Snapshot,
        drained: Sequence[Transfer] | None,
        version: int,
        job: UpdateJob | None,
    ) -> None:
        """Copy planes that live in memory to the disk, a chunk at a time, unless they are there; then note the block.

        What goes wrong is the commit's: training goes on.
        """
        try:
            if drained is not None:
                wait_all(drained)
                for parcel in self._at_home(state):
                    for label, extent, buffer in self._host_parts(state, parcel):
                        self._versions.start_write(extent.offset, buffer, label).wait()
                state.copied_at = version
            if state.copied_at != version:
                raise StorageError(f"{state.name} could not be copied to the disk for an earlier commit")
            self._note(state, capture, job)
        except BaseException as error:
            state.copying_at = None
            capture.fail(state.name, error)

    def _note(self, state: BlockState, capture: Snapshot, job: UpdateJob | None) -> None:
        cells: tuple[Stored, ...] = ()
        if state.is_stored:
            cells = self._versions.capture(Extent(state.disk_offset, state.record.kept_bytes))
        capture.add(
            SnapshotBlock(state.name, state.disk_offset, cells, state.is_stored),
            () if job is None else (job,),
        )

    # -- what lives in memory ------------------------------------------------------------------------------------

    def _at_home(self, state: BlockState) -> list[Parcel]:
        """Weights and state that live in memory, as they would be stored; `home` is None where that is a device's."""
        parcels = []
        record = state.record
        for plane in (Plane.WEIGHT, *record.state):
            in_host = self._store.host_plane(state, plane)
            place = in_host if in_host is not None else self._store.resident_plane(state, plane)
            if place is None or not place.numel():
                continue
            size = record.element_bytes[plane]
            parts = tuple(
                Part(
                    int(start * size) // place.itemsize,
                    int(stop * size) // place.itemsize,
                    Extent(state.disk_offset + extent.offset, extent.num_bytes),
                )
                for start, stop, extent in record.plane_parts(plane)
            )
            parcels.append(Parcel(f"{state.name}.{plane}", parts, in_host, None, place))
        return parcels

    @staticmethod
    def _host_parts(state: BlockState, parcel: Parcel) -> Iterator[tuple[str, Extent, memoryview]]:
        """`(label, place on disk, bytes)` of each chunk of a plane in the host's memory."""
        if parcel.home is None:
            return
        plane = Plane(parcel.label.rpartition(".")[2])
        region = state.hosted.get(plane) or state.resident[plane]
        assert isinstance(region, Region)
        for index, chunk in enumerate(parcel.parts):
            begin = chunk.start * parcel.place.itemsize
            yield (
                f"{parcel.label}[{index}]",
                chunk.extent,
                region.buffer[begin : begin + chunk.extent.num_bytes],
            )
