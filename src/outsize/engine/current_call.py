"""The running call of the model, as its points see it: how its batch is cut into tiles, and whether it has labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import nn

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.batch import Tile, tiles
from outsize.errors import UsageError
from outsize.model import attention_of
from outsize.plan.workload import BatchDims, BatchShape, Workload

BESIDE_LOGIT_BYTES = 8
"""Bytes per logit that a caller takes without gradients: a copy in fp32, and its log-probabilities."""

WHOLE = (Tile(0, 1, 1),)
"""The tiles of a batch that is not cut."""


class Sealable(Protocol):
    """A handle that can be computed with gradients until the call is over."""

    def seal(self) -> None:
        """The call is over."""


@dataclass(eq=False, slots=True)
class ModelCall:
    """A call of the model, forward and backward; each of its visits takes `visit_bytes` at most."""

    workload: Workload
    shape: BatchShape
    tile_rows: int
    visit_bytes: int
    is_row_by_row: bool = False
    """Whether a visit of several rows at once would be wrong."""


@final
class CurrentCall:
    """What points ask about the running call. Set by the call tracker."""

    def __init__(self, module: nn.Module) -> None:
        self.running: ModelCall | None = None
        """The running call, else the last one; None while a cache is filled."""
        self.last_training: ModelCall | None = None
        self.has_labels = False
        self.handles: list[Sealable] = []
        """Logits of the running call that were not computed."""
        self.changing: set[str] = set()
        """Layers, by module, that change buffers or attributes of their own, as far as dry runs have shown."""
        self.beside_logit_bytes = BESIDE_LOGIT_BYTES
        """Bytes per logit that the caller takes beside the logits, without gradients."""
        self.dry_answer: Callable[[str, Args, Kwargs], Any] | None = None
        """Answers in the place of the point at a module, in shape and type, during a dry run."""
        self._module = module
        self._whole: set[str] = set()

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of the running call's batch."""
        return 1 if self.running is None else self.running.shape.row_tokens

    def seal_handles(self, start: int = 0) -> None:
        """Seal the handles from number `start` on, and forget them."""
        for handle in self.handles[start:]:
            handle.seal()
        del self.handles[start:]

    def keep_whole(self, module: str) -> tuple[Tile, ...]:
        """Never tile the layer at `module` again; the one tile that it computes."""
        self._whole.add(module)
        return WHOLE

    def shrink_tiles(self, rows: int) -> int:
        """Compute at most `rows` rows at once from now on; the rows of a tile before, or 0 if they were no more."""
        before = 0
        for call in (self.running, self.last_training):
            if call is not None and call.tile_rows > rows:
                before, call.tile_rows = call.tile_rows, rows
        return before

    def tiles(
        self, module: str, tensors: Sequence[torch.Tensor], *, may_cut: bool = True
    ) -> tuple[BatchDims | None, tuple[Tile, ...]]:
        """How the batch is cut for the layer at `module`, if it `may_cut`; one tile if a batch dimension is unknown.

        Raises UsageError for packed documents that would have to be computed together.
        """
        call = self.running
        if call is None:
            return None, WHOLE
        dims = self._dims(call, module, tensors) if may_cut else None
        parts = WHOLE if dims is None else tuple(tiles(call.shape.rows or 1, call.tile_rows))
        if call.is_row_by_row and call.shape.rows != len(parts):
            raise packed_error(attention_of(self._module))
        return dims, parts

    def _dims(self, call: ModelCall, module: str, tensors: Sequence[torch.Tensor]) -> BatchDims | None:
        """The batch dimensions of a layer's tensors; None if it is not cut."""
        dims, rows = call.workload.dims.get(module), call.shape.rows
        if dims is None or rows is None or module in self._whole or len(dims.inputs) != len(tensors):
            return None
        if all(dim is None for dim in dims.inputs):
            return None
        fits = all(
            dim is None or (dim < tensor.dim() and tensor.shape[dim] % rows == 0)
            for dim, tensor in zip(dims.inputs, tensors, strict=True)
        )
        return dims if fits else None


def packed_error(attention: str | None) -> UsageError:
    """Packed documents would attend to one another."""
    return UsageError(
        f"{attention} keeps packed documents apart in calls of one row, and this one cannot be cut into rows",
        hint='load the model with attention="sdpa", or leave packing out',
    )
