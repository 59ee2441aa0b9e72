"""Commits of the blocks while training goes on, one at a time.

A commit is declared between two steps, when updates are frozen that no block has applied yet. From then on plans add each
block once its update is applied (`plan/passes/commits.py`), on the thread that computes: planes on disk stay where they are
(`outsize.tier.versioned`); planes in memory are copied to the disk by a thread of its own, a chunk at a time, so that
reads come first, and before the next update of the block, which waits for it. When the last block is stored, the commit
can be made durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from outsize.errors import StorageError
from outsize.plan.path import LINK
from outsize.store.path import Path
from outsize.store.state import BlockState
from outsize.tier import Stored, TaskTransfer, Transfer, VersionedTier, wait_all


@dataclass(frozen=True, slots=True)
class SnapshotBlock:
    """A block as a commit has it: its cells, by offsets from the record's own; none where it was never stored."""

    name: str
    base: int
    cells: tuple[Stored, ...]
    is_stored: bool


class Snapshot:
    """One commit on its way. `waiting` are blocks whose update is not applied yet.

    `complete` is called once, by the thread that adds the last block; `wait` then waits for what is being written.
    """

    def __init__(self, blocks: Iterable[str], complete: Callable[[Snapshot], None]) -> None:
        self.waiting = set(blocks)
        self.has_begun = False
        """Whether the tier knows that this commit waits for no further update."""
        self.blocks: dict[str, SnapshotBlock] = {}
        self._missing = set(self.waiting)
        self._complete = complete
        self._transfers: list[Transfer] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def add(self, block: SnapshotBlock, transfers: Iterable[Transfer] = ()) -> None:
        """Add a block, which is stored when `transfers` are over."""
        with self._lock:
            self.blocks[block.name] = block
            self._transfers += transfers
        self._settle(block.name)

    def fail(self, block: str, error: BaseException) -> None:
        """Note that `block` could not be added."""
        with self._lock:
            self._error = self._error or error
        self._settle(block)

    def interrupted(self) -> tuple[str, ...]:
        """Blocks that are no longer waited for and were never added; to be called while nothing is being copied."""
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
    """Takes snapshots of blocks whose disk is `tier`; `thread` copies planes that are in memory."""

    def __init__(self, states: Mapping[str, BlockState], tier: VersionedTier, path: Path) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="outsize-copy")
        self._states = states
        self._tier = tier
        self._path = path
        self._snapshot: Snapshot | None = None

    def begin(self, complete: Callable[[Snapshot], None]) -> None:
        """From now on add each block once its pending update is applied, as it is then; `complete` follows the last.

        What an earlier snapshot waits for must have been applied (`Executor.settle_updates`).
        """
        assert not self.waiting, "a commit is being taken"
        self._snapshot = snapshot = Snapshot(self._states, complete)
        for state in self._states.values():
            if state.update.pending is None:
                self._take(state, snapshot)

    @property
    def waiting(self) -> frozenset[str]:
        """Blocks whose pending updates a commit waits for."""
        return frozenset() if self._snapshot is None else frozenset(self._snapshot.waiting)

    def take(self, state: BlockState) -> None:
        """Take a snapshot of a block whose weights in memory are the updated ones, if a commit waits for it."""
        if (snapshot := self._waits_for(state)) is not None:
            self._take(state, snapshot)

    def failed(self, state: BlockState, error: BaseException) -> None:
        """Let the commit fail that waits for a block whose update failed."""
        if (snapshot := self._waits_for(state)) is not None:
            self._is_taken(state, snapshot)
            snapshot.fail(state.name, error)

    def recover(self) -> None:
        """Let the commit under way fail where taking a block was interrupted: it would never be complete."""
        self.finish()
        snapshot = self._snapshot
        if snapshot is None:
            return
        for name in snapshot.interrupted():
            snapshot.fail(name, StorageError(f"the commit was interrupted while it took down block {name}"))

    def settle(self) -> None:
        """Take blocks that no visit reached because an error was in between; what is wrong with them is the commit's."""
        for state in self._states.values():
            if state.update.pending is None:
                with suppress(Exception):
                    self.take(state)

    def finish(self) -> None:
        """Wait until what is being copied is on disk; errors are the commit's."""
        self.thread.submit(lambda: None).result()

    def restore(self, states: Iterable[BlockState]) -> None:
        """Read planes of blocks whose home is memory from the disk, where an earlier process left them."""
        transfers: list[Transfer] = []
        for state in states:
            state.snapshot.copying_at = state.snapshot.copied_at = state.update.num_steps
            for route in state.planes.routes_from_memory():
                transfers += self._path.fill(route)
        wait_all(transfers)

    # -- taking a block ------------------------------------------------------------------------------------------

    def _waits_for(self, state: BlockState) -> Snapshot | None:
        snapshot = self._snapshot
        return snapshot if snapshot is not None and state.name in snapshot.waiting else None

    def _take(self, state: BlockState, snapshot: Snapshot) -> None:
        """Add a block as it is now, or let it be copied and added before its next update."""
        num_steps = state.update.num_steps
        try:
            if state.update.job is not None:
                state.update.job.wait_applied()
            routes = state.planes.routes_from_memory() if state.update.is_stored else []
            is_new = bool(routes) and state.snapshot.copying_at != num_steps
            drained: list[Transfer] = []
            for route in routes if is_new else []:
                for chunk in route.chunks:
                    self._tier.claim(chunk.extent, route.label)
                if LINK in route.legs:
                    # A device's planes are copied in the order of computing, beginning here.
                    drained += self._path.drain(route)
        except Exception as error:
            self.failed(state, error)
            raise
        self._is_taken(state, snapshot)
        transfers = () if state.update.job is None else (state.update.job,)
        if not routes:
            self._add(state, snapshot, transfers)
            return
        state.snapshot.copying_at = num_steps
        copied = drained if is_new else None
        task = self.thread.submit(self._copy, state, snapshot, copied, num_steps, transfers)
        state.snapshot.copy = TaskTransfer(task)

    def _is_taken(self, state: BlockState, snapshot: Snapshot) -> None:
        """Note that nothing from here on changes what the commit has of this block."""
        if snapshot.waiting <= {state.name} and not snapshot.has_begun:
            snapshot.has_begun = True
            self._tier.begin_commit()
        snapshot.waiting.discard(state.name)

    def _copy(
        self,
        state: BlockState,
        snapshot: Snapshot,
        drained: Sequence[Transfer] | None,
        num_steps: int,
        transfers: Sequence[Transfer],
    ) -> None:
        """Copy planes in memory to the disk, a chunk at a time, unless they are there; then add the block.

        What goes wrong is the commit's: training goes on.
        """
        try:
            if drained is not None:
                wait_all(drained)
                for route in state.planes.routes_from_memory():
                    for chunk, buffer in route.buffers() if LINK not in route.legs else ():
                        chunk.start_write(self._tier, buffer).wait()
                state.snapshot.copied_at = num_steps
            if state.snapshot.copied_at != num_steps:
                raise StorageError(f"{state.name} could not be copied to the disk for an earlier commit")
            self._add(state, snapshot, transfers)
        except BaseException as error:
            state.snapshot.copying_at = None
            snapshot.fail(state.name, error)

    def _add(self, state: BlockState, snapshot: Snapshot, transfers: Sequence[Transfer]) -> None:
        planes, is_stored = state.planes, state.update.is_stored
        cells = self._tier.capture(planes.kept_extent) if is_stored else ()
        snapshot.add(SnapshotBlock(planes.name, planes.disk_offset, cells, is_stored), transfers)
