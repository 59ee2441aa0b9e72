"""Our entry among transformers' attention functions: it hands each layer's call to what travels with the call.

A model is switched to it only while a pass runs, through `set_attn_implementation`; its own calls before, between and after
are computed as ever. No mask is made: what a token sees follows from its request and position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "outsize_paged"

Mask = Callable[..., torch.Tensor]
"""Whether a query sees a key: `mask(batch, head, query position, key position)`."""

_watched: ContextVar[list[Mask] | None] = ContextVar("_watched", default=None)


class Attends(Protocol):
    """What a call carries as `paged=`: a pass, or what looks on while a model is probed."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """`[1, T, H, V]` of `query [1, H, T, K]`, `key [1, G, T, K]`, `value [1, G, T, V]`."""


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Attends | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call in place of their attention. Raises TypeError where they do not hand `paged` on."""
    if paged is None:
        raise TypeError("its layers do not hand the arguments of a call down to their attention")
    return paged.attend(module.layer_idx, query, key, value, attention_mask, options), None


def no_mask(*, mask_function: Mask, **_: Any) -> None:
    """What transformers' models call for a mask."""
    if (masks := _watched.get()) is not None:
        masks.append(mask_function)


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, no_mask)


@contextmanager
def switched(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is ours."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def masks_watched() -> Iterator[list[Mask]]:
    """Inside, the masks that models ask for are noted."""
    masks: list[Mask] = []
    token = _watched.set(masks)
    try:
        yield masks
    finally:
        _watched.reset(token)
