"""The memory of a machine, and of the process on it, as they were when a plan was made."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.config import Home, format_bytes
from outsize.plan.ledger import EMPTY, Ledger, Purpose
from outsize.plan.place import IN_MEMORY

SLACK_BYTES = 96 << 20
"""Host memory left for what no plan counts: fragments in malloc, Python objects, thread stacks."""

SLACK_SHARE = 32
"""A large budget leaves one part in 32 instead: its visits are larger, and malloc wastes more on them."""

UNPLANNED_BYTES = 48 << 20
"""The part of the slack that a run typically uses: 16 to 100 MiB over a grid of runs (benchmarks/results)."""

LEAST_FREED_BYTES = 64 << 20
"""Freed memory that is kept at least, if there is room for a second visit."""

HINT_MARGIN_BYTES = 16 << 20
"""Added to the budgets that a hint names: the process may have grown by the time they are tried."""

DEVICE_SLACK_BYTES = 64 << 20
"""Device memory left for what no plan counts: torch's allocator takes pages of 20 MiB for large tensors and of 2 MiB for
small ones, and leaves more than one partly used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All that a plan must stay within. Nothing in here is measured again while plans are compared."""

    host_bytes: int
    """The most that the process may take of the host's memory."""
    taken: Ledger = EMPTY
    """Taken before anything is placed."""
    reading_bytes: int = 0
    """Host memory that reading a block from its source takes beside the memory that it is read into."""
    device_bytes: int | None = None
    """The most that may be taken of a device with memory of its own; None if the host computes."""
    device_free_bytes: int = 0
    """What is free of it, beside what is taken."""
    others: str = ""
    """Names other models that hold memory, as a part of a sentence."""

    @property
    def computes_in(self) -> Home:
        """The memory where blocks compute."""
        return Home.HOST if self.device_bytes is None else Home.DEVICE

    @property
    def memories(self) -> dict[Home, Home]:
        """What each home of a placement is in this machine: where the host computes, its memory is DEVICE."""
        return {Home.DEVICE: Home.HOST} if self.device_bytes is None else {home: home for home in IN_MEMORY}

    @property
    def keeps_freed(self) -> bool:
        """Whether freed activations count as taken where blocks compute, as malloc keeps them for the process."""
        return self.computes_in is Home.HOST

    @property
    def slack_bytes(self) -> int:
        """Memory of the host that is left for what is not planned."""
        return max(SLACK_BYTES, self.host_bytes // SLACK_SHARE)

    @property
    def spare(self) -> Ledger:
        """What is left free beside what is planned."""
        host = Ledger.of(Home.HOST, reading=self.reading_bytes, slack=self.slack_bytes)
        return host + Ledger.of(Home.DEVICE, slack=DEVICE_SLACK_BYTES)

    def room_bytes(self, home: Home) -> int:
        """What planes, buffers and, where blocks compute, activations may take; less than nothing where it is short."""
        return self.free_bytes(home) - self.spare.total(home)

    def free_bytes(self, home: Home) -> int:
        """What is free; less than nothing where more is taken than may be."""
        if home is Home.DEVICE:
            return min(self.device_bytes or 0, self.device_free_bytes)
        return self.host_bytes - self.taken.total(home)

    @property
    def taken_text(self) -> str:
        """What is taken already, as a part of a sentence."""
        process = self.taken[Home.HOST, Purpose.PROCESS]
        return f"the process itself has {format_bytes(process)}, {self.others}"
