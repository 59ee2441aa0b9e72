"""From an open model to one that runs: records are laid out and placed, memory is allocated, the disk is opened."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from fractions import Fraction
from typing import final

from outsize.block import Group, Piece, Plane, Record
from outsize.config import ComputeType, Home
from outsize.engine.budget import Budget
from outsize.engine.dry_run import AnyPoint
from outsize.engine.executor import Executor
from outsize.engine.model import Model
from outsize.engine.parameters import Backing
from outsize.engine.timing import measure_costs
from outsize.errors import UsageError
from outsize.model import EncodingSource, InitSource, SafetensorsSource, TensorSource
from outsize.optim import Kernel, Rule
from outsize.plan import IN_MEMORY, Direction, Placement, is_stored
from outsize.plan.lower import Costs
from outsize.plan.path import legs
from outsize.plan.profile import Profile
from outsize.plan.search import CostModel
from outsize.plan.workload import Call, Workload
from outsize.store import memory
from outsize.store.blocks import BlockStore
from outsize.store.commit_store import CommitStore, Layout
from outsize.store.finalizers import when_dropped
from outsize.store.offload import ActivationOffload
from outsize.store.planes import DTYPES
from outsize.store.scratch import disk_bytes, open_scratch
from outsize.store.state import BlockState
from outsize.store.weight_reader import reading_bytes
from outsize.tier import IO_THREADS, Tier

Kernels = Callable[[ComputeType], Kernel]
"""The kernel of an update rule for records of a compute type."""


@final
class Setup:
    """Decides where everything lives, makes it so, and gives it back: the one that changes `backing`."""

    def __init__(
        self,
        model: Model,
        backing: Backing,
        budget: Budget,
        points: Mapping[str, AnyPoint],
        profile: Profile | None,
    ) -> None:
        self.profile = profile
        """Of the machine, if it is known: the fastest plan is then taken."""
        self.rule: Rule | None = None
        self.kernel: Kernels | None = None
        self.identity = uuid.uuid4().hex
        self.is_closed = False
        """Whether weights are gone that the source does not have."""
        self._model = model
        self._backing = backing
        self._budget = budget
        self._points = points
        self._device_kernel: Kernels | None = None
        self._costs: dict[tuple[Call, int], Costs] = {}

    # -- what is decided before the first call -------------------------------------------------------------------

    def set_rule(self, rule: Rule, kernel: Kernels, device_kernel: Kernels | None = None) -> None:
        """Lay records out for `rule` from now on. Raises UsageError once there are gradients, or another rule.

        `kernel` runs on the host, `device_kernel` where blocks compute (default: the same).
        """
        executor = self._backing.executor
        if executor is not None:
            if self.rule is not None or any(state.gradient.exists for state in executor.store):
                raise UsageError(
                    "the model has an optimizer or gradients already",
                    hint="create the optimizer once, before the first backward()",
                )
            self.close()
        self.rule, self.kernel, self._device_kernel = rule, kernel, device_kernel or kernel

    def live_in(self, commit_store: CommitStore | None) -> None:
        """Keep all records in `commit_store` from the first call on; None: in scratch space."""
        self._backing.commit_store = commit_store
        commits = 0 if commit_store is None else commit_store.commits
        self._budget.settings = replace(self._budget.settings, commits=commits)

    def keep_tiles(self, rows: int) -> bool:
        """Compute `rows` rows of a batch at once, as an earlier process did; False if a pin says otherwise."""
        budget, pins = self._budget, self._budget.settings.pins
        if pins.tile_rows is None:
            budget.settings = replace(budget.settings, pins=replace(pins, tile_rows=rows))
        return budget.settings.pins.tile_rows == rows

    # -- deciding ------------------------------------------------------------------------------------------------

    def decide(self, calls: Sequence[Call], cached: Call | None = None) -> tuple[list[Record], Placement]:
        """Lay records out for the first of `calls`, and place them for all.

        The plan is the fastest for the first call or, if given, for `cached`, which continues a cache. Raises BudgetError
        if they do not fit.
        """
        records = self._lay_out(calls[0].workload)
        cost_model = None
        if self.profile is not None:
            cost_model = self.cost_model(self.profile, cached or calls[0], records)
        if cost_model is not None and cached is not None:
            cost_model = cost_model.uncut(cached.shape.rows or 1)
        return records, self._budget.place(records, calls, cost_model)

    def fits(self, call: Call) -> bool:
        """Whether a call fits, with a margin; nothing is decided."""
        return self._budget.fits(self._lay_out(call.workload), call)

    def cost_model(self, profile: Profile, call: Call, records: Sequence[Record]) -> CostModel:
        """What plans for calls of this shape are compared with; blocks are timed once for each size of tile."""

        def costs(tile_rows: int) -> Costs:
            key = call, tile_rows
            if key not in self._costs:
                self._costs[key] = measure_costs(self._model, self._points, call, tile_rows, records, profile)
            return self._costs[key]

        return CostModel(profile, costs)

    def forget_costs(self) -> None:
        """Time blocks again when plans are compared next."""
        self._costs.clear()

    def _lay_out(self, workload: Workload) -> list[Record]:
        """Records of all blocks, for the rule and for the parameters that train now."""
        visited = Counter(v.block for v in workload.visits if v.direction is Direction.FORWARD)
        records = []
        for block in self._model.cut.blocks:
            trainable = [self._model.parameters[piece.parameter].requires_grad for piece in block.pieces]
            state: tuple[Plane, ...] = ()
            compute_type = self._model.compute_type(block.name)
            size = DTYPES[compute_type].itemsize
            sizes: dict[Plane, int | Fraction] = {Plane.WEIGHT: size, Plane.GRADIENT: size}
            if self.rule is not None:
                state = self.rule.state(compute_type)
                sizes |= self.rule.element_bytes(compute_type)
            if visited[block.name] > 1:
                sizes[Plane.GRADIENT] = 4  # summed over visits: rounded once, when the update reads it
            pieces = zip(block.pieces, trainable, strict=True)
            in_files = {piece for piece, trains in pieces if not trains and self._stays_in_files(piece)}
            records.append(Record.lay_out(block, trainable, state, sizes, in_files))
        return records

    def _stays_in_files(self, piece: Piece) -> bool:
        """Whether a frozen piece keeps its home in the model's own files.

        Not if a commit stores it: it trained in an earlier run.
        """
        backing = self._backing
        is_committed = backing.commit_store is not None and backing.commit_store.holds(piece)
        return isinstance(backing.source, SafetensorsSource) and not is_committed

    # -- settling ------------------------------------------------------------------------------------------------

    def settle(self, calls: Sequence[Call]) -> None:
        """Decide, allocate, and open the disk. Raises BudgetError, having changed nothing, if it does not fit.

        Raises FileChangedError if a file of the model is not the one that was opened.
        """
        self._backing.own_source().check()
        self._compile(self.kernel)  # a compilation ends before the arenas are touched
        records, placement = self.decide(calls)
        if placement.at(Home.DEVICE):
            self._compile(self._device_kernel)
        store, restored = self._open_store(records, placement)
        backing = self._backing
        backing.executor = Executor(store)
        memory.register(store.planes.host_arena, type(self._model.module).__name__)
        self._finalizer = when_dropped(self, store.workers.close)
        self._model.parameters.locate({r.name: [entry.piece for entry in r.entries] for r in records})
        try:
            if placement.inputs is not None:
                is_disk = placement.inputs is Home.DISK
                inputs = self._open_scratch("inputs", placement.inputs_bytes) if is_disk else None
                backing.offload = ActivationOffload(self._model.device, placement.inputs_bytes, inputs)
                store.attach(backing.offload)
            store.restore(restored)
            self._forget_committed()
            self._load_resident(store, records)
        except BaseException:
            with suppress(BaseException):  # the first error is the one to report
                self.close()
            raise

    def _compile(self, kernels: Kernels | None) -> None:
        if kernels is not None:
            for compute_type in self._model.trained_types():
                kernels(compute_type)

    def _open_store(
        self, records: Sequence[Record], placement: Placement
    ) -> tuple[BlockStore, frozenset[str]]:
        """The store of `records` with its disk, and the names of those that an earlier process left on it."""
        backing, settings = self._backing, self._budget.settings
        restored: frozenset[str] = frozenset()
        bases: Mapping[str, int] | None = None
        disk: Tier | None
        if backing.commit_store is None:
            disk_bytes(placement, settings)
            disk = self._open_scratch("store", placement.disk_bytes)
        else:
            layout = Layout.of(records, placement)
            disk_bytes(placement, settings, layout.num_bytes(backing.commit_store.commits))
            opened = backing.commit_store.open(
                records,
                layout,
                backing.own_source(),
                limits=[disk.num_bytes for disk in settings.budgets.disks],
                verify=settings.pins.verify,
                num_threads=self._io_threads,
            )
            disk, restored, bases = opened.tier, opened.restored, layout.bases
        try:
            store = BlockStore(
                records,
                placement,
                source=backing.own_source(),
                disk=disk,
                rule=self.rule,
                kernel=self.kernel,
                device=self._model.device,
                device_kernel=self._device_kernel,
                disk_offsets=bases,
                update_threads=self.profile.update_threads if self.profile is not None else None,
            )
        except BaseException:
            if disk is not None:
                disk.close()
            raise
        return store, restored

    def _load_resident(self, store: BlockStore, records: Sequence[Record]) -> None:
        """Start reading weights that stay in memory; read all of them, if their source takes memory that should go."""
        source = self._backing.source
        if isinstance(source, EncodingSource):
            stay = {
                state.name for state in store if store.placement.home(state.name, Group.WEIGHT) in IN_MEMORY
            }
            blocks = self._model.cut.blocks
            if any(block.name not in stay and source.encodes(block) for block in blocks):
                source.pack()
                memory.give_back()
        in_memory = isinstance(source, InitSource | TensorSource)
        if self.rule is not None and in_memory and is_stored(records):
            store.import_all(self._touch)
            self._backing.source = None
        else:
            for state in store:
                store.weights.load(state)

    def _touch(self, state: BlockState) -> None:
        with self._backing.running.touch(state.name):
            pass

    def _open_scratch(self, what: str, num_bytes: int) -> Tier | None:
        return open_scratch(
            f"outsize-{self.identity}.{what}", num_bytes, self._budget.settings, self._io_threads
        )

    @property
    def _io_threads(self) -> int:
        """Threads that move bytes to and from each disk."""
        return (self.profile.io_threads if self.profile is not None else None) or IO_THREADS

    # -- while it runs -------------------------------------------------------------------------------------------

    def use_what_is_left(self, needed_bytes: int) -> None:
        """Keep as many weights in memory as a call that takes `needed_bytes` leaves room for."""
        store = self._backing.store
        placement = self._budget.with_what_is_left(needed_bytes)
        if placement is not None:
            store.weights.keep_pieces(placement)

    def _forget_committed(self) -> None:
        committed, self._backing.committed = self._backing.committed, None
        if committed is not None:
            committed.close()

    def close(self) -> None:
        """Give memory and disk back. Weights that were updated or taken over are gone: save them before."""
        backing, commit_store = self._backing, self._backing.commit_store
        executor, backing.executor = backing.executor, None
        self._budget.use(None)
        offload, backing.offload = backing.offload, None
        with ExitStack() as stack:  # the last callback runs first, and all run, whatever one of them raises
            if commit_store is not None:
                stack.callback(commit_store.close)
            if executor is not None:
                self._finalizer.detach()
                self.is_closed = backing.source is None or any(
                    state.update.is_stored for state in executor.store
                )
                stack.callback(executor.close)
            if offload is not None:
                stack.callback(offload.close)
            if executor is not None and commit_store is not None:
                assert executor.store.snapshots is not None
                stack.callback(commit_store.is_closing)
                stack.callback(executor.store.snapshots.finish)
            stack.callback(self._forget_committed)


def source_bytes(backing: Backing, model: Model) -> Callable[[Sequence[Record]], int]:
    """What reading any of some records from the source takes beside the memory that they are read into."""
    link = legs(model.device.host, Home.DEVICE, model.device.host)
    return lambda records: reading_bytes(backing.own_source(), records, link)
