"""Visits of blocks, as the points of a model make them: weights to compute with, sums to add gradients to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from outsize.block import Entry
from outsize.config import Home, format_bytes
from outsize.engine.batch import Gradients, Tensors
from outsize.engine.budget import Budget
from outsize.engine.compiled import Compiler
from outsize.engine.current_call import CurrentCall
from outsize.engine.model import Model
from outsize.engine.oom_retry import OomRetry
from outsize.engine.parameters import Backing
from outsize.errors import UsageError
from outsize.model import Point
from outsize.plan import Direction, Visit
from outsize.store.state import BlockState

Forward = Callable[..., tuple[Tensors, Tensors]]
"""Maps the tensors of a visit to its outputs and to the tensors that its backward needs."""

Backward = Callable[[Tensors, Gradients], Gradients]
"""Maps the tensors that the forward saved and the gradients of its outputs to the gradients of its inputs."""


class _Node(torch.autograd.Function):
    """A visit as autograd sees it. The anchor requires grad, so that a visit without differentiable inputs gets a backward.

    The node must not hold the tensors of the forward but by `save_for_backward`: the garbage collector does not see it.
    """

    @staticmethod
    def forward(
        ctx: Any, forward: Forward, backward: Backward, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.go_back = backward
        ctx.set_materialize_grads(False)
        outputs, saved = forward(*tensors)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*[o for o in outputs if not (o.is_floating_point() or o.is_complex())])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return None, None, None, *ctx.go_back(ctx.saved_tensors, gradients)


def as_node(forward: Forward, backward: Backward, anchor: Tensor, *tensors: Tensor) -> Tensors:
    """Run `forward(*tensors)` as one node of autograd's graph, which `backward` goes back through."""
    outputs: tuple[Tensor, ...] = _Node.apply(forward, backward, anchor, *tensors)  # type: ignore[no-untyped-call]
    return outputs


@final
class Visits:
    """The blocks of `model`, visited one point at a time: through the executor's plan, within the budget."""

    def __init__(
        self,
        model: Model,
        backing: Backing,
        budget: Budget,
        call: CurrentCall,
        compiler: Compiler,
        *,
        retries: bool,
    ) -> None:
        self.model = model
        self.backing = backing
        self.call = call
        self.compiler = compiler
        self.oom_retry = OomRetry(retries, model.device, self._evict)
        self._budget = budget

    def forward(
        self, blocks: Sequence[str], *, as_leaves: bool = False
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """The parameters in `blocks` by name: as plain views, or as leaves of a graph that outlives the visit."""
        visits = [Visit(name, Direction.FORWARD, joins_next=name != blocks[-1]) for name in blocks]
        return self._visit(visits, self._leaves if as_leaves else self._values, self._budget.visit_bytes)

    def backward(
        self, blocks: Sequence[str], *, needs_weights: bool = True
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """As `forward`; trainable parameters are leaves whose gradients go to the block's sum as they arise."""
        # Calls without a graph may have come since, and be smaller.
        call = self.call.last_training
        visit_bytes = self._budget.visit_bytes if call is None else call.visit_bytes
        visits = self.model.backward_visits(blocks, needs_weights)
        return self._visit(visits, self._leaves if needs_weights else lambda _: {}, visit_bytes)

    @contextmanager
    def _visit(
        self,
        visits: Sequence[Visit],
        values_of: Callable[[BlockState], dict[str, Tensor]],
        visit_bytes: int,
    ) -> Iterator[dict[str, Tensor]]:
        make_room = partial(self._budget.make_room, visit_bytes)
        with self._budget.guarded(), self.backing.running.visit(visits, make_room) as states:
            yield {name: value for state in states for name, value in values_of(state).items()}

    def num_steps(self, blocks: Sequence[str]) -> tuple[int, ...]:
        """The number of updates of each block so far."""
        if self.backing.executor is None:
            return ()
        return tuple(self.backing.store[name].update.num_steps for name in blocks)

    def add_gradient(self, parameter: str, gradient: Tensor) -> None:
        """Add to the gradient of a whole parameter whose block is visited backward."""
        (at,) = self.model.parameters.locations(parameter)
        state = self.backing.store[at.block]
        if self._collects(state.record.entries[at.index]):
            self.backing.store.gradients.add(state, at.index, gradient)

    def gradient_sum(self, block: str, parameter: str) -> Tensor | None:
        """The sum of the rows of `parameter` in `block`, to be added to; None if the parameter is frozen."""
        state, gradients = self.backing.store[block], self.backing.store.gradients
        for index, entry in enumerate(state.record.entries):
            if entry.piece.parameter == parameter and self._collects(entry):
                return gradients.open_sum(state, index)
        return None

    def keeps_graphs(self, blocks: Sequence[str]) -> bool:
        """Whether a visit to `blocks` saves its graph for the backward."""
        placement = self._budget.placement
        return placement is not None and placement.kept.issuperset(blocks) and self.oom_retry.keeps_graphs

    def shrink_tiles(self, rows: int, row_tokens: int) -> None:
        """Compute at most `rows` rows at once from now on, of `row_tokens` each; in calls to come, as many tokens."""
        before = self.call.shrink_tiles(rows)
        self._budget.shrink_tiles(rows * row_tokens)
        if before:
            self.oom_retry.note(f"blocks compute {rows} rows at once instead of {before}")

    # -- helpers -------------------------------------------------------------------------------------------------

    def _values(self, state: BlockState) -> dict[str, Tensor]:
        views = state.planes.pieces()
        return {e.piece.parameter: view for e, view in zip(state.record.entries, views, strict=True)}

    def _leaves(self, state: BlockState) -> dict[str, Tensor]:
        leaves = self._values(state)
        for index, entry in enumerate(state.record.entries):
            if self._collects(entry):
                leaf = leaves[entry.piece.parameter].detach().requires_grad_()
                leaf.register_post_accumulate_grad_hook(partial(self._collect, state, index))
                leaves[entry.piece.parameter] = leaf
        return leaves

    def _collect(self, state: BlockState, index: int, leaf: Tensor) -> None:
        """Move the gradient of `leaf`, entry `index` of a block, to the block's sum."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if self._collects(state.record.entries[index]):  # still: a saved graph is older than its backward
            add = partial(self.backing.store.gradients.add, state, index, gradient)
            self.oom_retry.add((state.name, index), add)

    def _collects(self, entry: Entry) -> bool:
        return entry.trainable and self.model.parameters[entry.piece.parameter].requires_grad

    def _evict(self) -> bool:
        """Move a resident block from the device to host memory; return False if no block can move or none would fit."""
        executor, budget = self.backing.executor, self._budget
        if executor is None or not executor.store.planes.link:
            return False
        chosen = executor.evict(
            lambda state: (
                state.name not in budget.always_resident
                and budget.has_room_for(state.planes.num_bytes_in(Home.DEVICE))
            )
        )
        if chosen is None:
            return False
        budget.use(executor.store.placement)
        self.oom_retry.keeps_graphs = False  # a graph's weights stay where they are
        num_bytes = chosen.planes.num_bytes_in(Home.HOST)
        self.oom_retry.note(f"{chosen.name} stays in the host's memory, {format_bytes(num_bytes)}")
        return True


M = TypeVar("M", bound=nn.Module)


class PointVisits(ABC, Generic[M]):
    """What the forward of a point's module becomes: visits of its blocks."""

    def __init__(self, visits: Visits, point: Point, module: M) -> None:
        self.visits = visits
        self.point = point
        self.blocks = point.blocks
        self.module = module
        self.original: Callable[..., Any] = module.forward
        """The module's own forward."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward would return."""

    def compute(self, forward: Forward, backward: Backward, *tensors: Tensor) -> Tensors:
        """The outputs of `forward(*tensors)`, a visit; `backward` is run where it gets one.

        That raises UsageError if weights are others than the forward's, or if it must not add to the gradients of
        parameters: both would be silently wrong.
        """
        if not self.visits.model.differentiates(self.blocks, tensors):
            return forward(*tensors)[0]
        before = self.visits.num_steps(self.blocks)

        def checked(saved: Tensors, gradients: Gradients) -> Gradients:
            if self.visits.num_steps(self.blocks) != before:
                raise UsageError(
                    f"the weights of {self.point.module} were updated between its forward and its backward",
                    hint="call backward() before optimizer.step()",
                )
            if not torch.autograd._is_checkpoint_valid():
                raise UsageError(
                    f"torch.autograd.grad, or backward(inputs=...), through {self.point.module}: a visit adds to the "
                    "gradients of its parameters, which that must not do",
                    hint="call loss.backward() and read .grad",
                )
            return backward(saved, gradients)

        return as_node(forward, checked, self.visits.model.anchor, *tensors)
