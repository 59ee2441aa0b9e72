"""Products in tiles of fixed size, so that a token's numbers depend on nothing else that is in its pass.

A product chooses its kernel, and so the order of its sums, by its shape: a row has other last bits in a matrix of 1 row
than in one of 100 (He et al., "Defeating nondeterminism in LLM inference", 2025). Here every product of rows is computed in
tiles of TILE_ROWS, the last one filled up with zeros, also those of experts, each of which has as many rows as chance
sends it. What is computed element by element runs on one thread, over a multiple of TILE_ROWS tokens: libraries compute
what is left over after whole vectors by another formula. Attention computes each query by itself (`kv/kernel.c`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.optim import limited_threads

TILE_ROWS = 32
"""Rows of a product that are computed together; whole vectors of any width."""

_aten = torch.ops.aten


class FixedTiles(TorchDispatchMode):
    """Inside, products are computed tile by tile."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cut the rows of a product; run all else on one thread."""
        kwargs = kwargs or {}
        if func is _aten.mm.default:
            left, right = args
            return _by_tiles(left, lambda rows: func(rows, right))
        if func is _aten.addmm.default and args[0].dim() == 1:
            bias, left, right = args
            return _by_tiles(left, lambda rows: func(bias, rows, right, **kwargs))
        if func is _aten.bmm.default:
            return torch.stack(
                [_by_tiles(left, right.__rmatmul__) for left, right in zip(*args, strict=True)]
            )
        if func is torch.ops.outsize.product.default:
            rows, *rest = args
            return _by_tiles(rows, lambda rows: func(rows, *rest))
        if func is _aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        with limited_threads(1):
            return func(*args, **kwargs)


def _by_tiles(rows_NK: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`product` of all rows: `[N, M]`."""
    parts = []
    for start in range(0, rows_NK.shape[0], TILE_ROWS):
        part = rows_NK[start : start + TILE_ROWS]
        count = part.shape[0]
        tile = rows_NK.new_zeros(TILE_ROWS, rows_NK.shape[1])
        tile[:count] = part
        parts.append(product(tile)[:count])
    return torch.cat(parts) if parts else product(rows_NK)


def _grouped(
    rows_NK: torch.Tensor, weights_EKM: torch.Tensor, offs: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    """Rows up to `offs[e]` times the weights of expert `e`; rows after the last belong to nobody."""
    assert not any(option is not None for option in (*rest, *options.values())), (rest, options)
    output_NM = rows_NK.new_zeros(rows_NK.shape[0], weights_EKM.shape[2])
    start = 0
    for weight_KM, stop in zip(weights_EKM, offs.tolist(), strict=True):
        if stop > start:
            output_NM[start:stop] = _by_tiles(rows_NK[start:stop], weight_KM.__rmatmul__)
        start = stop
    return output_NM
