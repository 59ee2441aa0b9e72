"""Taking a commit down while training goes on.

A commit is declared between two steps, when updates are frozen that no block has applied yet. From then on each block
is captured as soon as its update is applied: what is on disk stays where it is (`outsize.tier.versioned`), what lives in
memory is copied to the disk, by a thread of its own and a chunk at a time, before the block's next update. When the last
block is captured and written, the commit can be made durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from outsize.tier import Stored, Transfer, wait_all


@dataclass(frozen=True, slots=True)
class CapturedBlock:
    """A block as a commit has it: its cells, by offsets from the record's own; none where it was never stored."""

    name: str
    base: int
    cells: tuple[Stored, ...]
    is_stored: bool


class Capture:
    """One commit on its way. `waiting` are blocks whose update is not applied yet.

    `complete` is called once, by the thread that captured the last block; `wait` then waits for what is being written.
    """

    def __init__(self, blocks: Iterable[str], complete: Callable[[Capture], None]) -> None:
        self.waiting = set(blocks)
        self.has_begun = False
        """Whether the store knows that this commit waits for no further update."""
        self.blocks: dict[str, CapturedBlock] = {}
        self._missing = set(self.waiting)
        self._complete = complete
        self._transfers: list[Transfer] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def add(self, block: CapturedBlock, transfers: Iterable[Transfer] = ()) -> None:
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
