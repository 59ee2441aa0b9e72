"""A visit of the output head: logits, or the loss without them.

The head is a table of row blocks. With labels the head's output is a handle; when the model hands it to
`loss_function`, the loss is computed row block by row block and tile of tokens by tile, with an online log-sum-exp
(Milakov and Gimelshein, 2018), and its backward computes each tile's logits once more: no tensor is ever sized by
tokens times vocabulary. Anything else that touches the handle before the call ends gets real logits, so a model that
transforms them (Gemma 2) or computes a loss of its own (T5) is right as well, at the price of their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from outsize.engine.arguments import Arguments
from outsize.engine.batch import Tile, tiles
from outsize.engine.current_call import CurrentCall
from outsize.engine.model import Model
from outsize.engine.oom_retry import ALONE
from outsize.engine.rng_autocast import Autocast, outside_inference_mode
from outsize.engine.visits import Visits
from outsize.errors import UsageError
from outsize.model import Point

TILE_ELEMENTS = 1 << 24
"""Elements of one tile of logits on a CPU; a constant, so that tiles never depend on placement or budget."""

TILE_ELEMENTS_ON_DEVICE = 1 << 26
"""The same on an accelerator, which needs more to be busy."""

_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
    ),
}


class LogitsSource(Protocol):
    """Computes what a handle of logits stands for, from hidden states `[..., h]`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]`, with a graph if gradients are on."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` without a graph."""

    def loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, ignore_index: int
    ) -> tuple[torch.Tensor, int]:
        """The sum of cross-entropies over targets that are not ignored, and their number."""


@final
class Head:
    """A point whose module is the output `nn.Linear`, its rows in blocks."""

    def __init__(self, visits: Visits, point: Point, module: nn.Linear) -> None:
        self.visits = visits
        self._model = visits.model
        self.point = point
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self.blocks = point.blocks
        names = {binding.attribute: binding.parameter for binding in point.bindings}
        self.weight = names["weight"]
        self.bias = names.get("bias")
        self.tile_elements = tile_elements(self._model.torch_device)
        """Of a tile of logits; fewer once there was no memory for as many."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of hidden states `[..., h]`; a handle while a call with labels runs."""
        if self.visits.call.has_labels:
            return Logits(self, input, self.module.out_features, self.visits.call)
        return self.logits(input)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Real logits, as a visit."""
        if not self.differentiates(hidden):
            return self.forward(hidden)
        output: torch.Tensor = _Project.apply(self, self._model.anchor, hidden)  # type: ignore[no-untyped-call]
        return output

    def loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, ignore_index: int
    ) -> tuple[torch.Tensor, int]:
        """The sum of cross-entropies over targets that are not ignored, and their number, as a visit.

        `hidden [..., h]`, `targets [...]`.
        """
        flat, targets = self.counted(hidden, targets, ignore_index)
        if not self.differentiates(hidden):
            autocast = Autocast.current(self._model.device)
            return self.forward_loss(flat, targets, autocast)[0], targets.numel()
        total: torch.Tensor = _TiledLoss.apply(self, self._model.anchor, flat, targets)  # type: ignore[no-untyped-call]
        return total, targets.numel()

    def differentiates(self, hidden: torch.Tensor) -> bool:
        """Whether a visit with `hidden` gets a backward."""
        return torch.is_grad_enabled() and (hidden.requires_grad or self._model.trains(self.blocks))

    def counted(
        self, hidden: torch.Tensor, targets: torch.Tensor, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden [N, h]` and `targets [N]`, on the host, of the positions that are not ignored. Raises UsageError."""
        flat, arguments = hidden.reshape(-1, hidden.shape[-1]), self._model.arguments
        targets = arguments.on_host(targets).reshape(-1)
        if flat.shape[0] != targets.numel():
            raise UsageError(f"{targets.numel()} labels are given for {flat.shape[0]} positions")
        counted = (targets != ignore_index).nonzero().squeeze(1)
        flat = flat.index_select(0, arguments.on_device(counted))
        targets = targets.index_select(0, counted)
        rows = self.module.out_features
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < rows:
            wrong = targets[(targets < 0) | (targets >= rows)][0]
            raise UsageError(
                f"label {int(wrong)} is none of the {rows} that {self.point.module} knows",
                hint=f"mark positions without a label with {ignore_index}",
            )
        return flat, targets

    # -- real logits -----------------------------------------------------------------------------------------------

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """All rows, row block by row block."""
        output: torch.Tensor | None = None
        with torch.no_grad():
            for name, start, stop in self._rows():
                with self.visits.forward((name,)) as values:
                    parts: list[torch.Tensor] = []
                    project = partial(self._project, hidden, values, parts)
                    self.visits.oom_retry.compute(ALONE, project, may_cut=False)
                if output is None:
                    output = parts[0].new_empty(*parts[0].shape[:-1], self.module.out_features)
                output[..., start:stop] = parts[0]
        assert output is not None
        return output

    def _project(
        self, hidden: torch.Tensor, values: dict[str, torch.Tensor], into: list[torch.Tensor], _: Tile
    ) -> None:
        into[:] = [F.linear(hidden, values[self.weight], values[self.bias] if self.bias else None)]

    def backward(
        self, hidden: torch.Tensor, gradient: torch.Tensor, autocast: Autocast, check: Callable[[], None]
    ) -> torch.Tensor:
        """Add to the row blocks' gradients; the gradient of `hidden`."""
        check()
        hidden = hidden.detach().requires_grad_()
        for name, start, stop in reversed(self._rows()):
            with self.visits.backward((name,)) as values, torch.enable_grad(), autocast.restore():
                part = F.linear(hidden, values[self.weight], values[self.bias] if self.bias else None)
                part.backward(gradient[..., start:stop])
        assert hidden.grad is not None
        return hidden.grad

    # -- the loss without logits -----------------------------------------------------------------------------------

    def forward_loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, autocast: Autocast
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(sum of losses [], log-sum-exp [N])` of `hidden [N, h]`, `targets [N]` (on the host: they decide what runs)."""
        count = hidden.shape[0]
        sums = _Sums(
            torch.full((count,), -torch.inf, device=hidden.device, dtype=torch.float32),
            torch.zeros(count, device=hidden.device, dtype=torch.float32),
            torch.zeros(count, device=hidden.device, dtype=torch.float32),
        )
        targets = self._model.arguments.on_device(targets)
        with torch.no_grad():
            for name, start, stop in self._rows():
                with self.visits.forward((name,)) as values:
                    add_tile = partial(self._add_tile, hidden, targets, sums, values, start, autocast)
                    self._in_tiles(count, stop - start, add_tile)
            logsumexp = sums.largest + sums.total.log()
            return (logsumexp - sums.chosen).sum(dtype=torch.float64).float(), logsumexp

    def _add_tile(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        sums: _Sums,
        values: dict[str, torch.Tensor],
        start: int,
        autocast: Autocast,
        tile: slice,
    ) -> None:
        """Take the logits of a tile with the rows from `start` on into `sums`."""
        logits = self._tile(hidden[tile], values, autocast)
        rows = logits.shape[1]
        place = targets[tile] - start
        inside = (place >= 0) & (place < rows)
        picked = logits.gather(1, place.clamp(0, rows - 1).unsqueeze(1)).squeeze(1)
        sums.chosen[tile] = torch.where(inside, picked, sums.chosen[tile])
        _add_to_logsumexp(logits, sums.largest[tile], sums.total[tile])  # last: it is not to be repeated

    def backward_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logsumexp: torch.Tensor,
        scale: torch.Tensor,
        autocast: Autocast,
        check: Callable[[], None],
    ) -> torch.Tensor:
        """Add to the row blocks' gradients; the gradient of `hidden`, `[N, h]`. `scale` is the loss's gradient."""
        check()
        going_back = _GoingBack(
            hidden,
            targets,
            logsumexp,
            scale,
            autocast,
            torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device),
        )
        with torch.no_grad():
            for name, start, stop in reversed(self._rows()):
                with self.visits.backward((name,)) as values:
                    sums = (
                        self.visits.gradient_sum(name, self.weight),
                        self.visits.gradient_sum(name, self.bias) if self.bias else None,
                    )
                    go_back = partial(self._go_back, going_back, values, sums, start)
                    self._in_tiles(hidden.shape[0], stop - start, go_back)
        return going_back.gradient.to(hidden.dtype)

    def _go_back(
        self,
        call: _GoingBack,
        values: dict[str, torch.Tensor],
        sums: tuple[torch.Tensor | None, torch.Tensor | None],
        start: int,
        tile: slice,
    ) -> None:
        """Add what a tile gives to the gradients of `hidden` and of the rows from `start` on."""
        add, hidden, weight = self.visits.oom_retry.add, call.hidden[tile], values[self.weight]
        slope = self._tile(hidden, values, call.autocast).sub_(call.logsumexp[tile].unsqueeze(1)).exp_()
        place = call.targets[tile] - start
        rows = ((place >= 0) & (place < slope.shape[1])).nonzero().squeeze(1)
        places = self._model.arguments.on_device(place[rows])
        slope[self._model.arguments.on_device(rows), places] -= 1
        slope.mul_(call.scale)
        narrow = slope.to(weight.dtype)
        weight_sum, bias_sum = sums
        add("hidden", lambda: call.gradient[tile].add_(narrow @ weight))
        if weight_sum is not None:
            add("weight", lambda: _add_product(weight_sum, narrow.T, hidden.to(narrow.dtype)))
        if bias_sum is not None:
            add("bias", lambda: bias_sum.add_(slope.sum(0)))

    def _in_tiles(self, num_tokens: int, rows: int, compute: Callable[[slice], None]) -> None:
        """Compute tile by tile of tokens, which have `rows` logits each."""
        planned = _token_tiles(num_tokens, rows, self.tile_elements)
        computed = self.visits.oom_retry.compute(planned, lambda tile: compute(slice(tile.start, tile.stop)))
        if computed != planned:
            most = max(tile.stop - tile.start for tile in computed)
            self.tile_elements = most * rows
            before = planned[0].stop
            self.visits.oom_retry.note(f"the loss is computed for {most} tokens at once instead of {before}")

    def _tile(
        self, hidden: torch.Tensor, values: dict[str, torch.Tensor], autocast: Autocast
    ) -> torch.Tensor:
        """fp32 logits `[n, rows]` of one tile of tokens."""
        weight = values[self.weight]
        bias = values[self.bias] if self.bias else None
        with autocast.restore():
            return F.linear(hidden.to(weight.dtype), weight, bias).float()

    def _rows(self) -> list[tuple[str, int, int]]:
        return self._model.parameters.row_blocks(self.weight)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of the logits of each token so far, `[N]`: the largest, the sum of exponentials beside it, and the target's."""

    largest: torch.Tensor
    total: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True, slots=True)
class _GoingBack:
    """A backward through the loss: its arguments, and the gradient of `hidden` so far, in fp32."""

    hidden: torch.Tensor
    targets: torch.Tensor
    logsumexp: torch.Tensor
    scale: torch.Tensor
    autocast: Autocast
    gradient: torch.Tensor


def measured_tiles(
    head: Head, rows: int, num_tokens: int, model: Model
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """One tile of the loss on a row block of zeros, forward and backward, to be timed, and its tokens."""
    width, device = head.module.in_features, model.torch_device
    count = min(num_tokens, max(1, tile_elements(device) // rows))
    hidden = torch.zeros(count, width, dtype=model.dtype, device=device)
    values = {head.weight: torch.zeros(rows, width, dtype=model.dtype, device=device)}
    autocast = replace(Autocast.current(model.device), enabled=False)
    largest, total = (
        torch.zeros(count, device=device, dtype=torch.float32),
        torch.ones(count, device=device, dtype=torch.float32),
    )
    place = torch.zeros(count, 1, dtype=torch.long, device=device)
    gradient = torch.zeros(count, width, device=device, dtype=torch.float32)
    weight_sum = torch.zeros(rows, width, device=device, dtype=torch.float32)

    def logits() -> torch.Tensor:
        weight = values[head.weight]
        with autocast.restore():
            return F.linear(hidden, weight).float()

    def forward() -> None:
        with torch.no_grad():
            tile = logits()
            _add_to_logsumexp(tile, largest, total)
            tile.gather(1, place)

    def backward() -> None:
        with torch.no_grad():
            slope = logits().sub_(total.unsqueeze(1)).exp_().mul_(1.0)
            narrow = slope.to(model.dtype)
            gradient.add_(narrow @ values[head.weight])
            _add_product(weight_sum, narrow.T, hidden)

    return forward, backward, count


def tile_elements(device: torch.device) -> int:
    """Elements of one tile of logits on `device`."""
    return TILE_ELEMENTS if device.type == "cpu" else TILE_ELEMENTS_ON_DEVICE


def _token_tiles(num_tokens: int, rows: int, num_elements: int) -> tuple[Tile, ...]:
    """Tiles of tokens with `rows` logits each, `num_elements` in all; a tile has at least one token."""
    return tuple(tiles(num_tokens, max(1, num_elements // rows)))


def _add_to_logsumexp(logits: torch.Tensor, largest: torch.Tensor, total: torch.Tensor) -> None:
    """Take `logits [n, rows]` into the running maximum and sum `[n]`, in place: all memory is taken before."""
    maximum = torch.maximum(largest, logits.amax(1))
    factor = torch.exp(largest - maximum)
    addition = (logits - maximum.unsqueeze(1)).exp_().sum(1)
    total.mul_(factor).add_(addition)
    largest.copy_(maximum)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, inside the product where the types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, anchor: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        ctx.head, ctx.autocast = head, Autocast.current(head.visits.model.device)
        ctx.check_backward = head.visits.backward_check(head.point)
        ctx.save_for_backward(hidden)
        return head.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        (hidden,) = ctx.saved_tensors
        return None, None, ctx.head.backward(hidden, gradient, ctx.autocast, ctx.check_backward)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, anchor: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        ctx.head, ctx.autocast = head, Autocast.current(head.visits.model.device)
        ctx.check_backward = head.visits.backward_check(head.point)
        loss, logsumexp = head.forward_loss(hidden, targets, ctx.autocast)
        ctx.save_for_backward(hidden, targets, logsumexp)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[None, None, torch.Tensor, None]:
        hidden, targets, logsumexp = ctx.saved_tensors
        gradient = ctx.head.backward_loss(hidden, targets, logsumexp, scale, ctx.autocast, ctx.check_backward)
        return None, None, gradient, None


class Logits(torch.Tensor):
    """Logits that were not computed: their shape and type, and the hidden states they would come from.

    Before the model's call ends, any use computes them with gradients. Afterwards reading computes them without, and is
    refused while gradients are on: that graph would be the memory that tiling saves.
    """

    source: LogitsSource
    hidden: torch.Tensor
    is_sealed: bool
    has_graph: bool

    @staticmethod
    def __new__(
        cls: type[Logits], source: LogitsSource, hidden: torch.Tensor, num_logits: int, call: CurrentCall
    ) -> Logits:
        """Stand for the `num_logits` logits of each of `hidden [..., h]` until `call` is over."""
        self: Logits = torch.Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], num_logits), dtype=hidden.dtype, device=hidden.device
        )
        self.source, self.hidden, self.is_sealed = source, hidden, False
        self.has_graph = torch.is_grad_enabled()
        call.handles.append(self)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what needs no value; compute for everything else."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (torch.Tensor.float, torch.Tensor.contiguous) and not args[0].is_sealed:
            return args[0]  # the loss computes in fp32 anyway
        args, kwargs = tree_map_only(Logits, Logits.compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute where an operation reaches us without the Python interface."""
        args, kwargs = tree_map_only(Logits, Logits.compute, (args, kwargs or {}))
        return func(*args, **kwargs)

    @outside_inference_mode()
    def compute(self) -> torch.Tensor:
        """The logits themselves."""
        if not self.is_sealed:
            return self.source.logits(self.hidden)
        if self.has_graph and torch.is_grad_enabled():
            raise UsageError(
                "logits were not computed, because the loss did not need them",
                hint="read them under torch.no_grad(), or call the model without labels for logits with gradients",
            )
        return self.source.forward(self.hidden)

    def seal(self) -> None:
        """The model's call is over."""
        self.is_sealed = True
        self.hidden = self.hidden.detach()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<logits {tuple(self.shape)} {self.dtype}, computed when read>"


@dataclass(frozen=True, slots=True)
class TiledLoss:
    """Stands in for `ForCausalLMLoss` of transformers: same arguments, same value, no logits."""

    original: Callable[..., torch.Tensor]
    arguments: Arguments

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Mean cross-entropy of each position's logits with the next label, or its sum over `num_items_in_batch`."""
        if not isinstance(logits, Logits) or logits.is_sealed or vocab_size != logits.shape[-1]:
            return self.original(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if shift_labels is None:
            labels = self.arguments.on_host(labels)
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        total, count = logits.source.loss(logits.hidden, shift_labels, ignore_index)
        return total / (count if num_items_in_batch is None else num_items_in_batch)
