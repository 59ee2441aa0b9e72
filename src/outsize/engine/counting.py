"""What a piece of computing takes, counted operation by operation: memory of its tensors, time on another machine.

Counting is exact where measuring is not: the same run gives the same figures, on tensors with values or without (torch's
meta device), so that a plan does not change from one start to the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import masking_utils

from outsize.config import ComputeType
from outsize.engine.arguments import Args, Kwargs
from outsize.errors import ConfigError, ModelError
from outsize.plan.profile import Profile
from outsize.store.live_bytes import tensors_in


class _WithoutValues(TorchFunctionMode):
    """Inside, attention is that of a fused kernel, as on a device (torch takes it apart on meta), and nothing is found in a
    tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Run `func`, or what stands for it."""
        if func is Tensor.__contains__:
            return False
        if func is torch.bincount:
            return _no_counts(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func in _GROUPED_PRODUCTS and args[0].dtype is not torch.bfloat16:
            return _grouped_product(*args)
        return func(*args, **(kwargs or {}))


_GROUPED_PRODUCTS = (torch._grouped_mm, F.grouped_mm)


def _grouped_product(rows: Tensor, weights: Tensor) -> Tensor:
    """The product of rows `[n, k]`, each with one of the matrices `weights [experts, k, m]`: as much as with the first of
    them. Torch computes it in every type, but knows its shape on meta in bf16 alone."""
    return rows @ weights[0]


def _no_counts(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return torch.zeros(
        minlength, dtype=torch.long if weights is None else weights.dtype, device=values.device
    )


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    groups = query.shape[-3] // key.shape[-3]
    if enable_gqa and groups > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    attend = torch.ops.aten
    if attn_mask is None:
        return attend._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    return attend._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


class _Tracing(threading.local):
    """How often this thread is inside `_traced`."""

    depth = 0


_tracing = _Tracing()
_is_tracing = masking_utils.is_tracing
_patching = threading.Lock()
_num_traced = 0


def _is_tracing_here(*values: Any) -> bool:
    return _tracing.depth > 0 or bool(_is_tracing(*values))


@contextmanager
def _traced() -> Iterator[None]:
    """Inside, transformers takes what this thread runs for a trace, and asks no mask for its values.

    It has no other switch. Threads that run models meanwhile get the answer that they would have got.
    """
    global _num_traced
    with _patching:
        _num_traced += 1
        masking_utils.is_tracing = _is_tracing_here
    _tracing.depth += 1
    try:
        yield
    finally:
        _tracing.depth -= 1
        with _patching:
            _num_traced -= 1
            if not _num_traced:
                masking_utils.is_tracing = _is_tracing


@contextmanager
def on_paper() -> Iterator[None]:
    """Inside, models run on tensors without values. Raises ModelError where a model asks for one."""
    try:
        with _WithoutValues(), _traced():
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise ModelError(
            f"the model's forward depends on values of its tensors, which another machine's plan has none of: {error}",
            hint="plan on that machine itself, without hardware=",
        ) from error


class _Traffic(TorchDispatchMode):
    """Bytes that operations other than products read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Run `func`, and count its operands and results unless they share their bytes."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in flop_registry and not func.is_view:
            self.num_bytes += sum(tensor.nbytes for tensor in tensors_in((args, kwargs, result)))
        return result


def estimated_s(profile: Profile, compute_type: ComputeType, run: Callable[[], object]) -> float:
    """Seconds that `run()` would take on another machine: its products at their rate, all else at that of memory.

    Raises ConfigError where the profile has no rate for the compute type.
    """
    rate = profile.matmul.get(compute_type)
    if rate is None:
        raise ConfigError(
            f"profile {profile.name}: no rate for products in {compute_type}",
            hint=f"choose --dtype of {', '.join(profile.matmul)}",
        )
    with FlopCounterMode(display=False) as products, _Traffic() as traffic:
        run()
    # A copy reads and writes each byte that it moves.
    memory = profile.device_memory or 2 * profile.host_copy
    return float(products.get_total_flops() / rate + traffic.num_bytes / memory)
