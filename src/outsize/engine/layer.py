"""A visit of a layer: forward without keeping a graph, backward by computing again with one.

One `torch.autograd.Function` per visit keeps the block's inputs and nothing else. Its backward fetches the block again,
runs it tile by tile with a graph, and adds each parameter's gradient to the block's sum as soon as autograd has it.
RNG and autocast are those of the forward. Source: Chen et al., "Training deep nets with sublinear memory cost" (2016);
the block as the unit of transfer is ours.

Where the placement says so, the graph of a block whose weights stay waits for the backward: more memory, and a third less
computing. It is the graph that the backward would make, so no number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.batch import Gradients, Graph, Graphs, Tensors, Tile, TiledOutput, UnevenTiles
from outsize.engine.compiled import is_failure
from outsize.engine.effects import CapturedOutputs, Nested, flatten, has_containers, is_cache, is_stateful
from outsize.engine.hooks import HookWatch, has_user_hooks, inside, without_user_hooks
from outsize.engine.modulestate import ModuleState
from outsize.engine.rng_autocast import Autocast, RngState
from outsize.engine.rng_autocast import versions as versions_of
from outsize.engine.visits import PointVisits, Visits
from outsize.errors import ModelError, UsageError
from outsize.model import Binding, Point
from outsize.plan.workload import BatchDims
from outsize.store.recovery import undone_by


@contextmanager
def installed(root: nn.Module, bindings: Sequence[Binding], values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, each bound parameter is the plain tensor `values[binding.parameter]`."""
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (root.get_submodule(b.module)._parameters, b.attribute, values[b.parameter]) for b in bindings
    ]
    before = [parameters[attribute] for parameters, attribute, _ in places]

    def put_back() -> None:
        for (parameters, attribute, _), placeholder in zip(places, before, strict=True):
            parameters[attribute] = placeholder

    with undone_by(put_back):
        for parameters, attribute, value in places:
            parameters[attribute] = value
        yield


@dataclass(eq=False)
class LayerCall:
    """One visit's arguments apart from its tensors, and what its recomputation needs."""

    layer: Layer
    arguments: Nested
    randomness: RngState
    autocast: Autocast
    captured: CapturedOutputs
    trains: bool = False
    differentiates: bool = False
    """Whether the visit gets a backward."""
    dims: BatchDims | None = None
    tiles: tuple[Tile, ...] = ()
    training: tuple[bool, ...] = ()
    keeps_graphs: bool = False
    draws: bool = False
    """Whether the forward drew random numbers: its backward must draw the same."""
    row_tokens: int = 1
    """Of a row of the running call."""
    state: ModuleState | None = None
    """Of before the forward, where the layer changes buffers or attributes in it: each repetition starts from that."""
    hooks: HookWatch | None = None
    """Where users registered hooks inside the layer."""
    output: Nested | None = None
    """The structure of what the layer returned."""

    def run(self, tensors: Tensors) -> Tensors:
        """Run the layer's own forward on `tensors`; the tensors among its outputs and through its side door."""
        leaves = self.arguments.filled(tensors)
        args, kwargs = tree_unflatten(leaves, self.arguments.spec)
        with self.captured.catch() as caught:
            result = self._compute(args, kwargs)
        self._check_containers(leaves, (args, kwargs))
        output, outputs = Nested.apart(result)
        self.output = self.output or output
        return outputs + caught.tensors()

    def run_with_graph(self, tensors: Tensors, tile: Tile) -> Graph:
        """Run one tile with a graph that begins at its inputs and at the parameters."""
        inputs = [
            part.detach().requires_grad_(whole.requires_grad)
            for part, whole in zip(self.cut(tensors, tile), tensors, strict=True)
        ]
        with self.autocast.restore(), torch.enable_grad():
            outputs = self.run(inputs)
        return Graph(inputs, outputs, [output._version for output in outputs])

    def cut(self, tensors: Tensors, tile: Tile) -> Tensors:
        """The parts of the layer's tensors that belong to a tile."""
        if self.dims is None:
            return tensors
        return [tile.of(tensor, dim) for tensor, dim in zip(tensors, self.dims.inputs, strict=True)]

    def _check_containers(self, leaves: Sequence[Any], arguments: Any) -> None:
        """Refuse a change of a list or dict among the arguments: the layer was given a copy of it."""
        if not has_containers(self.arguments.spec):
            return
        after, spec = flatten(arguments)
        if spec != self.arguments.spec or any(a is not b for a, b in zip(leaves, after, strict=True)):
            raise UsageError(
                f"{self.layer.point.module} changes a list or dict that it is given: the change would be lost",
                hint="let its forward return what it adds",
            )

    def _compute(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The layer's forward: compiled, where that serves, or as it is."""
        layer = self.layer
        if not self.is_compiled:
            return layer.original(*args, **kwargs)
        return layer.visits.compiler.run(layer.module, layer.original, args, kwargs)

    @property
    def is_stateful(self) -> bool:
        """Whether the layer is given an object that it may change, such as a cache."""
        return any(map(is_stateful, self.arguments.leaves))

    @property
    def skips_hooks(self) -> bool:
        """Whether hooks of users are left out of the recomputation: they only looked on in the forward."""
        return self.hooks is not None and not self.hooks.has_changed

    @property
    def is_compiled(self) -> bool:
        """Whether the layer's forward is compiled; not where a cache grows, or hooks record something inside."""
        is_plain = not self.captured.keys and not self.is_stateful and self.hooks is None
        layer = self.layer
        return is_plain and layer.is_repeated and layer.visits.compiler.serves(layer.module)

    def result(self, outputs: Tensors) -> Any:
        """The visit's result in the shape the layer gave it, with `outputs` in place; side doors are served."""
        assert self.output is not None
        count = len(self.output.positions)
        self.captured.pass_on(outputs[count:])
        return self.output.whole(outputs[:count])


@final
class Layer(PointVisits[nn.Module]):
    """A point whose module runs as a whole on its blocks."""

    def __init__(self, visits: Visits, point: Point, module: nn.Module, *, is_repeated: bool) -> None:
        super().__init__(visits, point, module)
        self.is_repeated = is_repeated
        """Whether it has matrices, and other layers of the model are of its class."""
        self.inner = inside(module)
        self.has_batch_statistics = any(
            isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules()
        )

    def call_of(self, args: Args, kwargs: Kwargs) -> tuple[LayerCall, list[Tensor]]:
        """A visit with these arguments, and the tensors among them."""
        arguments, tensors = Nested.apart((args, kwargs), flatten)
        device = self.visits.model.device
        return LayerCall(
            self,
            arguments,
            RngState.current(device),
            Autocast.current(device),
            CapturedOutputs.current(),
            trains=self.visits.model.differentiates(self.blocks, ()),
            differentiates=self.visits.model.differentiates(self.blocks, tensors),
        ), tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as a visit."""
        call, tensors = self.call_of(args, kwargs)
        self._decide_tiles(call, tensors)
        call.training = tuple(module.training for module in self.module.modules())
        call.keeps_graphs = self.visits.keeps_graphs(self.blocks)
        if not call.differentiates:
            return call.result(self.forward(call, tensors))
        if any(map(is_cache, call.arguments.leaves)):
            raise UsageError(
                f"{self.point.module} is given a cache while gradients are on: recomputation would fill it twice",
                hint="pass use_cache=False",
            )
        # A saved graph holds the inputs anyway.
        offload = None if call.keeps_graphs else self.visits.backing.offload
        graphs = Graphs()
        forward = partial(self._save_and_forward, call, graphs)
        backward = partial(self._take_and_go_back, call, graphs)
        with offload.keep(tensors, self.blocks[-1]) if offload is not None else nullcontext():
            outputs = self.compute(forward, backward, *tensors)
        return call.result(outputs)

    def _save_and_forward(self, call: LayerCall, graphs: Graphs, *tensors: Tensor) -> tuple[Tensors, Tensors]:
        """Run the layer's forward, whose backward needs `tensors`, and fill `graphs`."""
        versions = versions_of(tensors)
        outputs = self.forward(call, tensors, graphs)
        if versions != versions_of(tensors):
            raise UsageError(
                f"{self.point.module} changes its input in place: its recomputation would start from the change",
                hint="let its forward make a new tensor",
            )
        return outputs, tensors

    def _take_and_go_back(
        self,
        call: LayerCall,
        graphs: Graphs,
        saved: Tensors,
        gradients: Gradients,
    ) -> Gradients:
        """Run the layer's backward, through `graphs` as far as they are valid."""
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in saved]
        # Nothing but the node holds the graphs, and a second backward computes again.
        graphs = self.visits.oom_retry.take(graphs)
        if not all(graph.is_current for graph in graphs.values()):
            graphs.clear()
        return self.backward(call, tensors, gradients, graphs)

    def _decide_tiles(self, call: LayerCall, tensors: Tensors) -> None:
        """Cut the batch, unless something else than the layer's tensors depends on it."""
        current, name = self.visits.call, self.point.module
        depends_on_batch = self.has_batch_statistics and self.module.training
        call.state = ModuleState(self.module) if depends_on_batch or name in current.changing else None
        call.hooks = HookWatch() if has_user_hooks(self.inner) else None
        may_cut = not (depends_on_batch or call.is_stateful or call.hooks is not None)
        call.dims, call.tiles = current.tiles(name, tensors, may_cut=may_cut)
        call.row_tokens = current.row_tokens

    # -- the two directions ----------------------------------------------------------------------------------------

    def forward(self, call: LayerCall, tensors: Tensors, graphs: Graphs | None = None) -> Tensors:
        """Run all tiles; the whole batch at once where an output turns out to depend on all of it.

        With `graphs`, which are added there where they are to be kept, it computes as its backward will.
        """
        with (
            self.visits.forward(self.blocks, as_leaves=graphs is not None) as values,
            installed(self.visits.model.module, self.point.bindings, values),
            torch.no_grad(),
        ):
            versions = {name: value._version for name, value in values.items()}
            try:
                outputs = self._run_tiles(call, tensors, graphs)
            except UnevenTiles:
                call.dims, call.tiles = None, self.visits.call.keep_whole(self.point.module)
                call.randomness.put_back()
                outputs = self._run_tiles(call, tensors, graphs)
            call.draws = not call.randomness.is_now()
            if call.state is not None:
                call.state.forget_undrawn()
            for name, value in values.items():
                if value._version != versions[name]:
                    raise UsageError(
                        f"{self.point.module} changes {name} in its forward: the change would be lost with the slot",
                        hint="change weights before outsize.wrap (nn.Embedding: leave max_norm out)",
                    )
            return [self._own(output, values) for output in outputs]

    def _run_tiles(self, call: LayerCall, tensors: Tensors, graphs: Graphs | None) -> Tensors:
        dims, oom_retry = call.dims, self.visits.oom_retry
        outputs = TiledOutput(dims.outputs if dims else None)
        if graphs is not None:
            graphs.clear()
            oom_retry.keep(graphs)

        def run(tile: Tile) -> None:
            if graphs is None:
                outputs.add(tile, call.run(call.cut(tensors, tile)))
                return
            keeps = call.keeps_graphs and oom_retry.keeps_graphs
            with nullcontext() if keeps else _saving_nothing():
                graph = call.run_with_graph(tensors, tile)
            outputs.add(tile, [output.detach() for output in graph.outputs])
            if keeps:
                graphs[tile] = graph

        may_repeat = self._repeatable(call, tensors)
        with call.hooks.watching(self.module) if call.hooks is not None else nullcontext():
            call.tiles = self._in_tiles(call, run, may_cut=dims is not None, may_repeat=may_repeat)
        return outputs.tensors

    def _in_tiles(
        self,
        call: LayerCall,
        compute: Callable[[Tile], None],
        *,
        may_cut: bool,
        may_repeat: Callable[[], bool],
    ) -> tuple[Tile, ...]:
        """Compute the tiles of a call, or smaller ones where memory runs out and they `may_cut`; return those computed."""

        def attempt(tile: Tile) -> None:
            if call.state is not None:
                call.state.restore()
            compute(tile)

        run = self._compiled_or_not(call, attempt)
        tiles = self.visits.oom_retry.compute(call.tiles, run, may_cut=may_cut, may_repeat=may_repeat)
        if tiles != call.tiles:
            self.visits.shrink_tiles(max(tile.stop - tile.start for tile in tiles), call.row_tokens)
        return tiles

    def _compiled_or_not(self, call: LayerCall, attempt: Callable[[Tile], None]) -> Callable[[Tile], None]:
        """`attempt`, and where a compiler fails, which is before anything is computed, the same as the layer is.

        In the dry run it did not: later calls have other shapes, or are given other tensors.
        """
        if not call.is_compiled:
            return attempt

        def run(tile: Tile) -> None:
            before = RngState.current(self.visits.model.device)
            try:
                attempt(tile)
                return
            except Exception as error:
                if not is_failure(error):
                    raise
                self.visits.compiler.give_up(self.module, error)
                if call.draws:
                    raise ModelError(
                        f"the backward of {self.point.module} cannot be compiled, and would draw other random numbers "
                        f"than its compiled forward: {error}",
                        hint="leave compile out",
                    ) from error
            before.put_back()
            attempt(tile)

        return run

    def _repeatable(self, call: LayerCall, tensors: Tensors) -> Callable[[], bool]:
        """Says, after a part of the layer ran, whether it can be repeated: it changed nothing that it was given."""
        if not self.visits.oom_retry.is_on:
            return lambda: False
        changing = [*tensors, *(self.module.buffers() if call.state is None else ())]
        versions = versions_of(changing)
        return lambda: not call.is_stateful and versions == versions_of(changing)

    def backward(
        self,
        call: LayerCall,
        tensors: Tensors,
        gradients: Gradients,
        graphs: Graphs,
    ) -> list[Tensor | None]:
        """Go back through all tiles, add to the blocks' gradients, and return the inputs' gradients.

        `graphs` are those that the forward kept; tiles that have none are run again.
        """
        dims = call.dims
        totals: list[Tensor | None] = [None] * len(tensors)
        unchanged, had_graphs = self._repeatable(call, tensors), bool(graphs)

        def go_back(tile: Tile) -> None:
            graph = graphs.pop(tile, None) or call.run_with_graph(tensors, tile)
            outputs = graph.outputs
            # Every tile computes an output without a batch again; its gradient belongs to one of them.
            output_dims = dims.outputs if dims and not tile.is_whole else (0,) * len(outputs)
            pairs = [
                (output, tile.of(gradient, dim))
                for output, gradient, dim in zip(outputs, gradients, output_dims, strict=True)
                if gradient is not None and output.requires_grad and (dim is not None or tile.start == 0)
            ]
            if pairs:
                torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
            _collect(totals, graph.inputs, tensors, tile, dims)

        # Only tiles of the forward are known to agree on outputs without a batch, and to draw what it drew.
        agrees = dims is not None and (len(call.tiles) > 1 or None not in dims.outputs)
        with (
            self.visits.backward(self.blocks) as values,
            installed(self.visits.model.module, self.point.bindings, values),
            call.randomness.restored(),
            call.state.apart(self.module) if call.state is not None else nullcontext(),
            without_user_hooks(self.module, with_own=False) if call.skips_hooks else nullcontext(),
            _training(self.module, call.training),
            torch.enable_grad(),
        ):
            self._in_tiles(
                call,
                go_back,
                may_cut=agrees and not call.draws,
                may_repeat=lambda: unchanged() and not (call.draws and had_graphs),
            )
        return totals

    def _own(self, output: Tensor, values: dict[str, Tensor]) -> Tensor:
        """`output`, copied where it is a view of a slot that will soon hold other weights."""
        storage = output.untyped_storage().data_ptr()
        is_view = any(value.untyped_storage().data_ptr() == storage for value in values.values())
        return output.clone() if is_view else output


def _saving_nothing() -> AbstractContextManager[object]:
    """Inside, a graph saves no tensor: it cannot be gone back through, and takes no memory.

    Kernels are chosen by whether a gradient is wanted (attention with a bias that is learned, products that fold their
    batch). A forward that computed without a graph would differ from its own recomputation, and from a kept graph, in the
    last bits.
    """
    return torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing)


def _nothing(saved: Any) -> Any:
    return None


@contextmanager
def _training(module: nn.Module, flags: Sequence[bool]) -> Iterator[None]:
    """Inside, every submodule is in training or evaluation as it was in the forward."""
    before = [child.training for child in module.modules()]

    def put_back() -> None:
        for child, flag in zip(module.modules(), before, strict=True):
            child.training = flag

    with undone_by(put_back):
        for child, flag in zip(module.modules(), flags, strict=True):
            child.training = flag
        yield


def _collect(
    totals: list[Tensor | None], inputs: Tensors, wholes: Tensors, tile: Tile, dims: BatchDims | None
) -> None:
    """Put the gradients of a tile's inputs into the whole ones: side by side along the batch, else summed."""
    found = [
        (index, part.grad, None if dims is None or tile.is_whole else dims.inputs[index])
        for index, part in enumerate(inputs)
        if part.grad is not None
    ]
    for index, _, dim in found:
        if dim is not None and totals[index] is None:
            # Memory that is not there is missed before anything is added.
            totals[index] = torch.zeros_like(wholes[index])
    for index, gradient, dim in found:
        total = totals[index]
        if tile.is_whole or total is None:
            totals[index] = gradient
        elif dim is None:
            total.add_(gradient)
        else:
            tile.of(total, dim).copy_(gradient)


@final
class Loose(PointVisits[nn.Module]):
    """A module that owns parameters beside other points: they are installed, as values, while its forward runs."""

    def __init__(self, visits: Visits, point: Point, module: nn.Module) -> None:
        super().__init__(visits, point, module)
        self.parameters = list(dict.fromkeys(binding.parameter for binding in point.bindings))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with its own parameters in place."""
        values = self.compute(self.forward, self.backward)
        return self.run(values, args, kwargs)

    def run(self, values: Tensors, args: Args, kwargs: Kwargs) -> Any:
        """The module's own forward, with `values` as its parameters."""
        named = dict(zip(self.parameters, values, strict=True))
        with installed(self.visits.model.module, self.point.bindings, named):
            return self.original(*args, **kwargs)

    def forward(self) -> tuple[Tensors, Tensors]:
        """Copy the parameters."""
        with self.visits.forward(self.blocks) as values:
            return [values[name].clone() for name in self.parameters], ()

    def backward(self, saved: Tensors, gradients: Gradients) -> Tensors:
        """Add to the parameters' gradients."""
        with self.visits.backward(self.blocks, needs_weights=False):
            for name, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    self.visits.add_gradient(name, gradient)
        return ()
