"""A rehearsal of a call: what it visits, in which order, along which dimension it can be tiled, and its memory.

The model's own forward runs at two small batch sizes, with the real configuration and the real arguments' rows, on
weights that are all zero and take no memory (pages that are only read are never allocated). Each distinct kind of
block runs once, forward and backward, while the process's peak memory is watched; the others return tensors of the
same shapes. So nothing is guessed from a configuration, and nothing is read from disk.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from outsize.engine.batch import BatchDims, Shape, find_dims, tiles
from outsize.engine.effects import copied, state_of
from outsize.engine.hooks import has_user_hooks, without_user_hooks
from outsize.engine.layer import Call, Layer, Loose, installed
from outsize.engine.modulestate import ModuleState
from outsize.engine.surroundings import Randomness
from outsize.errors import OutsizeError, UsageError
from outsize.plan import Direction, Visit
from outsize.store import memory

if TYPE_CHECKING:
    from outsize.engine.embedding import Embedding
    from outsize.engine.head import Head
    from outsize.engine.session import Session

SMALL_ROWS = (2, 3)
"""The two batch sizes; coprime, so that a dimension grows with the batch only if it is one."""

_Key = tuple[str, tuple[Shape, ...]]


@dataclass(frozen=True, slots=True)
class Linear:
    """A figure that grows with the batch: `fixed + rows * per_row`."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> int:
        """The figure at `rows`."""
        return int(self.fixed + rows * self.per_row)

    @classmethod
    def through(cls, figures: dict[int, float]) -> Linear:
        """The line through two points (or from the origin through one), never falling."""
        (first, a), *rest = sorted(figures.items())
        if not rest:
            return cls(0.0, a / first)
        second, b = rest[0]
        per_row = max((b - a) / (second - first), 0.0)
        return cls(max(a - first * per_row, 0.0), per_row)


@dataclass(frozen=True, slots=True)
class LossMemory:
    """The most that embedding, head and loss take beside their weights: what grows with the batch, or tiles of the loss
    and what is beside those. Tiles grow until they are as large as they may be."""

    whole: Linear
    tiles: Linear
    most_tile_bytes: int
    beside_tiles: Linear

    def at(self, rows: int) -> int:
        """Bytes, in a batch of `rows`."""
        tiled = min(self.tiles.at(rows), self.most_tile_bytes) + self.beside_tiles.at(rows)
        return max(self.whole.at(rows), tiled)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A call's batch: `rows` is None where it cannot be told, and then nothing is tiled."""

    rows: int | None
    row_elements: int
    row_tokens: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Blocks that are alike: the first of them, its call, and its inputs: shape, type, whether each takes a gradient."""

    layer: Layer
    call: Call
    inputs: tuple[tuple[Shape, torch.dtype, bool], ...]
    trains: bool
    differentiates: bool


@dataclass(frozen=True, slots=True)
class Activations:
    """What a layer's forward computes that its backward needs, in all its visits: bytes by rows of a tile."""

    blocks: tuple[str, ...]
    is_tiled: bool
    tile_bytes: Linear

    def bytes_at(self, rows: int, tile_rows: int) -> int:
        """What it takes to keep them, in a batch of `rows`."""
        parts = [tile.stop - tile.start for tile in tiles(rows, tile_rows)] if self.is_tiled else [rows]
        return sum(self.tile_bytes.at(part) for part in parts)


@dataclass(frozen=True, eq=False, slots=True)
class Rehearsal:
    """What a call will do, and calls of the same kind with rows of at most `row_elements`. Compared by identity.

    `boundary_bytes`: tensors kept between forward and backward, by rows. `tile_bytes`: the most that a block takes
    beside its weights, by rows of a tile.
    """

    visits: tuple[Visit, ...]
    row_elements: int
    dims: dict[str, BatchDims | None]
    boundary_bytes: Linear
    movable_bytes: Linear
    """Of these, what could wait in the memory of another tier: tensors that take a gradient."""
    input_bytes: Linear
    """The most of these that one visit has."""
    sent_bytes: dict[str, Linear]
    """Of these, what all visits of a layer are the first to have, by its last block."""
    tile_bytes: Linear
    loss_memory: LossMemory
    kinds: tuple[Kind, ...]
    kind_of: dict[str, int]
    """The kind of each layer, by the name of its module."""
    rows: int
    """Of the inputs in `kinds`."""
    changing: frozenset[str] = frozenset()
    """Layers, by module, that change buffers or attributes of their own in each forward."""
    uncut: str = ""
    """Why no layer is cut into tiles, where a part of the batch could not be computed."""
    activations: tuple[Activations, ...] = ()
    """Of the layers that a backward reaches, in the order of their last forward visits; a norm alone is none."""


@dataclass
class Probe:
    """Records one run of the model at one batch size. Points call it instead of visiting their blocks."""

    session: Session
    sees_all: bool = False
    """Run every layer, also those that are alike."""
    visits: list[Visit] = field(default_factory=list)
    shapes: dict[str, tuple[list[Shape], list[Shape]]] = field(default_factory=dict)
    inconsistent: set[str] = field(default_factory=set)
    """Layers that are not cut: shapes differ between their visits, or something else than tensors depends on the batch."""
    changing: set[str] = field(default_factory=set)
    """Layers that change buffers or attributes of their own in each forward."""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    movable: set[int] = field(default_factory=set)
    input_bytes: int = 0
    sent_bytes: Counter[str] = field(default_factory=Counter)
    tile_bytes: int = 0
    whole_bytes: int = 0
    """Outputs of embeddings, and logits that are not tiled."""
    loss_tile_bytes: int = 0
    """What the tiles of the loss would take, were it one."""
    most_loss_tile_bytes: int = 0
    beside_loss_bytes: int = 0
    kinds: list[Kind] = field(default_factory=list)
    kind_of: dict[str, int] = field(default_factory=dict)
    activations: dict[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    _kept_bytes: list[int] = field(default_factory=list)
    _seen: dict[_Key, tuple[list[torch.Tensor], Call, int, bool]] = field(default_factory=dict)

    # -- what points call ------------------------------------------------------------------------------------------

    def layer(
        self, layer: Layer, call: Call, tensors: Sequence[torch.Tensor], trains: bool, differentiates: bool
    ) -> list[torch.Tensor]:
        """Outputs of the right shapes, from a run on zeros or from an earlier visit of the same kind."""
        key: _Key = (
            f"{type(layer.module).__name__} {[p.shape for p in self.session.entry_pieces(layer.blocks)]} {call.leaves}",
            tuple(tuple(t.shape) for t in tensors),
        )
        if self.sees_all:
            key = (f"{layer.point.module} {key[0]}", key[1])
        if key not in self._seen:
            before = state_of(call.leaves) if differentiates and call.is_stateful else None
            state = ModuleState(layer.module)
            run = partial(run_on_zeros, self.session, layer, call, tensors, trains, differentiates)
            device, compiler = self.session.torch_device, self.session.compiler
            if call.is_compiled and compiler.try_out(layer.module, run) and device.type != "cuda":
                # Tensors inside compiled code cannot be counted: those of the code as it is are, and beside them all
                # gradients of the layer's parameters, which compiled code gives at once.
                with compiler.paused():
                    (outputs, kept_bytes), num_bytes = memory.watched(run, device)
                num_bytes += _gradient_bytes(self.session, layer) if trains else 0
            else:
                (outputs, kept_bytes), num_bytes = memory.watched(run, device)
            if before != (state_of(call.leaves) if before is not None else None):
                raise UsageError(
                    f"{layer.point.module} changes an object that it is given: its recomputation would change it again",
                    hint="let its forward return what it adds, or call the model under torch.no_grad()",
                )
            changes_state = self._changes_state(layer, state, run)
            self._kept_bytes.append(kept_bytes)
            self.tile_bytes = max(self.tile_bytes, num_bytes)
            like = [torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outputs]
            self._seen[key] = like, call, len(self.kinds), changes_state
            inputs = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
            self.kinds.append(Kind(layer, call, inputs, trains, differentiates))
        like, first, self.kind_of[layer.point.module], changes_state = self._seen[key]
        call.output_spec, call.output_leaves = first.output_spec, first.output_leaves
        call.output_positions = first.output_positions
        call.side_door.counts = dict(first.side_door.counts)
        self._record_shapes(layer.point.module, tensors, like)
        if changes_state:
            self.changing.add(layer.point.module)
        if changes_state or call.is_stateful or has_user_hooks(layer.inner):
            self.inconsistent.add(layer.point.module)
        if differentiates and any(len(p.shape) > 1 for p in self.session.entry_pieces(layer.blocks)):
            self._record_activations(layer)
        if differentiates:
            own = {_storage_key(t): t.untyped_storage().nbytes() for t in tensors if t.requires_grad}
            self.sent_bytes[layer.blocks[-1]] += sum(own[key] for key in own.keys() - self.movable)
        return self._visit(
            layer.blocks,
            tensors,
            [torch.zeros(o.shape, dtype=o.dtype, device=self.session.torch_device) for o in like],
            differentiates,
        )

    @staticmethod
    def _changes_state(layer: Layer, state: ModuleState, run: Callable[[], object]) -> bool:
        """Whether each forward of `layer` changes buffers or attributes; `state`, of before its first, is restored.

        What a first forward makes, such as a table of positions, does not count: a second leaves it as it is.
        """
        try:
            if names := state.graph_tensors():
                raise UsageError(
                    f"{layer.point.module} keeps a tensor with a gradient in {names[0]}: its gradient would be lost",
                    hint="let its forward return the tensor, or keep it after .detach()",
                )
            if state.has_moved() or not state.changes():
                return state.has_moved()
            again = ModuleState(layer.module)
            run()
            return bool(again.changes())
        finally:
            state.restore()

    def loose(self, loose: Loose, trains: bool) -> list[torch.Tensor]:
        """Zeros in the shapes of the parameters."""
        shapes = {piece.parameter: piece.shape for piece in self.session.entry_pieces(loose.blocks)}
        values = [
            torch.zeros(shapes[name], dtype=self.session.dtype_of(name), device=self.session.torch_device)
            for name in loose.parameters
        ]
        return self._visit(loose.blocks, [], values, trains, weights_in_backward=False)

    def embedding(self, embedding: Embedding, ids: torch.Tensor, trains: bool) -> torch.Tensor:
        """Zeros in the shape of the output."""
        shape = (*ids.shape, embedding.module.embedding_dim)
        output = torch.zeros(shape, dtype=self.session.dtype, device=self.session.torch_device)
        self.whole_bytes = max(self.whole_bytes, 3 * output.nbytes)
        if embedding.takes_rows:
            return output
        return self._visit(embedding.blocks, [], [output], trains, weights_in_backward=False, is_table=True)[
            0
        ]

    def head(self, head: Head, hidden: torch.Tensor, trains: bool, differentiates: bool) -> torch.Tensor:
        """Logits that take no memory; their real ones are counted."""
        shape = (*hidden.shape[:-1], head.module.out_features)
        logits = torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(shape)
        self.whole_bytes = max(self.whole_bytes, self._logits_bytes(head, logits, differentiates))
        return self._visit(head.blocks, [hidden], [logits], differentiates, is_table=True)[0]

    def _logits_bytes(self, head: Head, logits: torch.Tensor, differentiates: bool) -> int:
        """What real logits take. With gradients: four copies in fp32, for the loss and its backward. Without: themselves,
        the part that one row block gives, and what the caller makes of them."""
        if differentiates:
            return 4 * logits.numel() * 4
        rows = max(stop - start for _, start, stop in self.session.parameters.row_blocks(head.weight))
        num_tokens = logits.numel() // head.module.out_features
        own = logits.numel() * (logits.element_size() + self.session.calls.beside_logit_bytes)
        return own + int(memory.SPREAD * num_tokens * rows * max(logits.element_size(), 4))

    def loss(self, head: Head, hidden: torch.Tensor, trains: bool, differentiates: bool) -> torch.Tensor:
        """A loss of zero."""
        from outsize.engine.head import tile_elements

        rows = max(stop - start for _, start, stop in self.session.parameters.row_blocks(head.weight))
        # Logits and what becomes of them; the processor's products have copies of their own.
        num_tiles = 3 if self.session.device.is_host else 2
        gradient_bytes = rows * head.module.in_features * self.session.dtype.itemsize
        self.loss_tile_bytes = max(self.loss_tile_bytes, num_tiles * hidden.shape[0] * rows * 4)
        self.most_loss_tile_bytes = num_tiles * tile_elements(hidden.device) * 4
        self.beside_loss_bytes = max(self.beside_loss_bytes, 3 * hidden.numel() * 4 + gradient_bytes)
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        return self._visit(head.blocks, [hidden], [loss], differentiates, is_table=True)[0]

    # -- recording -------------------------------------------------------------------------------------------------

    def _visit(
        self,
        blocks: Sequence[str],
        inputs: Sequence[torch.Tensor],
        outputs: list[torch.Tensor],
        differentiates: bool,
        *,
        weights_in_backward: bool = True,
        is_table: bool = False,
    ) -> list[torch.Tensor]:
        """Record a visit; `outputs`, in the graph of `inputs` where the real ones would be."""
        from outsize.engine.session import backward_visits

        self.visits += [
            Visit(name, Direction.FORWARD, joins_next=not is_table and name != blocks[-1]) for name in blocks
        ]
        if not differentiates:
            return outputs
        own: dict[int, int] = {}
        for tensor in inputs:
            # Without its graph, which holds this probe: autograd nodes are not seen by the garbage collector.
            key = _storage_key(tensor)
            self.kept[key] = tensor.detach()
            if tensor.requires_grad:
                self.movable.add(key)
                own[key] = tensor.untyped_storage().nbytes()
        self.input_bytes = max(self.input_bytes, sum(own.values()))
        backward = backward_visits(self.session, blocks, weights_in_backward)
        if is_table:
            backward = [replace(visit, joins_next=False) for visit in reversed(backward)]
        return list(_Rehearsed.apply(self, backward, outputs, self.session.anchor, *inputs))  # type: ignore[no-untyped-call]

    def _record_shapes(
        self, module: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        shapes = ([tuple(t.shape) for t in inputs], [tuple(t.shape) for t in outputs])
        if self.shapes.setdefault(module, shapes) != shapes:
            self.inconsistent.add(module)

    def _record_activations(self, layer: Layer) -> None:
        module = layer.point.module
        _, num_bytes = self.activations.pop(module, ((), 0))  # the order is that of last visits
        self.activations[module] = layer.blocks, num_bytes + self._kept_bytes[self.kind_of[module]]

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that backward needs, each storage once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())

    @property
    def movable_bytes(self) -> int:
        """Bytes of those among them that take a gradient."""
        return sum(self.kept[key].untyped_storage().nbytes() for key in self.movable)


def run_on_zeros(
    session: Session,
    layer: Layer,
    call: Call,
    tensors: Sequence[torch.Tensor],
    trains: bool,
    differentiates: bool,
) -> tuple[list[torch.Tensor], int]:
    """One visit of `layer` on weights that are zero, forward and, where it differentiates, backward.

    The outputs (of a backward: their shapes), and the bytes of what the forward keeps for the backward beside its inputs.
    """
    pieces = session.entry_pieces(layer.blocks)
    sizes = {p: p.num_elements * session.dtype_of(p.parameter).itemsize for p in pieces}
    most = max(sizes.values())
    if session.torch_device.type == "cpu":
        # Pages that are only read take no memory.
        pages = mmap.mmap(-1, max(most, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        zeros = torch.frombuffer(pages, dtype=torch.uint8)
    else:
        zeros = torch.zeros(most, dtype=torch.uint8, device=session.torch_device)
    values = {
        piece.parameter: zeros[: sizes[piece]].view(session.dtype_of(piece.parameter)).view(piece.shape)
        for piece in pieces
        if piece.num_elements
    }
    return _run_on(session, layer, call, tensors, values, trains, differentiates)


def _run_on(
    session: Session,
    layer: Layer,
    call: Call,
    tensors: Sequence[torch.Tensor],
    values: dict[str, torch.Tensor],
    trains: bool,
    differentiates: bool,
) -> tuple[list[torch.Tensor], int]:
    module, bindings = session.module, layer.point.bindings
    if not differentiates:
        with installed(module, bindings, values), torch.no_grad():
            return [output.detach().clone() for output in call.run(tensors)], 0
    leaves = {name: value.detach().requires_grad_(trains) for name, value in values.items()}
    if trains:
        for leaf in leaves.values():
            leaf.register_post_accumulate_grad_hook(_drop)
    inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[_storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with (
        installed(module, bindings, leaves),
        call.autocast.restore(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        outputs = call.run(inputs)
    for output in outputs:
        save(output)
    for tensor in (*inputs, *leaves.values()):
        saved.pop(_storage_key(tensor), None)
    kept_bytes = sum(saved.values())
    shapes = [torch.empty(output.shape, dtype=output.dtype, device="meta") for output in outputs]
    roots = [output for output in outputs if output.requires_grad]
    del outputs
    if roots:
        torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
    return shapes, kept_bytes


def _gradient_bytes(session: Session, layer: Layer) -> int:
    """What the gradients of all parameters of `layer` take together, where they come all at once."""
    num_elements = sum(piece.num_elements for piece in session.entry_pieces(layer.blocks))
    return int(num_elements * session.dtype.itemsize * memory.SPREAD)


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if not tensor.is_meta else tensor.untyped_storage()._cdata


def _drop(leaf: torch.Tensor) -> None:
    leaf.grad = None


class _Rehearsed(torch.autograd.Function):
    """A visit that computes nothing, and records when its backward comes."""

    @staticmethod
    def forward(
        ctx: Any,
        probe: Probe,
        backward: list[Visit],
        outputs: list[torch.Tensor],
        anchor: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.probe, ctx.visits = probe, backward
        ctx.like = [(torch.empty_like(tensor, device="meta"), tensor.device) for tensor in inputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[output for output in outputs if not output.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.probe.visits += ctx.visits
        zeros = [
            torch.zeros(like.shape, dtype=like.dtype, device=device) if need else None
            for (like, device), need in zip(ctx.like, ctx.needs_input_grad[4:], strict=True)
        ]
        return (None, None, None, None, *zeros)


def rehearse(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape) -> Rehearsal:
    """Run the model's forward with `args` and `kwargs` as a rehearsal; the caller's RNG and buffers stay as they are."""
    rows = shape.rows
    probes: dict[int, Probe] = {}
    uncut = ""
    if rows is not None and rows > 1:
        try:
            hardest = _hardest_rows(kwargs, rows).cpu()
            for count in SMALL_ROWS:
                index = hardest[torch.arange(count, device="cpu") % rows]
                taken = tree_map_only(
                    torch.Tensor, partial(_take, rows, index), copied((args, kwargs), index)
                )
                probes[count] = _run(session, *taken)
        except (OutsizeError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except (
            Exception
        ) as error:  # the whole batch, which is tried next, says whether it is the call that is wrong
            uncut = f"the model cannot compute {count} of its {rows} rows ({type(error).__name__}: {error})"
            probes = {}
    if not probes:
        probes = {rows or 1: _run(session, *copied((args, kwargs)))}
    first, last = probes[min(probes)], probes[max(probes)]
    dims: dict[str, BatchDims | None] = {}
    if len(probes) == 2:
        unclear = first.inconsistent | last.inconsistent
        for module, (inputs, outputs) in first.shapes.items():
            others = last.shapes.get(module, ([], []))
            ins = find_dims(inputs, others[0], *SMALL_ROWS)
            outs = find_dims(outputs, others[1], *SMALL_ROWS)
            known = ins is not None and outs is not None and module not in unclear
            dims[module] = BatchDims(ins, outs) if known and ins is not None and outs is not None else None
    activations = tuple(
        Activations(
            blocks,
            dims.get(module) is not None,
            Linear.through({n: float(probe.activations[module][1]) for n, probe in probes.items()}),
        )
        for module, (blocks, _) in first.activations.items()
        if module in last.activations
    )
    return Rehearsal(
        visits=tuple(first.visits),
        row_elements=shape.row_elements,
        dims=dims,
        boundary_bytes=Linear.through({n: float(probe.kept_bytes) for n, probe in probes.items()}),
        movable_bytes=Linear.through({n: float(probe.movable_bytes) for n, probe in probes.items()}),
        input_bytes=Linear.through({n: float(probe.input_bytes) for n, probe in probes.items()}),
        sent_bytes={
            block: Linear.through({n: float(probe.sent_bytes[block]) for n, probe in probes.items()})
            for block in first.sent_bytes
        },
        tile_bytes=Linear.through({n: float(probe.tile_bytes) for n, probe in probes.items()}),
        loss_memory=LossMemory(
            Linear.through({n: float(probe.whole_bytes) for n, probe in probes.items()}),
            Linear.through({n: float(probe.loss_tile_bytes) for n, probe in probes.items()}),
            last.most_loss_tile_bytes,
            Linear.through({n: float(probe.beside_loss_bytes) for n, probe in probes.items()}),
        ),
        kinds=tuple(first.kinds),
        kind_of=first.kind_of,
        rows=min(probes),
        changing=frozenset(first.changing | last.changing),
        uncut=uncut,
        activations=activations,
    )


def _hardest_rows(kwargs: dict[str, Any], rows: int) -> torch.Tensor:
    """All rows, those with most padding first: models make a mask only where there is something to mask."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() < 2 or mask.shape[0] != rows:
        return torch.arange(rows, device="cpu")
    return mask.reshape(rows, -1).sum(1).argsort(stable=True)


def _take(rows: int, index: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The rows `index` of a tensor that has a batch of `rows`."""
    return (
        tensor.index_select(0, index.to(tensor.device))
        if tensor.dim() and tensor.shape[0] == rows
        else tensor
    )


def walk(session: Session, kwargs: dict[str, Any]) -> None:
    """Run the model's own forward, every layer once, on weights of zero: for what looks on. Nothing is read or placed."""
    _run(session, (), kwargs, sees_all=True)


def _run(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], *, sees_all: bool = False) -> Probe:
    probe = session.probe = Probe(session, sees_all)
    state = ModuleState(session.module, with_hooks=True)
    args, kwargs = session.arguments.moved(args, kwargs)
    handles, num_before = session.calls.handles, len(session.calls.handles)
    try:
        with Randomness.current(session.device).restored(), without_user_hooks(session.module):
            output = session.forward(*args, **kwargs)
            if torch.is_grad_enabled():
                _backward(output)
    finally:
        session.probe = None
        for handle in handles[num_before:]:
            handle.seal()  # else the graph would be there still when memory is planned
        del handles[num_before:]
        state.restore()
    return probe


def _backward(output: Any) -> None:
    """Go back from the loss, or, where the model returns none, from everything it returns."""
    loss = getattr(output, "loss", None)
    leaves = [loss] if isinstance(loss, torch.Tensor) else tree_flatten(output)[0]
    roots = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])


def batch_shape(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchShape:
    """The batch of a call: every tensor argument has the rows (or 1, or no dimension) as its first dimension."""
    main = kwargs.get(getattr(module, "main_input_name", "input_ids"))
    tensors = [
        leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor) and leaf.dim()
    ]
    if not isinstance(main, torch.Tensor) or not main.dim():
        main = tensors[0] if tensors else torch.empty(1, dtype=torch.float32, device="cpu")
    rows = main.shape[0]
    return BatchShape(
        rows=rows if tensors and all(tensor.shape[0] in (1, rows) for tensor in tensors) else None,
        row_elements=sum(tensor.numel() for tensor in tensors) // max(rows, 1),
        row_tokens=max(1, main.shape[1] if main.dim() in (2, 3) else 1),
    )
