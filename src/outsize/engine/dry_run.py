"""A dry run of the model at one batch size: which blocks it visits, in which order, and what each visit takes.

The model's own forward runs with the real configuration and the real arguments, on weights of zero that take no memory.
Each distinct kind of layer is computed once, forward and backward, while its peak memory is watched; layers that are like
an earlier one, and embeddings and heads, return zeros of the right shapes. So nothing is guessed from a configuration, and
nothing is read from disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.batch import Gradients, Shape, Tensors
from outsize.engine.effects import state_of
from outsize.engine.embedding import Embedding
from outsize.engine.head import Head, Logits, tile_elements
from outsize.engine.hooks import has_user_hooks
from outsize.engine.layer import Layer, LayerCall, Loose
from outsize.engine.model import Model
from outsize.engine.modulestate import ModuleState
from outsize.engine.on_zeros import LayerOnZeros, storage_key
from outsize.engine.visits import Visits, as_node
from outsize.errors import UsageError
from outsize.plan import Direction, Visit
from outsize.store import memory

AnyPoint = Layer | Loose | Embedding | Head

_Key = tuple[str, tuple[Shape, ...]]


@dataclass
class Findings:
    """What one dry run found; bytes."""

    visits: list[Visit] = field(default_factory=list)
    shapes: dict[str, tuple[list[Shape], list[Shape]]] = field(default_factory=dict)
    """Of the tensors that enter and leave each layer, by module."""
    uncut: set[str] = field(default_factory=set)
    """Layers that cannot be tiled: shapes differ between visits, or something beside tensors depends on the batch."""
    changing: set[str] = field(default_factory=set)
    """Layers that change buffers or attributes of their own in each forward."""
    saved: dict[int, Tensor] = field(default_factory=dict)
    """Tensors between visits that the backward needs, by storage."""
    movable: set[int] = field(default_factory=set)
    """Of these, the storages of tensors that take a gradient."""
    input_bytes: int = 0
    sent_bytes: Counter[str] = field(default_factory=Counter)
    tile_bytes: int = 0
    whole_bytes: int = 0
    """Tensors of embeddings, and logits that are not tiled."""
    loss_tile_bytes: int = 0
    """Of the tiles of the loss, if they were one."""
    most_loss_tile_bytes: int = 0
    beside_loss_bytes: int = 0
    samples: list[LayerOnZeros] = field(default_factory=list)
    """Of each kind of layer the first."""
    kind_of: dict[str, int] = field(default_factory=dict)
    activations: dict[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    """`(blocks, bytes)` of each layer's activations, by module."""

    @property
    def saved_bytes(self) -> int:
        """Bytes of the tensors that the backward needs, each storage once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.saved.values())

    @property
    def movable_bytes(self) -> int:
        """Bytes of those among them that take a gradient."""
        return sum(self.saved[key].untyped_storage().nbytes() for key in self.movable)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A layer that was computed: its outputs on meta, its call, its kind, and whether it changes its own state."""

    outputs: Tensors
    call: LayerCall
    kind: int
    saved_bytes: int
    changes_state: bool


@final
class DryRun:
    """Answers for the points of a model; `found` fills up on the way.

    With `sees_all` every layer is computed, also those that are alike.
    """

    def __init__(self, visits: Visits, points: Mapping[str, AnyPoint], *, sees_all: bool = False) -> None:
        self.found = Findings()
        self._visits = visits
        self._model = visits.model
        self._points = points
        self._sees_all = sees_all
        self._seen: dict[_Key, _Seen] = {}

    def answer(self, module: str, args: Args, kwargs: Kwargs) -> Any:
        """The output of the point at `module`: zeros, or, of a layer of a new kind, what it computes."""
        match self._points[module]:
            case Layer() as layer:
                return self._layer(layer, args, kwargs)
            case Loose() as loose:
                return loose.run(self._loose(loose), args, kwargs)
            case Embedding() as embedding:
                return self._embedding(embedding, *args, **kwargs)
            case Head() as head:
                return self._head(head, *args, **kwargs)

    # -- layers ----------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, args: Args, kwargs: Kwargs) -> Any:
        call, tensors = layer.call_of(args, kwargs)
        module, found = layer.point.module, self.found
        key: _Key = (
            f"{type(layer.module).__name__} {[p.shape for p in self._model.pieces(layer.blocks)]} {call.arguments.leaves}",
            tuple(tuple(t.shape) for t in tensors),
        )
        if self._sees_all:
            key = (f"{module} {key[0]}", key[1])
        if key not in self._seen:
            self._seen[key] = self._computed(layer, call, tensors)
        seen = self._seen[key]
        found.kind_of[module] = seen.kind
        call.output = seen.call.output
        call.captured.counts = dict(seen.call.captured.counts)
        shapes = ([tuple(t.shape) for t in tensors], [tuple(t.shape) for t in seen.outputs])
        if found.shapes.setdefault(module, shapes) != shapes:
            found.uncut.add(module)
        if seen.changes_state:
            found.changing.add(module)
        if seen.changes_state or call.is_stateful or has_user_hooks(layer.inner):
            found.uncut.add(module)
        if call.differentiates:
            self._count_saved(layer, tensors, seen)
        device = self._model.torch_device
        zeros = [torch.zeros(o.shape, dtype=o.dtype, device=device) for o in seen.outputs]
        return call.result(self.visit(layer.blocks, tensors, zeros, call.differentiates))

    def _computed(self, layer: Layer, call: LayerCall, tensors: Tensors) -> _Seen:
        """Compute a layer of a new kind."""
        before = state_of(call.arguments.leaves) if call.differentiates and call.is_stateful else None
        state = ModuleState(layer.module)
        sample = LayerOnZeros.of(layer, call, tensors)
        run = partial(sample.compute, tensors)
        (outputs, saved_bytes), num_bytes = self._watched(sample, run)
        if before is not None and before != state_of(call.arguments.leaves):
            raise UsageError(
                f"{layer.point.module} changes an object that it is given: its recomputation would change it again",
                hint="let its forward return what it adds, or call the model under torch.no_grad()",
            )
        changes_state = _changes_state(layer, state, run)
        self.found.tile_bytes = max(self.found.tile_bytes, num_bytes)
        self.found.samples.append(sample)
        return _Seen(outputs, call, len(self.found.samples) - 1, saved_bytes, changes_state)

    def _watched(
        self, sample: LayerOnZeros, run: Callable[[], tuple[Tensors, int]]
    ) -> tuple[tuple[Tensors, int], int]:
        """What `run` returns, and its peak in bytes."""
        device, compiler, call = self._model.torch_device, self._visits.compiler, sample.call
        tries = call.is_compiled and compiler.try_out(sample.layer.module, run)
        if not tries or device.type == "cuda":
            return memory.watched(run, device)
        # Tensors inside compiled code cannot be counted. Those of uncompiled code are, and beside them all gradients of
        # the layer's parameters, which compiled code gives at once.
        with compiler.paused():
            result, num_bytes = memory.watched(run, device)
        return result, num_bytes + (sample.gradient_bytes() if call.trains else 0)

    def _count_saved(self, layer: Layer, tensors: Tensors, seen: _Seen) -> None:
        found, module = self.found, layer.point.module
        if any(len(piece.shape) > 1 for piece in self._model.pieces(layer.blocks)):
            _, num_bytes = found.activations.pop(module, ((), 0))  # the order is that of last visits
            found.activations[module] = layer.blocks, num_bytes + seen.saved_bytes
        own = {storage_key(t): t.untyped_storage().nbytes() for t in tensors if t.requires_grad}
        found.sent_bytes[layer.blocks[-1]] += sum(own[key] for key in own.keys() - found.movable)

    # -- other points ----------------------------------------------------------------------------------------------

    def _loose(self, loose: Loose) -> Tensors:
        """Zeros in the shapes of the parameters."""
        model = self._model
        shapes = {piece.parameter: piece.shape for piece in model.pieces(loose.blocks)}
        values = [
            torch.zeros(shapes[name], dtype=model.dtype_of(name), device=model.torch_device)
            for name in loose.parameters
        ]
        trains = model.differentiates(loose.blocks, ())
        return self.visit(loose.blocks, [], values, trains, weights_in_backward=False)

    def _embedding(self, embedding: Embedding, input: Tensor) -> Tensor:
        """Zeros in the shape of the output."""
        model = self._model
        shape = (*input.shape, embedding.module.embedding_dim)
        output = torch.zeros(shape, dtype=model.dtype, device=model.torch_device)
        self.found.whole_bytes = max(self.found.whole_bytes, 3 * output.nbytes)
        if embedding.takes_rows:
            return output
        trains = model.differentiates(embedding.blocks, ())
        (output,) = self.visit(
            embedding.blocks, [], [output], trains, weights_in_backward=False, is_table=True
        )
        return output

    def _head(self, head: Head, input: Tensor) -> Tensor:
        source, call = _DryHead(self, head), self._visits.call
        if call.has_labels:
            return Logits(source, input, head.module.out_features, call)
        return source.logits(input)

    # -- recording -------------------------------------------------------------------------------------------------

    def visit(
        self,
        blocks: Sequence[str],
        inputs: Tensors,
        outputs: Tensors,
        differentiates: bool,
        *,
        weights_in_backward: bool = True,
        is_table: bool = False,
    ) -> Tensors:
        """Record a visit; `outputs`, in the graph of `inputs` as the real ones would be."""
        found = self.found
        found.visits += [
            Visit(name, Direction.FORWARD, joins_next=not is_table and name != blocks[-1]) for name in blocks
        ]
        if not differentiates:
            return outputs
        own: dict[int, int] = {}
        for tensor in inputs:
            # Without its graph, which holds this object: autograd nodes are not seen by the garbage collector.
            key = storage_key(tensor)
            found.saved[key] = tensor.detach()
            if tensor.requires_grad:
                found.movable.add(key)
                own[key] = tensor.untyped_storage().nbytes()
        found.input_bytes = max(found.input_bytes, sum(own.values()))
        visits = self._model.backward_visits(blocks, weights_in_backward)
        if is_table:
            visits = [replace(visit, joins_next=False) for visit in reversed(visits)]
        like = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in inputs]

        def backward(*_: object) -> Gradients:
            found.visits.extend(visits)
            return [
                None if each is None else torch.zeros(each[0], dtype=each[1], device=each[2]) for each in like
            ]

        return as_node(lambda *_: (outputs, ()), backward, self._model.anchor, *inputs)


@final
@dataclass(frozen=True, slots=True)
class _DryHead:
    """What a handle of logits stands for in a dry run: the memory of logits and losses is counted, and none is taken."""

    dry_run: DryRun
    head: Head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits that take no memory."""
        shape = (*hidden.shape[:-1], self.head.module.out_features)
        logits = torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(shape)
        differentiates = self._model.differentiates(self.head.blocks, [hidden])
        found = self.dry_run.found
        found.whole_bytes = max(found.whole_bytes, self._logits_bytes(logits, differentiates))
        return self.dry_run.visit(self.head.blocks, [hidden], [logits], differentiates, is_table=True)[0]

    def _logits_bytes(self, logits: Tensor, differentiates: bool) -> int:
        """What real logits take. With gradients: four copies in fp32, for the loss and its backward. Without: themselves,
        the part that one row block gives, and what the caller makes of them."""
        if differentiates:
            return 4 * logits.numel() * 4
        num_tokens = logits.numel() // self.head.module.out_features
        beside = self.head.visits.call.beside_logit_bytes
        part = num_tokens * self._most_rows * max(logits.element_size(), 4)
        return logits.numel() * (logits.element_size() + beside) + int(memory.SPREAD * part)

    def forward(self, hidden: Tensor) -> Tensor:
        """The handle is gone when the dry run is over."""
        raise AssertionError("logits of a dry run were read after it")

    def loss(self, hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, int]:
        """A loss of zero, and the number of targets that count."""
        flat, targets = self.head.counted(hidden, targets, ignore_index)
        found, rows, model = self.dry_run.found, self._most_rows, self._model
        num_tiles = 2 + model.device.product_copies  # logits and what becomes of them
        gradient_bytes = rows * self.head.module.in_features * model.dtype.itemsize
        found.loss_tile_bytes = max(found.loss_tile_bytes, num_tiles * flat.shape[0] * rows * 4)
        found.most_loss_tile_bytes = num_tiles * tile_elements(flat.device) * 4
        found.beside_loss_bytes = max(found.beside_loss_bytes, 3 * flat.numel() * 4 + gradient_bytes)
        loss = torch.zeros((), device=flat.device, dtype=torch.float32)
        differentiates = model.differentiates(self.head.blocks, [hidden])
        (loss,) = self.dry_run.visit(self.head.blocks, [flat], [loss], differentiates, is_table=True)
        return loss, targets.numel()

    @property
    def _model(self) -> Model:
        return self.head.visits.model

    @property
    def _most_rows(self) -> int:
        """The rows of the largest row block of the table."""
        return max(stop - start for _, start, stop in self._model.parameters.row_blocks(self.head.weight))


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
