"""Which implementation of attention a model computes with.

The user's choice comes first, then what the model's config says, then transformers' own: `sdpa`, torch's fused attention,
where the class supports it, else `eager`. torch takes the kernel by device, type and mask; on a GPU one of them is
FlashAttention. The flash-attn package is taken where one asks for it, and then computes the same bits every time.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)
from transformers.utils.generic import is_flash_attention_requested

from outsize.errors import ConfigError

_INSTALLED = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
"""Whether what an implementation needs is here: the package, and a device that it knows."""

_SUPPORT = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn", "flash": "_supports_flash_attn"}
"""What a class of transformers says of itself, by the first letters of an implementation."""


def choose(
    config: transformers.PreTrainedConfig, model_class: Any, dtype: torch.dtype, asked: str | None
) -> None:
    """Let a model of `config` compute with the attention that is `asked` for, else with that of the config.

    Raises ConfigError where it cannot be used, naming those that can.
    """
    if asked is not None:
        config._attn_implementation = asked
    chosen = config._attn_implementation
    if chosen is None:
        return
    reason = _obstacle(chosen, model_class, dtype)
    if reason is not None:
        usable = [
            name
            for name in ("sdpa", "eager", "flex_attention", *_INSTALLED)
            if _fits(name, model_class, dtype)
        ]
        raise ConfigError(f"attention={chosen!r}: {reason}", hint=f"one of {', '.join(usable)}")
    if is_flash_attention_requested(requested_attention_implementation=chosen):
        # Gradients are otherwise added in the order in which threads come: other bits at each run.
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")


def attention_of(module: nn.Module) -> str | None:
    """The implementation that `module` computes attention with; None where it has no choice."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return chosen if isinstance(chosen, str) else None


def merges_rows(module: nn.Module) -> bool:
    """Whether packed documents are kept apart in calls of one row only.

    transformers' flash attention takes no mask: it looks for positions that begin anew, in batches of one row.
    """
    return bool(is_flash_attention_requested(requested_attention_implementation=attention_of(module)))


def _fits(name: str, model_class: Any, dtype: torch.dtype) -> bool:
    return _obstacle(name, model_class, dtype) is None


def _obstacle(name: str, model_class: Any, dtype: torch.dtype) -> str | None:
    """Why `name` cannot be used; None where it can."""
    if "/" in name:
        return None  # a kernel of a repository, which transformers fetches, or refuses
    known = {"eager", *transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if name not in known:
        return "no such implementation"
    for letters, flag in _SUPPORT.items():
        if name.startswith(letters) and not getattr(model_class, flag, False):
            return f"{model_class.__name__} does not support it"
    if name in _INSTALLED:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16, and the model in {str(dtype).removeprefix('torch.')}"
        if not _INSTALLED[name]():
            return "its package is not installed, or knows no device of this machine"
    return None
