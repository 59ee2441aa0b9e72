"""A visit of an embedding: only the rows that are looked up are gathered, row block by row block.

Where nothing trains and the model's files hold the table, they are read one by one: no block of it is visited.

The module's own forward runs on a compact table of the distinct rows, so subclasses that scale their output work
unchanged. An embedding is linear in its table, so its backward needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from outsize.engine.arguments import Arguments
from outsize.engine.layer import installed
from outsize.engine.rng_autocast import Autocast
from outsize.engine.visits import Visits
from outsize.errors import UsageError
from outsize.model import Point
from outsize.store.recovery import undone_by

SMALL_ROWS = 1 << 15
"""Rows of a table that is looked up whole where only the device knows the ids: positions, token types."""


@final
class Embedding:
    """A point whose module is an `nn.Embedding` with its table in row blocks."""

    def __init__(self, visits: Visits, point: Point, module: nn.Embedding) -> None:
        self.visits = visits
        self._model = visits.model
        self.point = point
        self.module = module
        self.original: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.blocks = point.blocks
        self.parameter = point.bindings[0].parameter

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of `input`, as a visit."""
        if not (torch.is_grad_enabled() and self._model.trains(self.blocks)):
            return self.forward(input)
        output: torch.Tensor = _Embed.apply(self, self._model.anchor, input)  # type: ignore[no-untyped-call]
        return output

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Gather the distinct rows from the row blocks and look `ids` up in them."""
        places = _Places.of(ids, self.module.num_embeddings, self._model.arguments)
        distinct = places.distinct
        self._check(distinct)
        table = torch.empty(
            distinct.numel(),
            self.module.embedding_dim,
            dtype=self._model.dtype,
            device=self._model.torch_device,
        )
        takes_rows = self.takes_rows
        for name, start, stop in self._model.parameters.row_blocks(self.parameter):
            first, last = _range(distinct, start, stop)
            if takes_rows:
                self._model.parameters.take_rows(
                    name, self.parameter, distinct[first:last] - start, table[first:last]
                )
                continue
            with self.visits.forward((name,)) as values:
                if first < last:
                    rows = values[self.parameter]
                    torch.index_select(rows, 0, places.rows[first:last] - start, out=table[first:last])
        with self._compact(table, distinct), torch.no_grad():
            return self.original(places.inverse)

    @property
    def takes_rows(self) -> bool:
        """Whether rows come one by one, from where the table stays or else from the files, without a visit."""
        trains = any(parameter.requires_grad for parameter in self._model.parameters.values())
        return not trains and self._model.parameters.gives_rows(self.parameter)

    def backward(
        self, ids: torch.Tensor, gradient: torch.Tensor, autocast: Autocast, check: Callable[[], None]
    ) -> None:
        """Add to the gradients of all row blocks."""
        check()
        places = _Places.of(ids, self.module.num_embeddings, self._model.arguments)
        distinct = places.distinct
        table = torch.zeros(
            distinct.numel(),
            self.module.embedding_dim,
            dtype=self._model.dtype,
            device=self._model.torch_device,
        )
        table.requires_grad_()
        with self._compact(table, distinct), torch.enable_grad(), autocast.restore():
            output = self.original(places.inverse)
        output.backward(gradient)
        assert table.grad is not None
        for name, start, stop in reversed(self._model.parameters.row_blocks(self.parameter)):
            with self.visits.backward((name,), needs_weights=False):
                first, last = _range(distinct, start, stop)
                rows = self.visits.gradient_sum(name, self.parameter)
                if rows is not None and first < last:
                    # Distinct rows: nothing is added twice, so the order of additions cannot matter on any device.
                    rows.index_add_(0, places.rows[first:last] - start, table.grad[first:last].to(rows.dtype))

    def _check(self, distinct: torch.Tensor) -> None:
        """Raise UsageError where one of the sorted ids has no row: it would be given whatever memory holds."""
        rows = self.module.num_embeddings
        for token in (distinct[0], distinct[-1]) if distinct.numel() else ():
            if not 0 <= int(token) < rows:
                raise UsageError(
                    f"id {int(token)} is given to {self.point.module}, which has rows 0 to {rows - 1}",
                    hint="the tokenizer is another model's, or ids for padding were not replaced",
                )

    @contextmanager
    def _compact(self, table: torch.Tensor, distinct: torch.Tensor) -> Iterator[None]:
        """Inside, the module looks up `table`, whose row i is row `distinct[i]` of the full one."""
        padding = self.module.padding_idx

        def put_back() -> None:
            self.module.padding_idx = padding

        with undone_by(put_back):
            if padding is not None:
                place = int(torch.searchsorted(distinct, padding))
                is_there = place < distinct.numel() and int(distinct[place]) == padding
                self.module.padding_idx = place if is_there else None
            with installed(self._model.module, self.point.bindings, {self.parameter: table}):
                yield


@dataclass(frozen=True, slots=True)
class _Places:
    """Which rows `ids` name: `distinct`, sorted, where the host can read it; `rows`, the same, and each id's place in
    them, where blocks compute."""

    distinct: torch.Tensor
    rows: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, num_rows: int, arguments: Arguments) -> _Places:
        known = ids if ids.device.type == "cpu" else arguments.known_on_host(ids)
        if known is None and num_rows <= SMALL_ROWS:
            distinct = torch.arange(num_rows, device="cpu")
            return cls(distinct, arguments.on_device(distinct), ids)
        distinct, inverse = torch.unique(
            arguments.on_host(ids) if known is None else known, return_inverse=True
        )
        return cls(distinct, arguments.on_device(distinct), arguments.on_device(inverse))


def _range(distinct: torch.Tensor, start: int, stop: int) -> tuple[int, int]:
    bounds = torch.searchsorted(distinct, torch.tensor([start, stop], device="cpu"))
    return int(bounds[0]), int(bounds[1])


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Embedding, anchor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        model = embedding.visits.model
        ctx.embedding, ctx.autocast = embedding, Autocast.current(model.device)
        ctx.check_backward = embedding.visits.backward_check(embedding.point)
        known = model.arguments.known_on_host(ids)
        ctx.save_for_backward(ids if known is None else known)
        return embedding.forward(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.embedding.backward(ids, gradient, ctx.autocast, ctx.check_backward)
        return None, None, None
