"""What is known of one block between and during visits. Each part has one writer; all may read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum

from outsize.block import Record
from outsize.store.planes import BlockPlanes
from outsize.store.update_job import Pending, UpdateJob
from outsize.tier import Transfer


@dataclass(eq=False)
class WeightState:
    """Where the weights come from and what fills them; written by `Weights`."""

    is_loaded: bool = False
    """Whether weights whose home is memory have been read from the source."""
    loading: Transfer | None = None
    """The reading of hosted weights from the source."""
    reads: Sequence[Transfer] = ()
    """What fills the weights where blocks compute."""
    home_reads: Sequence[Transfer] = ()
    """What last read the weights at home."""


@dataclass(slots=True)
class EntryGradient:
    """Whether the gradient of one entry exists, its squares, and the factor that clipping set."""

    present: bool = False
    scale: float = 1.0
    squares: dict[int, float] = field(default_factory=dict)
    """Sums of squares by the first element of each part (of `NORM_ELEMENTS`): those of shards add up to the same bits."""

    @property
    def sum_of_squares(self) -> float:
        """The sum of squares of all parts, rounded once whatever their order."""
        return fsum(self.squares.values())


@dataclass(eq=False)
class GradientState:
    """What is known of a block's gradient; written by `Gradients`."""

    entries: Sequence[EntryGradient]
    summed: set[int] = field(default_factory=set)
    """Entries whose sum already holds something; the first addition to the others is a copy."""
    summing: set[int] = field(default_factory=set)
    """Entries whose stored gradient is being changed: outside of visits, entries whose gradient is only partly summed."""
    transfers: Sequence[Transfer] = ()
    is_draining: bool = False
    """Whether `transfers` move the gradient to its home."""

    @property
    def exists(self) -> bool:
        """Whether any entry has a gradient."""
        return any(entry.present for entry in self.entries)


@dataclass(eq=False)
class UpdateState:
    """How far a block's updates are; written by `Updates`, but for `freeze`."""

    is_stored: bool = False
    """Whether an update stored the weights; until then they come from the source and state is zero."""
    pending: Pending | None = None
    num_steps: int = 0
    """Updates frozen so far; a backward whose forward saw another number would be wrong."""
    job: UpdateJob | None = None
    """The last update that was handed to the optimizer worker."""
    is_changing: bool = False
    """Whether an update is being applied to planes on a device; outside of it, that it stopped half-way."""

    def freeze(self, pending: Pending, num_steps: int) -> None:
        """Take a frozen update, the `num_steps`-th, to be applied at the next visit; may be done twice."""
        self.pending, self.num_steps = pending, num_steps


@dataclass(eq=False)
class SnapshotState:
    """How far planes in memory are copied to the disk for a commit; written by `Snapshots`."""

    copy: Transfer | None = None
    """The copying under way; the next update comes after it."""
    copying_at: int | None = None
    """After which update (`num_steps`) planes were last copied, or are being; None: never, or it failed."""
    copied_at: int | None = None
    """The same of a copy that is over."""


@dataclass(eq=False)
class BlockState:
    """One block: where its planes are, and what is under way."""

    planes: BlockPlanes
    gradient: GradientState
    weights: WeightState = field(default_factory=WeightState)
    update: UpdateState = field(default_factory=UpdateState)
    snapshot: SnapshotState = field(default_factory=SnapshotState)

    @classmethod
    def of(cls, planes: BlockPlanes) -> BlockState:
        """A block of which nothing was read yet."""
        return cls(planes, GradientState([EntryGradient() for _ in planes.record.entries]))

    @property
    def name(self) -> str:
        """The block's name."""
        return self.planes.name

    @property
    def record(self) -> Record:
        """The layout of its bytes."""
        return self.planes.record
