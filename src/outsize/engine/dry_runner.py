"""Dry runs of a call at two small batch sizes, and the workload that they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.batch import find_dims
from outsize.engine.dry_run import AnyPoint, DryRun, Findings
from outsize.engine.effects import Repeatable, copied
from outsize.engine.hooks import without_user_hooks
from outsize.engine.modulestate import ModuleState
from outsize.engine.rng_autocast import RngState
from outsize.engine.visits import Visits
from outsize.errors import OutsizeError
from outsize.plan.workload import Activations, BatchDims, BatchShape, Linear, LossMemory, Workload

SMALL_ROWS = (2, 3)
"""The two batch sizes; coprime, so that a dimension grows with the batch only if it is one."""


@final
class DryRunner:
    """Makes dry runs of a model; its own state, the caller's random numbers and buffers stay as they are."""

    def __init__(
        self,
        visits: Visits,
        points: Mapping[str, AnyPoint],
        forward: Callable[..., Any],
    ) -> None:
        self._visits = visits
        self._model = visits.model
        self._points = points
        self._forward = forward

    def workload(self, args: Args, kwargs: Kwargs, shape: BatchShape) -> Workload:
        """What a call with `args` and `kwargs` does and takes. Raises what the model does."""
        found, uncut = self._with_few_rows(args, kwargs, shape.rows)
        if not found:
            found = {shape.rows or 1: self._run(*copied((args, kwargs)))}
        leaves = tree_flatten((args, kwargs))[0]
        pages_bytes = sum(leaf.pages_bytes for leaf in leaves if isinstance(leaf, Repeatable))
        return replace(_combined(found, shape, uncut), pages_bytes=pages_bytes)

    def walk(self, kwargs: Kwargs) -> None:
        """Run the model's own forward, computing every layer, for what looks on. Nothing is read or placed."""
        self._run((), kwargs, sees_all=True)

    def _with_few_rows(self, args: Args, kwargs: Kwargs, rows: int | None) -> tuple[dict[int, Findings], str]:
        """Dry runs of 2 and of 3 rows of the batch, or none and why the model cannot compute a part of it."""
        if rows is None or rows == 1:
            return {}, ""
        found: dict[int, Findings] = {}
        try:
            hardest = _hardest_rows(kwargs, rows).cpu()
            for count in SMALL_ROWS:
                index = hardest[torch.arange(count, device="cpu") % rows]
                taken = tree_map_only(Tensor, partial(_take, rows, index), copied((args, kwargs), index))
                found[count] = self._run(*taken)
        except (OutsizeError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except (
            Exception
        ) as error:  # the whole batch, which is tried next, shows whether the call itself is wrong
            why = f"the model cannot compute {count} of its {rows} rows ({type(error).__name__}: {error})"
            return {}, why
        return found, ""

    def _run(self, args: Args, kwargs: Kwargs, *, sees_all: bool = False) -> Findings:
        module, call = self._model.module, self._visits.call
        dry_run = DryRun(self._visits, self._points, sees_all=sees_all)
        state = ModuleState(module, with_hooks=True)
        args, kwargs = self._model.arguments.moved(args, kwargs)
        num_handles = len(call.handles)
        call.dry_answer = dry_run.answer
        try:
            with (
                RngState.current(self._model.device).restored(),
                without_user_hooks(module),
            ):
                output = self._forward(*args, **kwargs)
                if torch.is_grad_enabled():
                    _backward(output)
        finally:
            call.dry_answer = None
            call.seal_handles(num_handles)  # else the graph would be there still when memory is planned
            state.restore()
        return dry_run.found


def batch_shape(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> BatchShape:
    """The batch of a call: every tensor argument has the rows (or 1, or no dimension) as its first dimension."""
    main = kwargs.get(getattr(module, "main_input_name", "input_ids"))
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if not isinstance(main, Tensor) or not main.dim():
        main = tensors[0] if tensors else torch.empty(1, dtype=torch.float32, device="cpu")
    rows = main.shape[0]
    return BatchShape(
        rows=rows if tensors and all(tensor.shape[0] in (1, rows) for tensor in tensors) else None,
        row_elements=sum(tensor.numel() for tensor in tensors) // max(rows, 1),
        row_tokens=max(1, main.shape[1] if main.dim() in (2, 3) else 1),
    )


def _combined(found: Mapping[int, Findings], shape: BatchShape, uncut: str) -> Workload:
    """The workload that dry runs show, by their rows: with two of them, also what grows with the batch."""
    first, last = found[min(found)], found[max(found)]
    dims = _dims(first, last) if len(found) == 2 else {}

    def line(figure: Callable[[Findings], float]) -> Linear:
        return Linear.through({rows: float(figure(each)) for rows, each in found.items()})

    return Workload(
        visits=tuple(first.visits),
        row_elements=shape.row_elements,
        rows=min(found),
        dims=dims,
        boundary_bytes=line(lambda each: each.saved_bytes),
        movable_bytes=line(lambda each: each.movable_bytes),
        input_bytes=line(lambda each: each.input_bytes),
        sent_bytes={block: line(lambda each, b=block: each.sent_bytes[b]) for block in first.sent_bytes},  # type: ignore[misc]
        tile_bytes=line(lambda each: each.tile_bytes),
        loss_memory=LossMemory(
            line(lambda each: each.whole_bytes),
            line(lambda each: each.loss_tile_bytes),
            last.most_loss_tile_bytes,
            line(lambda each: each.beside_loss_bytes),
        ),
        kinds=tuple(sample.kind(dims.get(sample.layer.point.module), min(found)) for sample in first.samples),
        kind_of=first.kind_of,
        changing=frozenset(first.changing | last.changing),
        uncut=uncut,
        activations=tuple(
            Activations(
                blocks,
                dims.get(module) is not None,
                line(lambda each, m=module: each.activations[m][1]),  # type: ignore[misc]
            )
            for module, (blocks, _) in first.activations.items()
            if module in last.activations
        ),
    )


def _dims(first: Findings, last: Findings) -> dict[str, BatchDims | None]:
    """The batch dimensions of each layer's tensors, by module, from their shapes at both batch sizes."""
    dims: dict[str, BatchDims | None] = {}
    for module, (inputs, outputs) in first.shapes.items():
        others = last.shapes.get(module, ([], []))
        ins = find_dims(inputs, others[0], *SMALL_ROWS)
        outs = find_dims(outputs, others[1], *SMALL_ROWS)
        is_unclear = ins is None or outs is None or module in first.uncut | last.uncut
        dims[module] = None if is_unclear or ins is None or outs is None else BatchDims(ins, outs)
    return dims


def _hardest_rows(kwargs: Kwargs, rows: int) -> Tensor:
    """All rows, those with most padding first: models make a mask only where there is something to mask."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[0] != rows:
        return torch.arange(rows, device="cpu")
    return mask.reshape(rows, -1).sum(1).argsort(stable=True)


def _take(rows: int, index: Tensor, tensor: Tensor) -> Tensor:
    """The rows `index` of a tensor that has a batch of `rows`."""
    return (
        tensor.index_select(0, index.to(tensor.device))
        if tensor.dim() and tensor.shape[0] == rows
        else tensor
    )


def _backward(output: Any) -> None:
    """Go back from the loss or, if the model returns none, from everything it returns."""
    loss = getattr(output, "loss", None)
    leaves = [loss] if isinstance(loss, Tensor) else tree_flatten(output)[0]
    roots = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
