"""A rehearsal of a call: what it visits, in which order, along which dimension it can be tiled, and its memory.

The model's own forward runs at two small batch sizes, with the real configuration and the real arguments' rows, on
weights that are all zero and take no memory (pages that are only read are never allocated). Each distinct kind of
block runs once, forward and backward, while the process's peak memory is watched; the others return tensors of the
same shapes. So nothing is guessed from a configuration, and nothing is read from disk.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from outsize.engine import memory
from outsize.engine.batch import BatchDims, Shape, find_dims
from outsize.engine.layer import Call, Layer, Loose, installed
from outsize.plan import Direction, Visit

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
class BatchShape:
    """A call's batch: `rows` is None where it cannot be told, and then nothing is tiled."""

    rows: int | None
    row_elements: int
    row_tokens: int


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a call will do, and calls of the same kind with rows of at most `row_elements`.

    `boundary_bytes`: tensors kept between forward and backward, by rows. `tile_bytes`: the most that a block takes
    beside its weights, by rows of a tile. `loss_bytes`: the most that embedding, head and loss take, by rows.
    """

    visits: tuple[Visit, ...]
    row_elements: int
    dims: dict[str, BatchDims | None]
    boundary_bytes: Linear
    tile_bytes: Linear
    loss_bytes: Linear


@dataclass
class Probe:
    """Records one run of the model at one batch size. Points call it instead of visiting their blocks."""

    session: Session
    visits: list[tuple[str, bool, bool, bool]] = field(default_factory=list)
    shapes: dict[str, tuple[list[Shape], list[Shape]]] = field(default_factory=dict)
    inconsistent: set[str] = field(default_factory=set)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    tile_bytes: int = 0
    loss_bytes: int = 0
    _seen: dict[_Key, tuple[list[torch.Tensor], Call]] = field(default_factory=dict)

    # -- what points call ------------------------------------------------------------------------------------------

    def layer(
        self, layer: Layer, call: Call, tensors: Sequence[torch.Tensor], trains: bool, differentiates: bool
    ) -> list[torch.Tensor]:
        """Outputs of the right shapes, from a run on zeros or from an earlier visit of the same kind."""
        key: _Key = (
            f"{type(layer.module).__name__} {[p.shape for p in self.session.entry_pieces(layer.blocks)]} {call.leaves}",
            tuple(tuple(t.shape) for t in tensors),
        )
        if key not in self._seen:
            outputs, num_bytes = _watched(lambda: self._run(layer, call, tensors, trains, differentiates))
            self.tile_bytes = max(self.tile_bytes, num_bytes)
            self._seen[key] = ([torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outputs], call)
        like, first = self._seen[key]
        call.output_spec, call.output_leaves = first.output_spec, first.output_leaves
        call.output_positions = first.output_positions
        call.side_door.counts = dict(first.side_door.counts)
        outputs = [torch.zeros(o.shape, dtype=o.dtype) for o in like]
        self._record(layer.blocks, trains, True, differentiates)
        self._record_shapes(layer.point.module, tensors, outputs)
        if differentiates:
            self._keep(tensors)
        return [_grow(output, differentiates) for output in outputs]

    def loose(self, loose: Loose, trains: bool) -> list[torch.Tensor]:
        """Zeros in the shapes of the parameters."""
        self._record(loose.blocks, trains, False, trains)
        pieces = {p.parameter: p.shape for p in self.session.entry_pieces(loose.blocks)}
        return [_grow(torch.zeros(pieces[name], dtype=self.session.dtype), trains) for name in loose.parameters]

    def embedding(self, embedding: Embedding, ids: torch.Tensor, trains: bool) -> torch.Tensor:
        """Zeros in the shape of the output."""
        self._record(embedding.blocks, trains, False, trains)
        output = torch.zeros(*ids.shape, embedding.module.embedding_dim, dtype=self.session.dtype)
        self.loss_bytes = max(self.loss_bytes, 3 * output.nbytes)
        return _grow(output, trains)

    def head(self, head: Head, hidden: torch.Tensor, trains: bool, differentiates: bool) -> torch.Tensor:
        """Logits that take no memory; their real ones are counted."""
        self._record(head.blocks, trains, True, differentiates)
        shape = (*hidden.shape[:-1], head.module.out_features)
        logits = _grow(torch.zeros((), dtype=hidden.dtype), differentiates).expand(shape)
        self.loss_bytes = max(self.loss_bytes, 4 * logits.numel() * 4)
        if differentiates:
            self._keep([hidden])
        return logits

    def loss(self, head: Head, hidden: torch.Tensor, trains: bool, differentiates: bool) -> torch.Tensor:
        """A loss of zero."""
        from outsize.engine.head import TILE_ELEMENTS

        self._record(head.blocks, trains, True, differentiates)
        rows = max(stop - start for _, start, stop in self.session.row_blocks(head.weight))
        tile = min(TILE_ELEMENTS, hidden.shape[0] * rows) * 4
        self.loss_bytes = max(self.loss_bytes, 3 * tile + 3 * hidden.numel() * 4)
        if differentiates:
            self._keep([hidden])
        return _grow(torch.zeros(()), differentiates)

    # -- recording -------------------------------------------------------------------------------------------------

    def _record(self, blocks: Sequence[str], trains: bool, weights_in_backward: bool, differentiates: bool) -> None:
        self.visits += [
            (name, trains and self.session.trains((name,)), weights_in_backward, differentiates) for name in blocks
        ]

    def _record_shapes(
        self, module: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        shapes = ([tuple(t.shape) for t in inputs], [tuple(t.shape) for t in outputs])
        if self.shapes.setdefault(module, shapes) != shapes:
            self.inconsistent.add(module)

    def _keep(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that backward needs, each storage once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())

    def all_visits(self) -> tuple[Visit, ...]:
        """Forward visits as recorded, then those that differentiate, backwards."""
        forward = [Visit(name, Direction.FORWARD) for name, *_ in self.visits]
        backward = [
            Visit(name, Direction.BACKWARD, needs_weights, trains)
            for name, trains, needs_weights, differentiates in reversed(self.visits)
            if differentiates
        ]
        return tuple(forward + backward)

    # -- running a block on zeros ----------------------------------------------------------------------------------

    def _run(
        self, layer: Layer, call: Call, tensors: Sequence[torch.Tensor], trains: bool, differentiates: bool
    ) -> list[torch.Tensor]:
        pieces = self.session.entry_pieces(layer.blocks)
        most = max(piece.num_elements for piece in pieces) * self.session.dtype.itemsize
        with mmap.mmap(-1, max(most, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as zeros:
            values = {
                piece.parameter: torch.frombuffer(zeros, dtype=self.session.dtype, count=piece.num_elements).view(
                    piece.shape
                )
                for piece in pieces
                if piece.num_elements
            }
            try:
                return self._run_on(layer, call, tensors, values, trains, differentiates)
            finally:
                values.clear()

    def _run_on(
        self,
        layer: Layer,
        call: Call,
        tensors: Sequence[torch.Tensor],
        values: dict[str, torch.Tensor],
        trains: bool,
        differentiates: bool,
    ) -> list[torch.Tensor]:
        module, bindings = self.session.module, layer.point.bindings
        if not differentiates:
            with installed(module, bindings, values), torch.no_grad():
                return [output.detach().clone() for output in call.run(tensors)]
        leaves = {name: value.detach().requires_grad_(trains) for name, value in values.items()}
        if trains:
            for leaf in leaves.values():
                leaf.register_post_accumulate_grad_hook(_drop)
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        with installed(module, bindings, leaves), torch.enable_grad():
            outputs = call.run(inputs)
        shapes = [torch.empty(output.shape, dtype=output.dtype, device="meta") for output in outputs]
        roots = [output for output in outputs if output.requires_grad]
        del outputs
        if roots:
            torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        return shapes


def _drop(leaf: torch.Tensor) -> None:
    leaf.grad = None


def _grow(tensor: torch.Tensor, differentiates: bool) -> torch.Tensor:
    """A leaf that requires grad where the real output would have a graph."""
    if differentiates and tensor.is_floating_point():
        # Not a leaf: models modify hidden states in place.
        return tensor.requires_grad_().view_as(tensor) * 1
    return tensor


def rehearse(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape) -> Rehearsal:
    """Run the model's forward with `args` and `kwargs` as a rehearsal; the caller's RNG and buffers stay as they are."""
    rows = shape.rows
    probes: dict[int, Probe] = {}
    if rows is not None and rows > 1:
        try:
            for count in SMALL_ROWS:
                index = torch.arange(count) % rows
                small = tree_map_only(
                    torch.Tensor,
                    lambda t, index=index: t.index_select(0, index) if t.dim() and t.shape[0] == rows else t,
                    (args, kwargs),
                )
                probes[count] = _run(session, *small)
        except Exception:  # a batch whose tensors belong together in another way: take it whole
            probes = {}
    if not probes:
        probes = {rows or 1: _run(session, args, kwargs)}
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
    return Rehearsal(
        visits=first.all_visits(),
        row_elements=shape.row_elements,
        dims=dims,
        boundary_bytes=Linear.through({n: float(probe.kept_bytes) for n, probe in probes.items()}),
        tile_bytes=Linear.through({n: float(probe.tile_bytes) for n, probe in probes.items()}),
        loss_bytes=Linear.through({n: float(probe.loss_bytes) for n, probe in probes.items()}),
    )


def _run(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Probe:
    probe = session.probe = Probe(session)
    buffers = {name: buffer.clone() for name, buffer in session.module.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            session.forward(*args, **kwargs)
    finally:
        session.probe = None
        for name, buffer in session.module.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
    return probe


def batch_shape(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchShape:
    """The batch of a call: every tensor argument has the rows (or 1, or no dimension) as its first dimension."""
    main = kwargs.get(getattr(module, "main_input_name", "input_ids"))
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not isinstance(main, torch.Tensor) or not main.dim():
        main = tensors[0] if tensors else torch.empty(1)
    rows = main.shape[0]
    return BatchShape(
        rows=rows if tensors and all(tensor.shape[0] in (1, rows) for tensor in tensors) else None,
        row_elements=sum(tensor.numel() for tensor in tensors) // max(rows, 1),
        row_tokens=max(1, main.shape[1] if main.dim() in (2, 3) else 1),
    )


def _watched(run: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], int]:
    """The outputs of `run()`, and by how many bytes the process's memory rose at most meanwhile."""
    before = memory.resident_bytes()
    memory.restart_peak()
    outputs = run()
    return outputs, max(0, memory.recent_peak_bytes() - before)
