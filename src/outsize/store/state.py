"""What is known of one block: its homes, its slots, and what is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from outsize.block import Plane, Record
from outsize.config import ComputeType
from outsize.errors import StateLostError
from outsize.store.updates import Pending, UpdateJob
from outsize.tier import DeviceRegion, Region, Slot, Transfer, follow_all, wait_all

DTYPES = {ComputeType.FLOAT32: torch.float32, ComputeType.BFLOAT16: torch.bfloat16}


def weight_dtype(record: Record) -> torch.dtype:
    """The type of a record's weights, and of its gradient as its update takes it."""
    return DTYPES[record.compute_type]


@dataclass(slots=True)
class GradientState:
    """What is known of one entry's gradient: whether it exists, its sum of squares, and the factor clipping set."""

    present: bool = False
    sum_of_squares: float = 0.0
    scale: float = 1.0


@dataclass(eq=False)
class BlockState:
    """One block: its record, homes, slots, and what is under way. Changed by the store, its parts, and the optimizer alone.

    `resident`: planes that stay where blocks compute. `hosted`: planes whose home is the memory of a host that does not.
    """

    record: Record
    disk_offset: int
    resident: dict[Plane, Region | DeviceRegion]
    hosted: dict[Plane, Region]
    gradients: list[GradientState]
    is_stored: bool = False
    """Whether an update wrote (or keeps) the weights; until then they come from the source and state is zero."""
    is_loaded: bool = False
    """Whether weights that stay in memory have been read from the source."""
    loading: Transfer | None = None
    """The reading of hosted weights from the source."""
    pending: Pending | None = None
    num_steps: int = 0
    """Updates frozen so far; a backward whose forward saw another number would be wrong."""
    slot: Slot | None = None
    gradient_slot: Slot | None = None
    summed: set[int] = field(default_factory=set)
    """Entries whose sum already holds something; the first addition to the others is a copy."""
    weight_reads: list[Transfer] = field(default_factory=list)
    home_reads: Sequence[Transfer] = ()
    """What last read the weights at home."""
    gradient_transfers: list[Transfer] = field(default_factory=list)
    summing: set[int] = field(default_factory=set)
    """Entries whose stored gradient is being changed: outside of visits, entries whose gradient is only partly summed."""
    is_draining: bool = False
    """Whether `gradient_transfers` bring the gradient home."""
    is_changing: bool = False
    """Whether an update is being applied to planes on a device; outside of it, that it stopped half-way."""
    update: UpdateJob | None = None
    copy: Transfer | None = None
    """The copying of planes that live in memory to the disk, for a commit; before the next update it must be over."""
    copying_at: int | None = None
    """After which update (`num_steps`) such planes were last copied, or are being; None: never, or it failed."""
    copied_at: int | None = None
    """The same of a copy that is over."""

    @property
    def name(self) -> str:
        """The block's name."""
        return self.record.name

    def finish_gradient(self) -> None:
        """Wait for the gradient's transfers."""
        wait_all(self.gradient_transfers)
        self.gradient_transfers, self.is_draining = [], False

    def follow_gradient(self) -> None:
        """Let computing come after the gradient's transfers."""
        follow_all(self.gradient_transfers)
        self.gradient_transfers, self.is_draining = [], False

    def check_gradient(self, index: int) -> None:
        """Raise StateLostError where the gradient of entry `index` is only partly summed."""
        if index in self.summing:
            raise StateLostError(
                f"the gradient of {self.record.entries[index].piece.parameter} is only partly summed: "
                "a backward() was interrupted while it added to it",
                hint="drop the gradients with optimizer.zero_grad() and repeat the step",
            )

    @property
    def has_gradient(self) -> bool:
        """Whether any entry has a gradient."""
        return any(gradient.present for gradient in self.gradients)
