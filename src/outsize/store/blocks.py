"""All blocks of a model: which function carries out which operation of a plan, and the life cycle of the whole.

It knows nothing of models or of autograd. Where each plane is stands in `Planes`; weights, gradients, updates and snapshots
each change their own part of a block's state, and do not know each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from outsize.block import Plane, Record
from outsize.config import ComputeType
from outsize.model import Source
from outsize.optim import Kernel, Rule
from outsize.plan import Claim, Copy, Fetch, Free, Held, Op, Placement, Read, Send, Update, Wait, Write
from outsize.store.gradients import Gradients
from outsize.store.offload import ActivationOffload
from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.path import Path
from outsize.store.planes import Planes
from outsize.store.snapshots import Snapshots
from outsize.store.state import BlockState
from outsize.store.updates import Updates
from outsize.store.weight_reader import WeightReader
from outsize.store.weights import Weights
from outsize.store.workers import Workers
from outsize.tier import Device, Tier, VersionedTier, wait_all


class BlockStore:
    """All blocks of a model, with the memory and the disk they live in; `runners` carry out the operations of a plan.

    `disk_offsets` says where each record begins on disk; None: those that have planes there follow one another.
    """

    def __init__(
        self,
        records: Sequence[Record],
        placement: Placement,
        *,
        device: Device,
        disk: Tier | None,
        source: Source,
        rule: Rule | None,
        kernel: Callable[[ComputeType], Kernel] | None,
        device_kernel: Callable[[ComputeType], Kernel] | None,
        disk_offsets: Mapping[str, int] | None = None,
        update_threads: int | None = None,
    ) -> None:
        self.device = device
        self.disk = disk
        self.records = {record.name: record for record in records}
        self.planes = planes = Planes(records, placement, device, rule, disk_offsets)
        self.states = {block.name: BlockState.of(block) for block in planes}
        self.path = Path(device, disk, planes.bounce_buffers)
        self.weight_reader = WeightReader(planes, source)
        self.weights = Weights(planes, self.path, self.weight_reader)
        self.gradients = Gradients(planes, self.path, disk)
        self.snapshots = Snapshots(self.states, disk, self.path) if isinstance(disk, VersionedTier) else None
        worker = (
            None if kernel is None else OptimizerWorker(planes.chunk_buffers, disk, kernel, update_threads)
        )
        self.offload: ActivationOffload | None = None
        self.updates = Updates(planes, self.weight_reader, worker, device_kernel)
        copiers = () if self.snapshots is None else (self.snapshots.thread,)
        threads = (self.weight_reader.thread, *copiers)
        self.workers = Workers(self.path, device, disk, threads, worker)
        weight, gradient = Plane.WEIGHT, Plane.GRADIENT
        self.runners: dict[tuple[type[Op], Plane | None], Callable[[BlockState], None]] = {
            (Held, weight): lambda state: None,
            (Read, weight): self.weights.read,
            (Wait, weight): self.wait_weights,
            (Free, weight): self.weights.free,
            (Update, None): self.start_update,
            (Claim, gradient): self.gradients.claim,
            (Read, gradient): self.gradients.read,
            (Wait, gradient): self.gradients.wait,
            (Write, gradient): self.gradients.write,
            (Free, gradient): self.gradients.free,
        }
        if self.snapshots is not None:
            self.runners[Copy, None] = self.snapshots.take

    def attach(self, offload: ActivationOffload) -> None:
        """Let `offload` carry out the operations on inputs of blocks; autograd, which asks for them, waits itself."""
        self.offload, plane = offload, Plane.INPUT
        self.runners |= {
            (Held, plane): lambda state: None,
            (Send, plane): lambda state: offload.send(state.name),
            (Free, plane): lambda state: offload.free(state.name),
            (Fetch, plane): lambda state: offload.fetch(state.name),
            (Wait, plane): lambda state: offload.settle(),
        }

    def __getitem__(self, block: str) -> BlockState:
        return self.states[block]

    def __iter__(self) -> Iterator[BlockState]:
        return iter(self.states.values())

    @property
    def placement(self) -> Placement:
        """Where planes live, as of now."""
        return self.planes.placement

    # -- operations that concern more than one part of a block ---------------------------------------------------

    def wait_weights(self, state: BlockState) -> None:
        """Let computing wait until the weights in memory are current; raise what went wrong."""
        try:
            self.weights.wait(state)
        except Exception as error:  # an interrupt is noted later, by `recover`
            if self.snapshots is not None:
                self.snapshots.failed(state, error)
            raise

    def start_update(self, state: BlockState) -> None:
        """Start the pending update of a block."""
        self.weights.load(state)
        if self.planes.updates_in_place(state.planes):
            self.weights.follow(state)
        self.updates.start(state)
        self.gradients.hand_over(state)  # the update waits for its transfers

    def evict(self, state: BlockState, placement: Placement) -> None:
        """Move a block that stays on the device to host memory, where `placement` has it, and wait until it is there.

        Not during a visit of the block. Raises BudgetError, having changed nothing, if the system lacks the memory.
        """
        wait_all((*state.weights.reads, *state.gradient.transfers))
        if state.snapshot.copy is not None:
            state.snapshot.copy.wait()
        self.planes.evict(state.planes, placement)
        self.weights.evicted(state)

    # -- the first bytes -----------------------------------------------------------------------------------------

    def restore(self, blocks: Iterable[str]) -> None:
        """Take `blocks` from the disk, where an earlier process left them; planes whose home is memory are read now."""
        if self.snapshots is not None:
            states = [self[name] for name in blocks]
            for state in states:
                self.updates.restored(state)
                self.weights.restored(state)
            self.snapshots.restore(states)

    def import_all(self, reach: Callable[[BlockState], None]) -> None:
        """Store every block now, from a source that should not be read twice, and forget the source.

        `reach` makes a block current in memory (through a plan of one visit).
        """
        for state in self:
            if not state.update.is_stored:
                self.updates.import_block(state)
                reach(state)
        self.weight_reader.source = None

    # -- the whole store -----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until everything that was started is where it belongs; raise what went wrong."""
        for state in self:
            if state.update.job is not None:
                state.update.job.wait()
            self.gradients.finish(state)

    def recover(self) -> None:
        """Bring the state of all blocks in line with what their homes hold; see [Note: interruption]."""
        if self.snapshots is not None:
            self.snapshots.recover()  # first: an update may wait for a commit that waits for a block
        self.workers.finish()
        for state in self:
            self.gradients.recover(state)
            self.weights.recover(state)
            error = self.updates.recover(state)
            if error is not None and self.snapshots is not None:
                self.snapshots.failed(state, error)
        self._free_slots()
        if self.snapshots is not None:
            self.snapshots.settle()

    def _free_slots(self) -> None:
        self.planes.free_all_slots()
        self.weight_reader.reset()

    def close(self) -> None:
        """Finish what is under way and give memory and disk back, whatever goes wrong on the way."""
        with ExitStack() as stack:
            stack.callback(self._free_memory)
            stack.callback(self.workers.close)

    def _free_memory(self) -> None:
        """Give all memory back; the workers have ended."""
        for state in self:
            self.updates.drop_job(state)
        self.planes.free()
