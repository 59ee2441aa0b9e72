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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from outsize.engine.arguments import Args, Arguments, Kwargs
from outsize.engine.batch import Gradients, Tensors, Tile, tiles
from outsize.engine.current_call import CurrentCall
from outsize.engine.oom_retry import ALONE
from outsize.engine.rng_autocast import Autocast, outside_inference_mode
from outsize.engine.visits import PointVisits, Visits
from outsize.errors import UsageError
from outsize.model import Point

TILE_ELEMENTS = 1 << 24
"""Elements of one tile of logits on a CPU; a constant, so that tiles never depend on placement or budget."""

TILE_ELEMENTS_ON_DEVICE = 1 << 26
"""The same on an accelerator, which needs more to be busy."""

_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
    ),
}


class LogitsSource(Protocol):
    """Computes what a handle of logits stands for, from hidden states `[..., h]`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]`, with a graph if gradients are on."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` without a graph."""

    def loss(self, hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, int]:
        """The sum of cross-entropies over targets that are not ignored, and their number."""


@final
class Head(PointVisits[nn.Linear]):
    """A point whose module is the output `nn.Linear`, its rows in blocks."""

    def __init__(self, visits: Visits, point: Point, module: nn.Linear) -> None:
        super().__init__(visits, point, module)
        self._model = visits.model
        names = {binding.attribute: binding.parameter for binding in point.bindings}
        self.weight = names["weight"]
        self.bias = names.get("bias")
        self.tile_elements = tile_elements(self._model.torch_device)
        """Of a tile of logits; fewer once there was no memory for as many."""

    def __call__(self, input: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., h]`; a handle while a call with labels runs."""
        if self.visits.call.has_labels:
            return Logits(self, input, self.module.out_features, self.visits.call)
        return self.logits(input)

    def logits(self, hidden: Tensor) -> Tensor:
        """Real logits, as a visit."""
        backward = partial(self._project_backward, Autocast.current(self._model.device))
        return self.compute(self._project, backward, hidden)[0]

    def loss(self, hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, int]:
        """The sum of cross-entropies over targets that are not ignored, and their number, as a visit.

        `hidden [..., h]`, `targets [...]`.
        """
        flat, targets = self.counted(hidden, targets, ignore_index)
        autocast = Autocast.current(self._model.device)
        forward, backward = partial(self._loss, autocast), partial(self._loss_backward, autocast)
        return self.compute(forward, backward, flat, targets)[0], targets.numel()

    def counted(self, hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
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

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` without a graph, row block by row block."""
        output: Tensor | None = None
        with torch.no_grad():
            for name, start, stop in self._rows():
                parts: list[Tensor] = []
                with self.visits.forward((name,)) as values:
                    project = partial(self._rows_of(values, start).project_into, parts, hidden)
                    self.visits.oom_retry.compute(ALONE, project, may_cut=False)
                if output is None:
                    output = parts[0].new_empty(*parts[0].shape[:-1], self.module.out_features)
                output[..., start:stop] = parts[0]
        assert output is not None
        return output

    def _project(self, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [self.forward(hidden)], [hidden]

    def _project_backward(
        self, autocast: Autocast, saved: Tensors, gradients: Gradients
    ) -> tuple[Tensor | None]:
        """Add to the row blocks' gradients; the gradient of the hidden states."""
        (gradient,) = gradients
        assert gradient is not None
        hidden = saved[0].detach().requires_grad_()
        for name, start, stop in reversed(self._rows()):
            with self.visits.backward((name,)) as values, torch.enable_grad(), autocast.restore():
                self._rows_of(values, start).project(hidden).backward(gradient[..., start:stop])
        return (hidden.grad,)

    # -- the loss without logits -----------------------------------------------------------------------------------

    def _loss(self, autocast: Autocast, hidden: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The sum of losses of `hidden [N, h]` and `targets [N]`, which are on the host: they decide what runs."""
        count = hidden.shape[0]
        tensors = (
            torch.full((count,), -torch.inf, device=hidden.device, dtype=torch.float32),
            torch.zeros(count, device=hidden.device, dtype=torch.float32),
            torch.zeros(count, device=hidden.device, dtype=torch.float32),
        )
        sums = _Sums(hidden, self._model.arguments.on_device(targets), autocast, *tensors)
        with torch.no_grad():
            for name, start, stop in self._rows():
                with self.visits.forward((name,)) as values:
                    self._in_tiles(count, stop - start, partial(sums.add, self._rows_of(values, start)))
            logsumexp = sums.largest + sums.total.log()
            loss = (logsumexp - sums.chosen).sum(dtype=torch.float64).float()
        return [loss], [hidden, targets, logsumexp]

    def _loss_backward(self, autocast: Autocast, saved: Tensors, gradients: Gradients) -> tuple[Tensor, None]:
        """Add to the row blocks' gradients; the gradient of the hidden states, `[N, h]`."""
        (hidden, targets, logsumexp), (scale,) = saved, gradients
        assert scale is not None
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        arguments, add = self._model.arguments, self.visits.oom_retry.add
        going_back = _GoingBack(hidden, targets, logsumexp, scale, autocast, total, arguments, add)
        with torch.no_grad():
            for name, start, stop in reversed(self._rows()):
                with self.visits.backward((name,)) as values:
                    weight_sum = self.visits.gradient_sum(name, self.weight)
                    bias_sum = self.visits.gradient_sum(name, self.bias) if self.bias else None
                    rows = self._rows_of(values, start)
                    add_tile = partial(going_back.add_tile, rows, weight_sum, bias_sum)
                    self._in_tiles(hidden.shape[0], stop - start, add_tile)
        return total.to(hidden.dtype), None

    def _in_tiles(self, num_tokens: int, rows: int, compute: Callable[[slice], None]) -> None:
        """Compute tile by tile of tokens, which have `rows` logits each."""
        planned = _token_tiles(num_tokens, rows, self.tile_elements)
        computed = self.visits.oom_retry.compute(planned, lambda tile: compute(slice(tile.start, tile.stop)))
        if computed != planned:
            most = max(tile.stop - tile.start for tile in computed)
            self.tile_elements = most * rows
            before = planned[0].stop
            self.visits.oom_retry.note(f"the loss is computed for {most} tokens at once instead of {before}")

    def timed_tile(self, rows: int, num_tokens: int) -> tuple[Callable[[], None], Callable[[], None], int]:
        """Return one tile of the loss of `num_tokens`, forward and backward, on a row block of zeros, and its tokens."""
        model, width = self._model, self.module.in_features
        count = min(num_tokens, max(1, tile_elements(model.torch_device) // rows))

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=model.torch_device)

        block = _Rows(zeros(rows, width, dtype=model.dtype), None, 0)
        hidden, place = zeros(count, width, dtype=model.dtype), zeros(count, 1, dtype=torch.long)
        autocast = replace(Autocast.current(model.device), enabled=False)
        largest, total = zeros(count), zeros(count).add_(1)
        gradient, weight_sum = zeros(count, width), zeros(rows, width)

        def forward() -> None:
            with torch.no_grad():
                logits = block.logits(hidden, autocast)
                _add_to_logsumexp(logits, largest, total)
                logits.gather(1, place)

        def backward() -> None:
            with torch.no_grad():
                slope = block.logits(hidden, autocast).sub_(total.unsqueeze(1)).exp_().mul_(1.0)
                narrow = slope.to(model.dtype)
                gradient.add_(narrow @ block.weight)
                _add_product(weight_sum, narrow.T, hidden)

        return forward, backward, count

    def _rows_of(self, values: dict[str, Tensor], start: int) -> _Rows:
        return _Rows(values[self.weight], values[self.bias] if self.bias else None, start)

    def _rows(self) -> list[tuple[str, int, int]]:
        return self._model.parameters.row_blocks(self.weight)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of the table from `start` on that a visit has in memory."""

    weight: Tensor
    bias: Tensor | None
    start: int

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., rows]`."""
        return F.linear(hidden, self.weight, self.bias)

    def project_into(self, parts: list[Tensor], hidden: Tensor, _: Tile) -> None:
        """Make logits `[..., rows]` the only part."""
        parts[:] = [self.project(hidden)]

    def logits(self, hidden: Tensor, autocast: Autocast) -> Tensor:
        """fp32 logits `[n, rows]` of a tile of tokens."""
        with autocast.restore():
            return self.project(hidden.to(self.weight.dtype)).float()


@dataclass(frozen=True, slots=True)
class _Sums:
    """A forward of the loss: its arguments, and of the logits of each token so far, `[N]`, the largest, the sum of
    exponentials relative to it, and the target's."""

    hidden: Tensor
    targets: Tensor
    autocast: Autocast
    largest: Tensor
    total: Tensor
    chosen: Tensor

    def add(self, block: _Rows, tile: slice) -> None:
        """Add the logits of a tile of tokens."""
        logits = block.logits(self.hidden[tile], self.autocast)
        rows = logits.shape[1]
        place = self.targets[tile] - block.start
        inside = (place >= 0) & (place < rows)
        picked = logits.gather(1, place.clamp(0, rows - 1).unsqueeze(1)).squeeze(1)
        self.chosen[tile] = torch.where(inside, picked, self.chosen[tile])
        _add_to_logsumexp(logits, self.largest[tile], self.total[tile])  # last: it is not to be repeated


@dataclass(frozen=True, slots=True)
class _GoingBack:
    """A backward of the loss: its arguments, and the gradient of the hidden states so far, in fp32."""

    hidden: Tensor
    targets: Tensor
    logsumexp: Tensor
    scale: Tensor
    autocast: Autocast
    gradient: Tensor
    arguments: Arguments
    add: Callable[[str, Callable[[], object]], None]
    """Adds to a sum that has a name."""

    def add_tile(self, block: _Rows, weight_sum: Tensor | None, bias_sum: Tensor | None, tile: slice) -> None:
        """Add the gradients that a tile of tokens gives to the hidden states and to the rows of `block`."""
        hidden, on_device = self.hidden[tile], self.arguments.on_device
        slope = block.logits(hidden, self.autocast).sub_(self.logsumexp[tile].unsqueeze(1)).exp_()
        place = self.targets[tile] - block.start
        rows = ((place >= 0) & (place < slope.shape[1])).nonzero().squeeze(1)
        slope[on_device(rows), on_device(place[rows])] -= 1
        slope.mul_(self.scale)
        narrow = slope.to(block.weight.dtype)
        self.add("hidden", lambda: self.gradient[tile].add_(narrow @ block.weight))
        if weight_sum is not None:
            self.add("weight", lambda: _add_product(weight_sum, narrow.T, hidden.to(narrow.dtype)))
        if bias_sum is not None:
            self.add("bias", lambda: bias_sum.add_(slope.sum(0)))


def tile_elements(device: torch.device) -> int:
    """Elements of one tile of logits on `device`."""
    return TILE_ELEMENTS if device.type == "cpu" else TILE_ELEMENTS_ON_DEVICE


def _token_tiles(num_tokens: int, rows: int, num_elements: int) -> tuple[Tile, ...]:
    """Tiles of tokens with `rows` logits each, `num_elements` in all; a tile has at least one token."""
    return tuple(tiles(num_tokens, max(1, num_elements // rows)))


def _add_to_logsumexp(logits: Tensor, largest: Tensor, total: Tensor) -> None:
    """Take `logits [n, rows]` into the running maximum and sum `[n]`, in place: all memory is taken before."""
    maximum = torch.maximum(largest, logits.amax(1))
    factor = torch.exp(largest - maximum)
    addition = (logits - maximum.unsqueeze(1)).exp_().sum(1)
    total.mul_(factor).add_(addition)
    largest.copy_(maximum)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, inside the product where the types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class Logits(Tensor):
    """Logits that were not computed: their shape and type, and the hidden states they would come from.

    Before the model's call ends, any use computes them with gradients. Afterwards reading computes them without, and is
    refused while gradients are on: that graph would be the memory that tiling saves.
    """

    source: LogitsSource
    hidden: Tensor
    is_sealed: bool
    has_graph: bool

    @staticmethod
    def __new__(
        cls: type[Logits], source: LogitsSource, hidden: Tensor, num_logits: int, call: CurrentCall
    ) -> Logits:
        """Stand for the `num_logits` logits of each of `hidden [..., h]` until `call` is over."""
        self: Logits = Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], num_logits), dtype=hidden.dtype, device=hidden.device
        )
        self.source, self.hidden, self.is_sealed = source, hidden, False
        self.has_graph = torch.is_grad_enabled()
        call.handles.append(self)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Answer what needs no value; compute for everything else."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (Tensor.float, Tensor.contiguous) and not args[0].is_sealed:
            return args[0]  # the loss computes in fp32 anyway
        args, kwargs = tree_map_only(Logits, Logits.compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Compute where an operation reaches us without the Python interface."""
        args, kwargs = tree_map_only(Logits, Logits.compute, (args, kwargs or {}))
        return func(*args, **kwargs)

    @outside_inference_mode()
    def compute(self) -> Tensor:
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

    original: Callable[..., Tensor]
    arguments: Arguments

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
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
