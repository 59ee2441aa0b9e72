"""One model under Outsize: its blocks, its points, its plan, and the budgets it was given.

A session takes a model's parameters away and leaves placeholders, wraps the forward of each point, and watches calls of
the root module. At the first call it rehearses, places every plane, and allocates; from then on budgets are fixed.
"""

from __future__ import annotations

import inspect
import logging
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.config import ComputeType, Home, OnDeviceFull, Settings, format_bytes
from outsize.engine.arguments import Arguments
from outsize.engine.budget import Budget, Foresight
from outsize.engine.calls import Calls
from outsize.engine.compiled import Compiler
from outsize.engine.embedding import Embedding
from outsize.engine.executor import Executor
from outsize.engine.guard import Guard
from outsize.engine.head import Head, TiledLoss
from outsize.engine.layer import Layer, Loose
from outsize.engine.parameters import Parameters
from outsize.engine.probe import BatchShape, Probe, Rehearsal
from outsize.engine.stepdown import StepDown
from outsize.engine.structure import Structure
from outsize.engine.surroundings import outside_inference_mode
from outsize.engine.timing import measure_costs
from outsize.errors import UsageError
from outsize.model import (
    Cut,
    EncodingSource,
    InitSource,
    Point,
    PointKind,
    Source,
    TensorSource,
)
from outsize.optim import Kernel, Rule
from outsize.plan import Direction, Placement, Visit, is_stored
from outsize.plan.profile import Profile
from outsize.plan.simulate import Costs
from outsize.store import memory
from outsize.store.blocks import BlockStore, close_workers
from outsize.store.commit_store import CommitStore, Layout
from outsize.store.finalizers import when_dropped
from outsize.store.offload import ActivationOffload
from outsize.store.scratch import disk_bytes, open_scratch
from outsize.store.state import DTYPES, BlockState
from outsize.store.weight_reader import reading_bytes
from outsize.tier import IO_THREADS, Device, HostDevice, Tier

if TYPE_CHECKING:
    AnyPoint = Layer | Loose | Embedding | Head

_log = logging.getLogger(__name__)

_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""A module's hooks hold its session; the registry holds neither, so that both go when the module is dropped."""


def session_of(module: nn.Module) -> Session:
    """The session of a model that was loaded or wrapped; raises UsageError for any other."""
    session = find_session(module)
    if session is None and isinstance(module, nn.Module):
        inner = next(
            (type(each).__name__ for each in module.modules() if find_session(each) is not None), None
        )
        if inner is not None:
            raise UsageError(
                f"{type(module).__name__} was put around a {inner} that is under Outsize already",
                hint="build the whole model first, adapters included, and pass it to outsize.wrap",
            )
    if session is None:
        raise UsageError(
            f"{type(module).__name__} is not a model of Outsize",
            hint="open it with outsize.load(path), or wrap it with outsize.wrap(module)",
        )
    return session


def find_session(module: nn.Module) -> Session | None:
    """The session of a model that was loaded or wrapped; None for any other."""
    reference = _sessions.get(module) if isinstance(module, nn.Module) else None
    return reference() if reference is not None else None


class Session:
    """Everything Outsize knows about one model."""

    def __init__(
        self,
        module: nn.Module,
        cut: Cut,
        source: Source,
        settings: Settings,
        device: Device | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.module = module
        self.profile = profile
        """Of the machine, where it is known: the fastest plan is then taken."""
        self.device = device or HostDevice()
        self.torch_device = self.device.torch_device
        self.cut = cut
        self.source: Source | None = source
        self.settings = settings
        self.dtype = DTYPES[settings.compute_type]
        self.anchor = torch.zeros((), requires_grad=True, device=self.torch_device, dtype=torch.float32)
        self.arguments = Arguments(self.torch_device)
        self.probe: Probe | None = None
        self.rule: Rule | None = None
        self.kernel: Callable[[ComputeType], Kernel] | None = None
        self.device_kernel: Callable[[ComputeType], Kernel] | None = None
        self.executor: Executor | None = None
        self.versions: CommitStore | None = None
        """Where records are kept beyond the process, if they are."""
        self.committed: Source | None = None
        """What the commit holds that the session will start from; until it does."""
        self.keeper: ActivationOffload | None = None
        self.stepdown = StepDown(settings.on_device_full is OnDeviceFull.RETRY, self.device)
        self.stepdown.evict = self._evict
        self.compiler = Compiler(bool(settings.compile))
        self._is_closed = False
        self.identity = uuid.uuid4().hex
        free_host_bytes = memory.available_bytes
        if self.torch_device.type == "meta" and profile is not None:
            free_host_bytes = partial(int, profile.host_bytes)
        self.budget = Budget(
            settings, _never_streamed(cut), self.device, self._reading_bytes, free_host_bytes
        )
        self._costs: dict[tuple[Rehearsal, BatchShape, int], Costs] = {}
        self.blocks = {block.name: block for block in cut.blocks}
        self._full_precision = frozenset(
            piece.parameter
            for block in cut.blocks
            if block.name in cut.full_precision
            for piece in block.pieces
        )
        self.parameters = Parameters(self, module, cut.blocks)
        self._install()
        self.structure = Structure(module, self.points)
        self.calls = Calls(self)
        _sessions[module] = weakref.ref(self)

    # -- taking the model over -----------------------------------------------------------------------------------

    def _install(self) -> None:
        self.points: dict[str, AnyPoint] = {}
        for point in self.cut.points:
            module = self.module.get_submodule(point.module)
            self.points[point.module] = handler = self._handler(point, module)
            # An instance attribute shadows the method, as accelerate does; the class stays as it is.
            module.forward = _with_signature(handler, module.forward)
        self.forward: Callable[..., Any] = self.module.forward
        self._move_buffers()
        original = getattr(self.module, "loss_function", None)
        if original is ForCausalLMLoss:
            self.module.loss_function = TiledLoss(original)  # type: ignore[assignment]

    def _move_buffers(self) -> None:
        """Buffers belong to no block: they stay where blocks compute. Those made in inference mode become ordinary ones."""
        for owner in self.module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is None:
                    continue
                if buffer.device != self.torch_device or buffer.is_inference():
                    owner._buffers[name] = buffer.to(self.torch_device, copy=True)

    def _handler(self, point: Point, module: nn.Module) -> AnyPoint:
        blocks = [self.blocks[name] for name in point.blocks]
        match point.kind:
            case PointKind.LAYER:
                return Layer(self, point, module, blocks)
            case PointKind.LOOSE:
                return Loose(self, point, module, blocks)
            case PointKind.EMBEDDING:
                assert isinstance(module, nn.Embedding)
                return Embedding(self, point, module, blocks)
            case PointKind.HEAD:
                assert isinstance(module, nn.Linear)
                return Head(self, point, module, blocks)

    # -- what points ask for -------------------------------------------------------------------------------------

    def trains(self, blocks: Sequence[str]) -> bool:
        """Whether any parameter in `blocks` requires grad."""
        return any(
            self.parameters[piece.parameter].requires_grad
            for name in blocks
            for piece in self.blocks[name].pieces
        )

    def is_repeated(self, module: nn.Module) -> bool:
        """Whether it is a layer with matrices, and others of the model are of the same class."""
        if all(parameter.dim() < 2 for parameter in module.parameters()):
            return False
        layers = (point.module for point in self.cut.points if point.kind is PointKind.LAYER)
        return sum(type(self.module.get_submodule(name)) is type(module) for name in layers) > 1

    def guard(self, point: Point) -> Guard:
        """What the backward of a visit to `point` will check."""
        return Guard(point.module, () if self.probe is not None else self.num_steps(point.blocks))

    def num_steps(self, blocks: Sequence[str]) -> tuple[int, ...]:
        """How many updates each block was given so far."""
        return tuple(self.store[name].num_steps for name in blocks)

    def entry_pieces(self, blocks: Sequence[str]) -> list[Piece]:
        """The pieces of `blocks`."""
        return [piece for name in blocks for piece in self.blocks[name].pieces]

    @contextmanager
    def visit(
        self, blocks: Sequence[str], direction: Direction, *, as_leaves: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The parameters in `blocks` by name: as plain views, or as leaves of a graph that outlives the visit."""
        values_of = self._leaves if as_leaves else self._values
        visits = [Visit(name, direction, joins_next=name != blocks[-1]) for name in blocks]
        make_room = partial(self.budget.make_room, self.budget.visit_bytes)
        with self.budget.guarded(), self.running.visit(visits, make_room) as states:
            yield {name: value for state in states for name, value in values_of(state).items()}

    @contextmanager
    def visit_backward(
        self, blocks: Sequence[str], *, needs_weights: bool = True
    ) -> Iterator[dict[str, torch.Tensor]]:
        """As `visit`; trainable parameters are leaves whose gradients go to the block's sum as they arise."""
        visits = backward_visits(self, blocks, needs_weights)
        # Calls without a graph may have come since, and be smaller.
        call = self.calls.last_training
        visit_bytes = self.budget.visit_bytes if call is None else call.visit_bytes
        make_room = partial(self.budget.make_room, visit_bytes)
        with self.budget.guarded(), self.running.visit(visits, make_room) as states:
            yield {
                name: value
                for state in states
                for name, value in (self._leaves(state) if needs_weights else {}).items()
            }

    def _values(self, state: BlockState) -> dict[str, torch.Tensor]:
        views = self.store.pieces(state)
        return {e.piece.parameter: view for e, view in zip(state.record.entries, views, strict=True)}

    def _leaves(self, state: BlockState) -> dict[str, torch.Tensor]:
        leaves = self._values(state)
        for index, entry in enumerate(state.record.entries):
            if self._collects(entry):

                def collect(leaf: torch.Tensor, index: int = index, entry: Entry = entry) -> None:
                    gradient, leaf.grad = leaf.grad, None
                    assert gradient is not None
                    if self._collects(entry):  # still: a kept graph is older than its backward
                        add = partial(self.store.gradients.add, state, index, gradient)
                        self.stepdown.add((state.name, index), add)

                leaf = leaves[entry.piece.parameter].detach().requires_grad_()
                leaf.register_post_accumulate_grad_hook(collect)
                leaves[entry.piece.parameter] = leaf
        return leaves

    def add_gradient(self, parameter: str, gradient: torch.Tensor) -> None:
        """Add to the gradient of a whole parameter whose block is being visited backward."""
        (at,) = self.parameters.locations(parameter)
        state = self.store[at.block]
        if self._collects(state.record.entries[at.index]):
            self.store.gradients.add(state, at.index, gradient)

    def gradient_sum(self, block: str, parameter: str) -> torch.Tensor | None:
        """The sum of the rows of `parameter` in `block`, to be added to; None where it is frozen."""
        state = self.store[block]
        for index, entry in enumerate(state.record.entries):
            if entry.piece.parameter == parameter and self._collects(entry):
                total = self.store.gradients.sum_of(state, index)
                self.store.gradients.is_changing(state, index)
                if index not in state.summed:
                    total.zero_()
                    state.summed.add(index)
                return total
        return None

    def _collects(self, entry: Entry) -> bool:
        return entry.trainable and self.parameters[entry.piece.parameter].requires_grad

    def keeps_graphs(self, blocks: Sequence[str]) -> bool:
        """Whether a visit to `blocks` keeps its graph for the backward."""
        placement = self.budget.placement
        return placement is not None and placement.kept.issuperset(blocks) and self.stepdown.keeps_graphs

    def _evict(self) -> bool:
        """Move a block that stays on the device to the host's memory, if that has room; False where none can be moved."""
        executor, budget = self.executor, self.budget
        if executor is None or self.device.is_host:
            return False
        chosen = executor.evict(
            lambda state: (
                state.name not in budget.always_resident
                and budget.has_room_for(sum(each.num_bytes for each in state.resident.values()))
            )
        )
        if chosen is None:
            return False
        budget.placement = executor.store.placement
        self.stepdown.keeps_graphs = False  # a graph's weights stay where they are
        num_bytes = sum(region.num_bytes for region in chosen.hosted.values())
        self.stepdown.note(f"{chosen.name} stays in the host's memory, {format_bytes(num_bytes)}")
        return True

    # -- what the optimizer asks for -----------------------------------------------------------------------------

    def set_rule(
        self,
        rule: Rule,
        kernel: Callable[[ComputeType], Kernel],
        device_kernel: Callable[[ComputeType], Kernel] | None = None,
    ) -> None:
        """Lay records out for `rule` from now on; refused once gradients exist.

        `kernel` gives what runs on the host, `device_kernel` what runs where blocks compute (the same, where that is the
        host), for records of a compute type.
        """
        if self.executor is not None:
            if self.rule is not None or any(state.has_gradient for state in self.store):
                raise UsageError(
                    "the model has an optimizer or gradients already",
                    hint="create the optimizer once, before the first backward()",
                )
            self.close()
        self.rule, self.kernel, self.device_kernel = rule, kernel, device_kernel or kernel

    def own_source(self) -> Source:
        """Where weights come from that were never updated."""
        assert self.source is not None, "the source is gone"
        return self.source

    # -- what a commit asks for ----------------------------------------------------------------------------------

    def live_in(self, versions: CommitStore | None) -> None:
        """Keep all records in a store, from the first call on; None: in scratch space, as ever."""
        self.versions = versions
        self._change_settings(replace(self.settings, commits=versions.commits if versions is not None else 0))

    def _change_settings(self, settings: Settings) -> None:
        self.settings = settings
        self.budget.change_settings(settings)

    def keep_tiles(self, rows: int) -> bool:
        """Compute `rows` rows of a batch at once, as an earlier process did; False where a pin says otherwise."""
        pins = self.settings.pins
        if pins.tile_rows is None:
            self._change_settings(replace(self.settings, pins=replace(pins, tile_rows=rows)))
        return self.settings.pins.tile_rows == rows

    @property
    def loss_tile_elements(self) -> int | None:
        """Elements of a tile of logits; None where the model has no head."""
        return min((each.tile_elements for each in self._heads()), default=None)

    @loss_tile_elements.setter
    def loss_tile_elements(self, num_elements: int) -> None:
        for each in self._heads():
            each.tile_elements = num_elements

    def _heads(self) -> list[Head]:
        return [point for point in self.points.values() if isinstance(point, Head)]

    # -- settling ------------------------------------------------------------------------------------------------

    @property
    def store(self) -> BlockStore:
        """The blocks. Raises UsageError before the first call."""
        return self.running.store

    @property
    def running(self) -> Executor:
        """What visits blocks. Raises UsageError before the first call."""
        if self.executor is None:
            raise UsageError(
                "a part of the model runs before the model was called", hint="call the whole model once first"
            )
        return self.executor

    def compute_type(self, block: str) -> ComputeType:
        """What a block computes in."""
        is_full = block in self.cut.full_precision
        return ComputeType.FLOAT32 if is_full else self.settings.compute_type

    def dtype_of(self, parameter: str) -> torch.dtype:
        """What a parameter computes in."""
        return torch.float32 if parameter in self._full_precision else self.dtype

    def trained_types(self) -> set[ComputeType]:
        """The types of the blocks that train."""
        return {self.compute_type(block.name) for block in self.cut.blocks if self.trains((block.name,))}

    def _lay_out(self, rehearsal: Rehearsal) -> list[Record]:
        """Records of all blocks, for the rule and for what is trainable now."""
        visited = Counter(v.block for v in rehearsal.visits if v.direction is Direction.FORWARD)
        records = []
        for block in self.cut.blocks:
            trainable = [self.parameters[piece.parameter].requires_grad for piece in block.pieces]
            state: tuple[Plane, ...] = ()
            compute_type = self.compute_type(block.name)
            size = DTYPES[compute_type].itemsize
            sizes: dict[Plane, int | Fraction] = {Plane.WEIGHT: size, Plane.GRADIENT: size}
            if self.rule is not None:
                state = self.rule.state(compute_type)
                sizes |= self.rule.element_bytes(compute_type)
            if visited[block.name] > 1:
                sizes[Plane.GRADIENT] = 4  # summed over visits: rounded once, when the update reads it
            records.append(Record.lay_out(block, trainable, state, sizes))
        return records

    def _reading_bytes(self, records: Sequence[Record]) -> int:
        return reading_bytes(self.own_source(), records, is_host=self.device.is_host)

    def decide(
        self, rehearsal: Rehearsal, shape: BatchShape, cached: tuple[Rehearsal, BatchShape] | None = None
    ) -> tuple[list[Record], Placement]:
        """Lay records out and place them, for calls of this shape; those that are to be fast are these, or `cached`, which
        go on with a cache. Raises BudgetError where they do not fit.
        """
        records = self._lay_out(rehearsal)
        foresight = None
        if self.profile is not None and cached is not None:
            foresight = self.foresight(self.profile, *cached, records).uncut(cached[1].rows or 1)
        elif self.profile is not None:
            foresight = self.foresight(self.profile, rehearsal, shape, records)
        return records, self.budget.place(records, rehearsal, shape, foresight)

    def fits(self, rehearsal: Rehearsal, shape: BatchShape) -> bool:
        """Whether calls of this shape fit, with something to spare; nothing is decided."""
        return self.budget.fits(self._lay_out(rehearsal), rehearsal, shape)

    def foresight(
        self, profile: Profile, rehearsal: Rehearsal, shape: BatchShape, records: Sequence[Record]
    ) -> Foresight:
        """What plans for calls of this shape are compared with; blocks are timed once for each size of tile."""

        def costs(tile_rows: int) -> Costs:
            key = rehearsal, shape, tile_rows
            if key not in self._costs:
                self._costs[key] = measure_costs(self, rehearsal, shape, tile_rows, records, profile)
            return self._costs[key]

        return Foresight(profile, costs)

    def settle(self, rehearsal: Rehearsal, shape: BatchShape) -> None:
        """Decide, allocate, and open the disk. Raises BudgetError, having kept nothing, where it does not fit."""
        if self.kernel is not None:
            for kind in self.trained_types():
                self.kernel(kind)  # a compilation ends before the arenas are touched
        records, placement = self.decide(rehearsal, shape)
        updates_there = any(plane is Plane.MOMENT1 for _, plane in placement.resident)
        if self.device_kernel is not None and updates_there and not self.device.is_host:
            for kind in self.trained_types():
                self.device_kernel(kind)
        store, restored = self._open_store(records, placement)
        self.executor = Executor(store)
        memory.register(store.host_arena, type(self.module).__name__)
        self._finalizer = when_dropped(self, close_workers, *store.workers())
        self.parameters.locate({r.name: [entry.piece for entry in r.entries] for r in records})
        self.blocks = {r.name: Block(r.name, tuple(entry.piece for entry in r.entries)) for r in records}
        try:
            if placement.inputs is not None:
                is_disk = placement.inputs is Home.DISK
                inputs = self._open_scratch("inputs", placement.inputs_bytes) if is_disk else None
                self.keeper = ActivationOffload(self.device, placement.inputs_bytes, inputs)
            if store.snapshots is not None:
                store.snapshots.restore(restored)
            self._forget_committed()
            self._load_resident(store, records)
        except BaseException:
            with suppress(BaseException):  # the first error is the one to report
                self.close()
            raise

    def _open_store(
        self, records: Sequence[Record], placement: Placement
    ) -> tuple[BlockStore, frozenset[str]]:
        """The store of `records` with its disk, and the names of those that are on it from an earlier process."""
        assert self.source is not None
        restored: frozenset[str] = frozenset()
        bases: Mapping[str, int] | None = None
        disk: Tier | None
        if self.versions is None:
            disk_bytes(placement, self.settings)
            disk = self._open_scratch("store", placement.disk_bytes)
        else:
            layout = Layout.of(records, placement)
            disk_bytes(placement, self.settings, layout.num_bytes(self.versions.commits))
            limits = [disk.num_bytes for disk in self.settings.budgets.disks]
            opened = self.versions.open(
                records,
                layout,
                limits=limits,
                verify=self.settings.pins.verify,
                num_threads=self._io_threads,
            )
            disk, restored, bases = opened.tier, opened.restored, layout.bases
        try:
            store = BlockStore(
                records,
                placement,
                source=self.source,
                disk=disk,
                rule=self.rule,
                kernel=self.kernel,
                device=self.device,
                device_kernel=self.device_kernel,
                bases=bases,
                update_threads=self.profile.update_threads if self.profile is not None else None,
            )
        except BaseException:
            if disk is not None:
                disk.close()
            raise
        return store, restored

    def _load_resident(self, store: BlockStore, records: Sequence[Record]) -> None:
        """Start reading what stays in memory; all of it, where the source is memory that should not stay beside it."""
        if isinstance(self.source, EncodingSource):
            stay = {state.name for state in store if {*state.resident, *state.hosted} & {Plane.WEIGHT}}
            if any(name not in stay and self.source.encodes(block) for name, block in self.blocks.items()):
                self.source.pack()
                memory.give_back()
        in_memory = isinstance(self.source, InitSource | TensorSource)
        if self.rule is not None and in_memory and is_stored(records):
            store.import_all(self._touch)
            self.source = None
        else:
            for state in store:
                store.load_resident(state)

    def use_what_is_left(self, needed_bytes: int) -> None:
        """Keep as many weights in memory as a call that takes `needed_bytes` leaves room for."""
        store = self.running.store
        placement = self.budget.with_what_is_left([state.record for state in store], needed_bytes)
        if placement is not None:
            store.keep_pieces(placement)

    def _forget_committed(self) -> None:
        committed, self.committed = self.committed, None
        if committed is not None:
            committed.close()

    def _touch(self, state: BlockState) -> None:
        assert self.executor is not None
        with self.executor.touch(state.name):
            pass

    def _open_scratch(self, what: str, num_bytes: int) -> Tier | None:
        return open_scratch(f"outsize-{self.identity}.{what}", num_bytes, self.settings, self._io_threads)

    @property
    def _io_threads(self) -> int:
        """Threads that move bytes to and from each disk."""
        return (self.profile.io_threads if self.profile is not None else None) or IO_THREADS

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "the weights of this model live in Outsize's store and cannot be copied with it",
            hint="save it with outsize.save and load it again",
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "the weights of this model live in Outsize's store and cannot be pickled",
            hint="use outsize.save(model, path)",
        )

    def check(self) -> None:
        """Refuse a model that was closed, or that was changed since it was opened. Raises UsageError."""
        if self._is_closed:
            raise UsageError("the model was closed, and its weights are gone", hint="load it again")
        self.structure.check(self.module)
        self.parameters.check()

    def forget_costs(self) -> None:
        """Time blocks again, if plans are compared again."""
        self._costs.clear()

    def close(self) -> None:
        """Give memory and disk back. Weights that were updated or taken over are gone: save them before."""
        executor, self.executor, self.budget.placement = self.executor, None, None
        keeper, self.keeper = self.keeper, None
        with ExitStack() as stack:  # the last callback runs first, and all run, whatever one of them raises
            if self.versions is not None:
                stack.callback(self.versions.close)
            if executor is not None:
                self._finalizer.detach()
                self._is_closed = self.source is None or any(state.is_stored for state in executor.store)
                stack.callback(executor.close)
            if keeper is not None:
                stack.callback(keeper.close)
            if executor is not None and self.versions is not None:
                assert executor.store.snapshots is not None
                stack.callback(self.versions.is_closing)
                stack.callback(executor.store.snapshots.finish)
            stack.callback(self._forget_committed)


def backward_visits(session: Session, blocks: Sequence[str], needs_weights: bool) -> list[Visit]:
    """The visits that a point makes in backward."""
    return [
        Visit(
            name,
            Direction.BACKWARD,
            needs_weights,
            trains=session.trains((name,)),
            joins_next=name != blocks[-1],
        )
        for name in blocks
    ]


def _never_streamed(cut: Cut) -> frozenset[str]:
    """Blocks that stay in memory: two that are visited at once would need two slots of every class.

    Of a layer with a block of its own and one of fp32 parameters, the latter stays.
    """
    uses = Counter(name for point in cut.points for name in point.blocks)
    found: set[str] = set()
    for point in cut.points:
        if point.kind in (PointKind.LAYER, PointKind.LOOSE) and len(point.blocks) > 1:
            own = [name for name in point.blocks if name not in cut.full_precision]
            streams = len(own) == 1 and uses[own[0]] == 1
            found |= {name for name in point.blocks if not streams or name != own[0]}
    return frozenset(found)


def _with_signature(handler: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`handler` as a function with the signature of `original`: transformers and Trainer inspect it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with outside_inference_mode():
            return handler(*args, **kwargs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward
