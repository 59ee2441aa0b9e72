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
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from outsize.block import Block, Entry, Piece, Plane, Record
from outsize.config import Home, OnDeviceFull, Settings, format_bytes
from outsize.engine import memory
from outsize.engine.batch import BatchDims, Tile, tiles
from outsize.engine.blocks import DTYPES, BlockState, BlockStore, close_workers, reading_bytes
from outsize.engine.budget import Budget, Foresight, disk_bytes
from outsize.engine.closing import when_dropped
from outsize.engine.compiled import Compiler
from outsize.engine.embedding import Embedding
from outsize.engine.executor import Executor
from outsize.engine.guard import Guard
from outsize.engine.head import Head, Logits, TiledLoss
from outsize.engine.keep import Keeper
from outsize.engine.layer import Layer, Loose
from outsize.engine.placeholder import GradientPlaceholder, OffloadedParameter
from outsize.engine.probe import BatchShape, Probe, Rehearsal, batch_shape, rehearse
from outsize.engine.stepdown import StepDown
from outsize.engine.timing import measure_costs
from outsize.engine.versions import Layout, Versions
from outsize.errors import BudgetError, UsageError
from outsize.model import (
    Cut,
    EncodingSource,
    InitSource,
    Point,
    PointKind,
    Source,
    TensorSource,
    attention_of,
    merges_rows,
)
from outsize.optim import Kernel, Rule, split
from outsize.plan import Direction, Placement, Visit, is_stored
from outsize.plan.profile import Profile
from outsize.plan.simulate import Costs
from outsize.tier import IO_THREADS, Device, DiskTier, HostDevice, StripedTier, Tier
from outsize.tier.striped import part_bytes

if TYPE_CHECKING:
    AnyPoint = Layer | Loose | Embedding | Head

_log = logging.getLogger(__name__)

_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""A module's hooks hold its session; the registry holds neither, so that both go when the module is dropped."""


def session_of(module: nn.Module) -> Session:
    """The session of a model that was loaded or wrapped; raises UsageError for any other."""
    session = find_session(module)
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


@dataclass(frozen=True, slots=True)
class Location:
    """Entry `index` of `block` holds rows `[start, stop)` of a parameter (all of it where `rows` is None)."""

    block: str
    index: int
    rows: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the root module, forward and backward; each of its visits takes `visit_bytes` at most."""

    rehearsal: Rehearsal
    shape: BatchShape
    tile_rows: int
    visit_bytes: int
    is_row_by_row: bool = False
    """Whether a visit of several rows at once would be wrong."""


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
        self.anchor = torch.zeros((), requires_grad=True, device=self.torch_device)
        self.handles: list[Logits] = []
        self._host_copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.has_labels = False
        self.probe: Probe | None = None
        self.rule: Rule | None = None
        self.kernel: Callable[[], Kernel] | None = None
        self.device_kernel: Callable[[], Kernel] | None = None
        self.executor: Executor | None = None
        self.versions: Versions | None = None
        """Where records are kept beyond the process, if they are."""
        self.committed: Source | None = None
        """What the commit holds that the session will start from; until it does."""
        self.keeper: Keeper | None = None
        self.stepdown = StepDown(settings.on_device_full is OnDeviceFull.RETRY, self.device)
        self.stepdown.evict = self._evict
        self.compiler = Compiler(bool(settings.compile))
        self._is_closed = False
        self._kept_whole: set[str] = set()
        self.identity = uuid.uuid4().hex
        free_host_bytes = memory.available_bytes
        if self.torch_device.type == "meta" and profile is not None:
            free_host_bytes = partial(int, profile.host_bytes)
        self.budget = Budget(
            settings, _never_streamed(cut), self.device, self._reading_bytes, free_host_bytes
        )
        self._call: _Call | None = None
        self.last_training_call: _Call | None = None
        self._forward_order: list[Visit] = []
        self._rehearsals: dict[tuple[Any, ...], Rehearsal] = {}
        self._costs: dict[tuple[int, BatchShape, int], Costs] = {}
        self._blocks = {block.name: block for block in cut.blocks}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._records: dict[str, Record] = {}
        self._locations: dict[str, list[Location]] = {}
        self._locate({block.name: block.pieces for block in cut.blocks})
        self.parameters = self._take_parameters()
        self._install()
        _sessions[module] = weakref.ref(self)

    # -- taking the model over -----------------------------------------------------------------------------------

    def _locate(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._locations = {}
        for block, members in pieces.items():
            for index, piece in enumerate(members):
                rows = None if piece.is_whole else (piece.row_start or 0, piece.row_stop or 0)
                self._locations.setdefault(piece.parameter, []).append(Location(block, index, rows))
        for locations in self._locations.values():
            locations.sort(key=lambda location: location.rows or (0, 0))

    def _take_parameters(self) -> dict[str, OffloadedParameter]:
        placeholders: dict[str, OffloadedParameter] = {}
        for name, parameter in self.module.named_parameters():
            placeholders[name] = OffloadedParameter.of(
                parameter,
                name,
                self.dtype,
                self.torch_device,
                fetch=partial(self.value, name),
                get_gradient=partial(self.gradient, name),
                drop_gradient=partial(self.drop_gradient, name),
            )
        self._owned: list[tuple[dict[str, Any], str, OffloadedParameter]] = []
        by_identity = {
            id(parameter): placeholders[name] for name, parameter in self.module.named_parameters()
        }
        for owner in self.module.modules():
            for attribute, owned in owner._parameters.items():
                if owned is not None:
                    placeholder = by_identity[id(owned)]
                    owner._parameters[attribute] = placeholder  # type: ignore[assignment]
                    self._owned.append((owner._parameters, attribute, placeholder))
        return placeholders

    def _install(self) -> None:
        self.points: dict[str, AnyPoint] = {}
        for point in self.cut.points:
            module = self.module.get_submodule(point.module)
            self.points[point.module] = handler = self._handler(point, module)
            # An instance attribute shadows the method, as accelerate does; the class stays as it is.
            module.forward = _with_signature(handler, module.forward)
        self.forward: Callable[..., Any] = self.module.forward
        self._move_buffers()
        self._has_cache_switch = _has_cache_switch(self.module)
        self._merges_rows = merges_rows(self.module)
        self.module.register_forward_pre_hook(self._before_call, with_kwargs=True, prepend=True)
        self.module.register_forward_hook(self._after_call, with_kwargs=True, always_call=True)
        encoder = _encoder_of(self.module)
        if encoder is not None:
            encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        original = getattr(self.module, "loss_function", None)
        if original is ForCausalLMLoss:
            self.module.loss_function = TiledLoss(original)  # type: ignore[assignment]

    def _move_buffers(self) -> None:
        """Buffers belong to no block: they stay where blocks compute."""
        for owner in self.module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.device != self.torch_device:
                    owner._buffers[name] = buffer.to(self.torch_device)

    def _handler(self, point: Point, module: nn.Module) -> AnyPoint:
        blocks = [self._blocks[name] for name in point.blocks]
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

    # -- the running call ----------------------------------------------------------------------------------------

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.probe is not None:
            return None
        if torch.compiler.is_compiling():
            raise UsageError(
                "torch.compile cannot trace a model that lives in Outsize's store",
                hint="call the model as it is: leave out torch.compile, or torch_compile of TrainingArguments",
            )
        self._check_parameters()
        kwargs = dict(kwargs)
        cache = kwargs.get("past_key_values")
        has_labels = kwargs.get("labels") is not None
        if torch.is_grad_enabled() and cache is not None:
            raise UsageError(
                "past_key_values with gradients on: recomputation would append to the cache a second time",
                hint="call the model under torch.no_grad(), or without a cache",
            )
        plain = torch.is_grad_enabled() or (has_labels and cache is None)
        if self._has_cache_switch and plain:
            kwargs["use_cache"] = False
        uses_cache = self._has_cache_switch and kwargs.get("use_cache") is not False
        self.has_labels = has_labels
        signature = self._signature(args, kwargs, uses_cache)
        shape = batch_shape(module, args, kwargs)
        rehearsal = self._rehearsals.get(signature)
        if uses_cache and self._merges_rows and _is_packed(kwargs) and shape.rows != 1:
            raise _packed_error(attention_of(module))
        if uses_cache and self.executor is not None:
            # A cache grows with every call; the order of visits is that of a call without.
            self._call = None
            self.executor.begin(self._forward_order)
            return self.moved(args, kwargs)
        if rehearsal is None or shape.row_elements > rehearsal.row_elements:
            plain_kwargs = {**kwargs, **_uncached(kwargs)} if uses_cache else kwargs
            rehearsal = self._rehearsals[signature] = rehearse(self, args, plain_kwargs, shape)
            self._forward_order = [v for v in rehearsal.visits if v.direction is Direction.FORWARD]
        if self.executor is None:
            needed = rehearsal
            if self.rule is not None and not torch.is_grad_enabled():
                with torch.enable_grad():  # room for training, which comes
                    needed = rehearse(self, args, {**kwargs, **_uncached(kwargs)}, shape)
            self._settle(needed, shape)
        assert self.executor is not None
        tile_rows = self.budget.begin_call(rehearsal, shape)
        is_row_by_row = self._merges_rows and _is_packed(kwargs)
        if is_row_by_row:
            tile_rows = 1
        self._call = _Call(rehearsal, shape, tile_rows, self.budget.visit_bytes, is_row_by_row)
        if torch.is_grad_enabled():
            self.last_training_call = self._call
        self.executor.begin(rehearsal.visits)
        if self.keeper is not None:
            self.keeper.begin()
        return self.moved(args, kwargs)

    def settle_for(self, kwargs: dict[str, Any]) -> None:
        """Place and allocate for calls like this one, which is not made. Raises BudgetError where they do not fit, having
        kept nothing of their arguments."""
        try:
            self._before_call(self.module, (), kwargs)
        except BudgetError:
            self._rehearsals.clear()
            self._costs.clear()
            raise
        finally:
            self._after_call(self.module, (), kwargs, None)

    def read_ahead(self) -> None:
        """Start reading what a call like the last one needs first, beside what its caller does meanwhile."""
        if self.executor is not None and self._call is not None:
            self.executor.begin(self._call.rehearsal.visits)

    def _before_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Settle for the whole model where `generate` runs the encoder alone before the model was ever called.

        What is rehearsed is the call that follows: the encoder's arguments, and one token for the decoder.
        """
        if self.executor is not None or self.probe is not None or args or torch.is_grad_enabled():
            return
        rows = next((value.shape[0] for value in kwargs.values() if isinstance(value, torch.Tensor)), 1)
        first = torch.zeros(rows, 1, dtype=torch.long, device=self.torch_device)
        self.settle_for({**kwargs, "decoder_input_ids": first, "use_cache": False})

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.probe is not None:
            return
        for handle in self.handles:
            handle.seal()
        self.handles.clear()
        self.has_labels = False
        self._host_copies.clear()

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments where blocks compute; what they were on the host is kept while the call runs."""
        self._host_copies.clear()
        if self.torch_device.type == "cpu":
            return args, kwargs

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = self.on_device(tensor)
            if moved is not tensor and tensor.device.type == "cpu":
                self._host_copies[id(moved)] = (moved, tensor)
            return moved

        moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(torch.Tensor, move, (args, kwargs))
        return moved

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` where blocks compute; what comes from the host is sent ahead, and nothing waits for it."""
        if tensor.device.type == self.torch_device.type:
            return tensor
        pinned = (
            tensor.pin_memory()
            if self.torch_device.type == "cuda" and tensor.device.type == "cpu"
            else tensor
        )
        return pinned.to(self.torch_device, non_blocking=True)

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` where the host can read it: an argument of the running call as it came, else a copy, which is waited
        for."""
        if tensor.device.type == "cpu":
            return tensor
        known = self.known_on_host(tensor)
        return known if known is not None else tensor.cpu()

    def known_on_host(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """`tensor` as it came from the host, where it is an argument of the running call or another view of one."""
        own = tensor if tensor._base is None else tensor._base
        moved, known = self._host_copies.get(id(own), (None, None))
        if known is None or moved is not own or known.shape.numel() != tensor.numel():
            return None
        if not moved.is_inference() and moved._version:
            return None  # the model changed its copy
        return known.view(tensor.shape) if tensor.is_contiguous() and known.is_contiguous() else None

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any], uses_cache: bool) -> tuple[Any, ...]:
        """What decides the order of visits and the batch dimensions: everything but sizes."""

        def describe(value: Any, name: str = "") -> Any:
            if isinstance(value, torch.Tensor):
                # Models leave a mask out that masks nothing: layers are then given one tensor less.
                masks = False
                if value.dim() == 2 and value.dtype in (torch.bool, torch.long):
                    # Positions that begin anew within a row stand for packed documents, which need a mask.
                    is_position = name == "position_ids"
                    masks = bool((value.diff() != 1).any() if is_position else (value == 0).any())
                return value.dim(), value.dtype, masks
            return type(value).__name__ if isinstance(value, Cache) else repr(value)[:80]

        trains = tuple(parameter.requires_grad for parameter in self.parameters.values())
        return (
            torch.is_grad_enabled(),
            self.module.training,
            uses_cache,
            hash(trains),
            tuple(map(describe, args)),
            tuple(sorted((key, describe(value, key)) for key, value in kwargs.items() if value is not None)),
        )

    # -- what points ask for -------------------------------------------------------------------------------------

    def trains(self, blocks: Sequence[str]) -> bool:
        """Whether any parameter in `blocks` requires grad."""
        return any(
            self.parameters[piece.parameter].requires_grad
            for name in blocks
            for piece in self._blocks[name].pieces
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
        return tuple(self._store[name].num_steps for name in blocks)

    def entry_pieces(self, blocks: Sequence[str]) -> list[Piece]:
        """The pieces of `blocks`."""
        return [piece for name in blocks for piece in self._blocks[name].pieces]

    def row_blocks(self, parameter: str) -> list[tuple[str, int, int]]:
        """`(block, first row, last row)` of a table, in order."""
        rows = self._shapes[parameter][0]
        return [(at.block, *(at.rows or (0, rows))) for at in self._locations[parameter]]

    def gives_rows(self, parameter: str) -> bool:
        """Whether rows of a table can be taken without a visit: nothing trains, and its source gives them."""
        source = self.source
        return (
            self.versions is None
            and source is not None
            and source.gives_rows(parameter)
            and not any(each.requires_grad for each in self.parameters.values())
            and not (self.executor is not None and any(state.is_stored for state in self.executor.store))
        )

    def take_rows(self, block: str, parameter: str, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` with sorted rows, counted from the first of `block`, of a table that `gives_rows`."""
        index = next(at.index for at in self._locations[parameter] if at.block == block)
        self._store.take_rows(self._store[block], index, rows, target)

    @contextmanager
    def visit(
        self, blocks: Sequence[str], direction: Direction, *, as_leaves: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The parameters in `blocks` by name: as plain views, or as leaves of a graph that outlives the visit."""
        values_of = self._leaves if as_leaves else self._values
        visits = [Visit(name, direction, joins_next=name != blocks[-1]) for name in blocks]
        make_room = partial(self.budget.make_room, self.budget.visit_bytes)
        with self.budget.guarded(), self._running.visit(visits, make_room) as states:
            yield {name: value for state in states for name, value in values_of(state).items()}

    @contextmanager
    def visit_backward(
        self, blocks: Sequence[str], *, needs_weights: bool = True
    ) -> Iterator[dict[str, torch.Tensor]]:
        """As `visit`; trainable parameters are leaves whose gradients go to the block's sum as they arise."""
        visits = backward_visits(self, blocks, needs_weights)
        # Calls without a graph may have come since, and be smaller.
        call = self.last_training_call
        visit_bytes = self.budget.visit_bytes if call is None else call.visit_bytes
        make_room = partial(self.budget.make_room, visit_bytes)
        with self.budget.guarded(), self._running.visit(visits, make_room) as states:
            yield {
                name: value
                for state in states
                for name, value in (self._leaves(state) if needs_weights else {}).items()
            }

    def _values(self, state: BlockState) -> dict[str, torch.Tensor]:
        views = self._store.pieces(state)
        return {e.piece.parameter: view for e, view in zip(state.record.entries, views, strict=True)}

    def _leaves(self, state: BlockState) -> dict[str, torch.Tensor]:
        leaves = self._values(state)
        for index, entry in enumerate(state.record.entries):
            if self._collects(entry):

                def collect(leaf: torch.Tensor, index: int = index, entry: Entry = entry) -> None:
                    gradient, leaf.grad = leaf.grad, None
                    assert gradient is not None
                    if self._collects(entry):  # still: a kept graph is older than its backward
                        add = partial(self._store.add_gradient, state, index, gradient)
                        self.stepdown.add((state.name, index), add)

                leaf = leaves[entry.piece.parameter].detach().requires_grad_()
                leaf.register_post_accumulate_grad_hook(collect)
                leaves[entry.piece.parameter] = leaf
        return leaves

    def add_gradient(self, parameter: str, gradient: torch.Tensor) -> None:
        """Add to the gradient of a whole parameter whose block is being visited backward."""
        (at,) = self._locations[parameter]
        state = self._store[at.block]
        if self._collects(state.record.entries[at.index]):
            self._store.add_gradient(state, at.index, gradient)

    def gradient_sum(self, block: str, parameter: str) -> torch.Tensor | None:
        """The sum of the rows of `parameter` in `block`, to be added to; None where it is frozen."""
        state = self._store[block]
        for index, entry in enumerate(state.record.entries):
            if entry.piece.parameter == parameter and self._collects(entry):
                total = self._store.gradient_sum(state, index)
                if index not in state.summed:
                    total.zero_()
                    state.summed.add(index)
                return total
        return None

    def keep_whole(self, point: Point) -> tuple[Tile, ...]:
        """Never tile `point` again; the one tile it runs as."""
        self._kept_whole.add(point.module)
        return (Tile(0, 1, 1),)

    def _collects(self, entry: Entry) -> bool:
        return entry.trainable and self.parameters[entry.piece.parameter].requires_grad

    def keeps_graphs(self, blocks: Sequence[str]) -> bool:
        """Whether a visit to `blocks` keeps its graph for the backward."""
        placement = self.budget.placement
        return placement is not None and placement.kept.issuperset(blocks) and self.stepdown.keeps_graphs

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of the running call's batch."""
        return 1 if self._call is None else self._call.shape.row_tokens

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

    def shrink_tiles(self, rows: int, row_tokens: int) -> None:
        """Compute at most `rows` rows at once from now on, of `row_tokens` each; in calls to come, as many tokens."""
        before = 0
        for call in (self._call, self.last_training_call):
            if call is not None and call.tile_rows > rows:
                before = call.tile_rows
        self._call = _with_tiles(self._call, rows)
        self.last_training_call = _with_tiles(self.last_training_call, rows)
        self.budget.shrink_tiles(rows * row_tokens)
        if before:
            self.stepdown.note(f"blocks compute {rows} rows at once instead of {before}")

    def tiles(
        self, layer: Layer, tensors: Sequence[torch.Tensor]
    ) -> tuple[BatchDims | None, tuple[Tile, ...]]:
        """How the running call's batch is cut for `layer`; one tile where the batch dimension is not known."""
        dims, parts = self._tiles(layer, tensors)
        if self._call is not None and self._call.is_row_by_row and self._call.shape.rows != len(parts):
            raise _packed_error(attention_of(self.module))
        return dims, parts

    def _tiles(
        self, layer: Layer, tensors: Sequence[torch.Tensor]
    ) -> tuple[BatchDims | None, tuple[Tile, ...]]:
        current = self._call
        whole = (Tile(0, 1, 1),)
        if current is None or current.shape.rows is None:
            return None, whole
        dims, rows = current.rehearsal.dims.get(layer.point.module), current.shape.rows
        if layer.point.module in self._kept_whole:
            return None, whole
        if dims is None or (layer.has_batch_statistics and layer.module.training):
            return None, whole
        if all(dim is None for dim in dims.inputs):
            return None, whole  # nothing of the batch enters
        fits = len(dims.inputs) == len(tensors) and all(
            dim is None or (dim < tensor.dim() and tensor.shape[dim] % rows == 0)
            for dim, tensor in zip(dims.inputs, tensors, strict=True)
        )
        return (dims, tuple(tiles(rows, current.tile_rows))) if fits else (None, whole)

    # -- what placeholders and the optimizer ask for -------------------------------------------------------------

    def value(self, parameter: str) -> torch.Tensor:
        """A copy of a parameter's current value."""
        parts = [self.piece_value(at) for at in self._locations[parameter]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def piece_value(self, at: Location) -> torch.Tensor:
        """A copy of one piece's current value."""
        if self.executor is None:
            piece = self._blocks[at.block].pieces[at.index]
            exact = torch.empty(piece.shape, dtype=torch.float32)
            source = self.committed or self.own_source()
            source.read(Block(at.block, (piece,)), [exact])
            value = exact if self.dtype is torch.float32 else split(exact.view(-1))[0].view(piece.shape)
            return value.to(self.torch_device)
        with self.executor.touch(at.block) as state:
            return self._store.pieces(state)[at.index].clone()

    def own_source(self) -> Source:
        """Where weights come from that were never updated."""
        assert self.source is not None, "the source is gone"
        return self.source

    def block_values(self, block: Block) -> list[torch.Tensor]:
        """Copies of the current values of all pieces of a block of the cut."""
        if self.executor is None:
            return [self.piece_value(self._place_of(piece)) for piece in block.pieces]
        with self.executor.touch(block.name) as state:
            views = {e.piece: v for e, v in zip(state.record.entries, self._store.pieces(state), strict=True)}
            return [views[piece].clone() for piece in block.pieces]

    def _place_of(self, piece: Piece) -> Location:
        rows = None if piece.is_whole else (piece.row_start or 0, piece.row_stop or 0)
        return next(at for at in self._locations[piece.parameter] if at.rows == rows)

    def gradient(self, parameter: str) -> torch.Tensor | None:
        """What stands for the parameter's gradient, or None."""
        if self.executor is None or not any(g.present for g in self._gradients(parameter)):
            return None
        return GradientPlaceholder.of(
            self.parameters[parameter],
            f"{parameter}.grad",
            fetch=lambda: self._gradient_value(parameter),
            norm=lambda: self._gradient_norm(parameter),
            scale_by=lambda factor: self._scale_gradient(parameter, factor),
        )

    def drop_gradient(self, parameter: str) -> None:
        """Forget the parameter's gradient."""
        if self.executor is not None:
            for gradient in self._gradients(parameter):
                gradient.present, gradient.scale = False, 1.0

    def _gradients(self, parameter: str) -> list[Any]:
        return [self._store[at.block].gradients[at.index] for at in self._locations[parameter]]

    def _gradient_norm(self, parameter: str) -> float:
        self._store.settle_norms()
        return float(sum(g.sum_of_squares * g.scale**2 for g in self._gradients(parameter)) ** 0.5)

    def _scale_gradient(self, parameter: str, factor: float) -> None:
        for gradient in self._gradients(parameter):
            gradient.scale *= factor

    def _gradient_value(self, parameter: str) -> torch.Tensor:
        parts = []
        for at in self._locations[parameter]:
            state = self._store[at.block]
            parts.append(self._store.gradient_value(state, at.index) * state.gradients[at.index].scale)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def locations(self, parameter: str) -> Sequence[Location]:
        """Where a parameter's pieces are."""
        return self._locations[parameter]

    def set_rule(
        self, rule: Rule, kernel: Callable[[], Kernel], device_kernel: Callable[[], Kernel] | None = None
    ) -> None:
        """Lay records out for `rule` from now on; refused once gradients exist.

        `kernel` runs on the host, `device_kernel` where blocks compute (the same, where that is the host).
        """
        if self.executor is not None:
            if self.rule is not None or any(state.has_gradient for state in self._store):
                raise UsageError(
                    "the model has an optimizer or gradients already",
                    hint="create the optimizer once, before the first backward()",
                )
            self.close()
        self.rule, self.kernel, self.device_kernel = rule, kernel, device_kernel or kernel

    def rehearse_with_labels(self, kwargs: dict[str, Any], shape: BatchShape) -> Rehearsal:
        """A rehearsal of a call that was not made, with labels."""
        self.has_labels = True
        try:
            return rehearse(self, (), kwargs, shape)
        finally:
            self.has_labels = False
            self.handles.clear()

    # -- what a commit asks for ----------------------------------------------------------------------------------

    def live_in(self, versions: Versions | None) -> None:
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
    def _store(self) -> BlockStore:
        return self._running.store

    @property
    def _running(self) -> Executor:
        if self.executor is None:
            raise UsageError(
                "a part of the model runs before the model was called", hint="call the whole model once first"
            )
        return self.executor

    def _lay_out(self, rehearsal: Rehearsal) -> list[Record]:
        """Records of all blocks, for the rule and for what is trainable now."""
        visited = Counter(v.block for v in rehearsal.visits if v.direction is Direction.FORWARD)
        size = self.dtype.itemsize
        records = []
        for block in self.cut.blocks:
            trainable = [self.parameters[piece.parameter].requires_grad for piece in block.pieces]
            state: tuple[Plane, ...] = ()
            sizes: dict[Plane, int | Fraction] = {Plane.WEIGHT: size, Plane.GRADIENT: size}
            if self.rule is not None:
                state = self.rule.state(self.settings.compute_type)
                sizes |= self.rule.element_bytes(self.settings.compute_type)
            if visited[block.name] > 1:
                sizes[Plane.GRADIENT] = 4  # summed over visits: rounded once, when the update reads it
            records.append(Record.lay_out(block, trainable, state, sizes))
        return records

    def _reading_bytes(self, records: Sequence[Record]) -> int:
        return reading_bytes(self.own_source(), records, self.dtype)

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
            key = id(rehearsal), shape, tile_rows
            if key not in self._costs:
                self._costs[key] = measure_costs(self, rehearsal, shape, tile_rows, records, profile)
            return self._costs[key]

        return Foresight(profile, costs)

    def _settle(self, rehearsal: Rehearsal, shape: BatchShape) -> None:
        """Decide, allocate, and open the disk. Raises BudgetError, having kept nothing, where it does not fit."""
        if self.kernel is not None:
            self.kernel()  # a compilation ends before the arenas are touched
        records, placement = self.decide(rehearsal, shape)
        updates_there = any(plane is Plane.MOMENT1 for _, plane in placement.resident)
        if self.device_kernel is not None and updates_there and not self.device.is_host:
            self.device_kernel()
        assert self.source is not None
        restored: frozenset[str] = frozenset()
        bases: Mapping[str, int] | None = None
        disk: Tier | None
        if self.versions is None:
            disk_bytes(placement, self.settings)
            disk = self._open_disk("store", placement.disk_bytes)
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
                compute_type=self.settings.compute_type,
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
        self.executor = Executor(store)
        self._finalizer = when_dropped(self, close_workers, *store.workers())
        self._locate({r.name: [entry.piece for entry in r.entries] for r in records})
        self._blocks = {r.name: Block(r.name, tuple(entry.piece for entry in r.entries)) for r in records}
        try:
            if placement.inputs is not None:
                is_disk = placement.inputs is Home.DISK
                inputs = self._open_disk("inputs", placement.inputs_bytes) if is_disk else None
                self.keeper = Keeper(self.device, placement.inputs_bytes, inputs)
            if store.captures is not None:
                store.captures.restore(restored)
            self._forget_committed()
            if isinstance(self.source, EncodingSource) and any(
                group.blocks for group in placement.weight_classes
            ):
                _log.warning(
                    "weights are encoded anew each time they are read, as they do not all fit into memory: "
                    "`outsize quantize` writes them once"
                )
            in_memory = isinstance(self.source, InitSource | TensorSource)
            if self.rule is not None and in_memory and is_stored(records):
                store.import_all(self._touch)
                self.source = None
            else:
                for state in store:
                    store.load_resident(state)
        except BaseException:
            with suppress(BaseException):  # the first error is the one to report
                self.close()
            raise

    def _forget_committed(self) -> None:
        if self.committed is not None:
            self.committed.close()
            self.committed = None

    def _touch(self, state: BlockState) -> None:
        assert self.executor is not None
        with self.executor.touch(state.name):
            pass

    @property
    def _io_threads(self) -> int:
        """Threads that move bytes to and from each disk."""
        return (self.profile.io_threads if self.profile is not None else None) or IO_THREADS

    def _open_disk(self, what: str, num_bytes: int) -> Tier | None:
        if not num_bytes:
            return None
        folders = [disk.folder for disk in self.settings.budgets.disks]
        verify = self.settings.pins.verify

        def open_one(folder: Path, size: int) -> Tier:
            return DiskTier(
                folder,
                size,
                name=f"outsize-{self.identity}.{what}",
                verify=verify,
                anonymous=True,
                num_threads=self._io_threads,
            )

        if len(folders) == 1:
            return open_one(folders[0], num_bytes)
        opened: list[Tier] = []
        try:
            for folder in folders:
                opened.append(open_one(folder, part_bytes(num_bytes, len(folders))))
        except BaseException:
            for tier in opened:
                tier.close()
            raise
        return StripedTier(opened, num_bytes)

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

    def close(self) -> None:
        """Give memory and disk back. Weights that were updated or taken over are gone: save them before."""
        executor, self.executor, self.budget.placement = self.executor, None, None
        keeper, self.keeper = self.keeper, None
        self._forget_committed()
        with ExitStack() as stack:
            if self.versions is not None:
                stack.callback(self.versions.close)
            if executor is not None:
                if self.versions is not None:
                    assert executor.store.captures is not None
                    executor.store.captures.finish()
                    self.versions.is_closing()
                self._finalizer.detach()
                self._is_closed = self.source is None or any(state.is_stored for state in executor.store)
                stack.callback(executor.close)
            if keeper is not None:
                stack.callback(keeper.close)

    def _check_parameters(self) -> None:
        """Refuse to run with parameters that are no longer ours, or that train without a place for gradients."""
        if self._is_closed:
            raise UsageError("the model was closed, and its weights are gone", hint="load it again")
        for parameters, attribute, placeholder in self._owned:
            if parameters.get(attribute) is not placeholder:
                raise UsageError(
                    f"a parameter was put in the place of {placeholder._label}: it would not be used",
                    hint="change weights before outsize.wrap, or save, change and load again",
                )
        if self.executor is None:
            return
        for name, parameter in self.parameters.items():
            at = self._locations[name][0]
            if parameter.requires_grad and not self._store[at.block].record.entries[at.index].trainable:
                raise UsageError(
                    f"{name} (in block {at.block}) requires grad now, but had no gradient when memory was laid out",
                    hint="set requires_grad before the first call of the model",
                )


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


def _is_packed(kwargs: Mapping[str, Any]) -> bool:
    """Whether positions begin anew within a row, which stands for several documents."""
    positions = kwargs.get("position_ids")
    return (
        isinstance(positions, torch.Tensor) and positions.dim() == 2 and bool((positions.diff() != 1).any())
    )


def _packed_error(attention: str | None) -> UsageError:
    return UsageError(
        f"{attention} keeps packed documents apart in calls of one row, and this one cannot be cut into rows",
        hint='load the model with attention="sdpa", or leave packing out',
    )


def _with_tiles(call: _Call | None, rows: int) -> _Call | None:
    return None if call is None else replace(call, tile_rows=min(call.tile_rows, rows))


def _never_streamed(cut: Cut) -> frozenset[str]:
    """Blocks that stay in memory: two that are visited at once would need two slots of every class."""
    return frozenset(
        name
        for point in cut.points
        if point.kind in (PointKind.LAYER, PointKind.LOOSE) and len(point.blocks) > 1
        for name in point.blocks
    )


def _uncached(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What to pass instead so that a rehearsal fills no cache of the caller."""
    caches = {key: None for key, value in kwargs.items() if isinstance(value, Cache)}
    return {**caches, **({"use_cache": False} if "use_cache" in kwargs or caches else {})}


def _with_signature(handler: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`handler` as a function with the signature of `original`: transformers and Trainer inspect it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _encoder_of(module: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder of transformers, which `generate` calls by itself."""
    if not isinstance(module, PreTrainedModel) or not module.config.is_encoder_decoder:
        return None
    encoder: nn.Module = module.get_encoder()
    return None if encoder is module else encoder


def _has_cache_switch(module: nn.Module) -> bool:
    """Whether `use_cache=False` reaches the part of the model that would make a cache."""
    names = inspect.signature(module.forward).parameters
    if "use_cache" in names:
        return True
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    inner = (child for child in module.modules() if isinstance(child, PreTrainedModel))
    return passes_on and any("use_cache" in inspect.signature(child.forward).parameters for child in inner)
