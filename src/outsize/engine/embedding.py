"""A visit of an embedding: only the rows that are looked up are gathered, row block by row block.

Where nothing trains and the model's files hold the table, they are read one by one: no block of it is visited.

The module's own forward runs on a compact table of the distinct rows, so subclasses that scale their output work
unchanged. An embedding is linear in its table, so its backward needs no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from outsize.engine.arguments import Arguments
from outsize.engine.batch import Gradients, Tensors
from outsize.engine.layer import installed
from outsize.engine.rng_autocast import Autocast
from outsize.engine.visits import PointVisits, Visits
from outsize.errors import UsageError
from outsize.model import Point
from outsize.store.recovery import undone_by

SMALL_ROWS = 1 << 15
"""Rows of a table that is looked up whole where only the device knows the ids: positions, token types."""


@final
class Embedding(PointVisits[nn.Embedding]):
    """A point whose module is an `nn.Embedding` with its table in row blocks."""

    def __init__(self, visits: Visits, point: Point, module: nn.Embedding) -> None:
        super().__init__(visits, point, module)
        self._model = visits.model
        self.parameter = point.bindings[0].parameter

    def __call__(self, input: Tensor) -> Tensor:
        """The rows of `input`, as a visit."""
        backward = partial(self.backward, Autocast.current(self._model.device))
        return self.compute(self.forward, backward, input)[0]

    def forward(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gather the distinct rows from the row blocks and look `ids` up in them; the backward needs the ids."""
        known = self._model.arguments.known_on_host(ids)
        places, table = self._table(ids)
        distinct = places.distinct
        self._check(distinct)
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
            return [self.original(places.inverse)], [ids if known is None else known]

    def _table(self, ids: Tensor) -> tuple[_Places, Tensor]:
        """The rows that `ids` name, and a compact table with room for them, of zeros."""
        places = _Places.of(ids, self.module.num_embeddings, self._model.arguments)
        return places, torch.zeros(
            places.distinct.numel(),
            self.module.embedding_dim,
            dtype=self._model.dtype,
            device=self._model.torch_device,
        )

    @property
    def takes_rows(self) -> bool:
        """Whether rows come one by one, from where the table stays or else from the files, without a visit."""
        trains = any(parameter.requires_grad for parameter in self._model.parameters.values())
        return not trains and self._model.parameters.gives_rows(self.parameter)

    def backward(
        self,
        autocast: Autocast,
        saved: Tensors,
        gradients: Gradients,
    ) -> tuple[None]:
        """Add to the gradients of all row blocks."""
        places, table = self._table(saved[0])
        distinct = places.distinct
        table.requires_grad_()
        with self._compact(table, distinct), torch.enable_grad(), autocast.restore():
            output = self.original(places.inverse)
        output.backward(gradients[0])
        assert table.grad is not None
        for name, start, stop in reversed(self._model.parameters.row_blocks(self.parameter)):
            with self.visits.backward((name,), needs_weights=False):
                first, last = _range(distinct, start, stop)
                rows = self.visits.gradient_sum(name, self.parameter)
                if rows is not None and first < last:
                    # Distinct rows: nothing is added twice, so the order of additions cannot matter on any device.
                    rows.index_add_(0, places.rows[first:last] - start, table.grad[first:last].to(rows.dtype))
        return (None,)

    def _check(self, distinct: Tensor) -> None:
        """Raise UsageError where one of the sorted ids has no row: it would be given whatever memory holds."""
        rows = self.module.num_embeddings
        for token in (distinct[0], distinct[-1]) if distinct.numel() else ():
            if not 0 <= int(token) < rows:
                raise UsageError(
                    f"id {int(token)} is given to {self.point.module}, which has rows 0 to {rows - 1}",
                    hint="the tokenizer is another model's, or ids for padding were not replaced",
                )

    @contextmanager
    def _compact(self, table: Tensor, distinct: Tensor) -> Iterator[None]:
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

    distinct: Tensor
    rows: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, ids: Tensor, num_rows: int, arguments: Arguments) -> _Places:
        known = ids if ids.device.type == "cpu" else arguments.known_on_host(ids)
        if known is None and num_rows <= SMALL_ROWS:
            distinct = torch.arange(num_rows, device="cpu")
            return cls(distinct, arguments.on_device(distinct), ids)
        distinct, inverse = torch.unique(
            arguments.on_host(ids) if known is None else known, return_inverse=True
        )
        return cls(distinct, arguments.on_device(distinct), arguments.on_device(inverse))


def _range(distinct: Tensor, start: int, stop: int) -> tuple[int, int]:
    bounds = torch.searchsorted(distinct, torch.tensor([start, stop], device="cpu"))
    return int(bounds[0]), int(bounds[1])
