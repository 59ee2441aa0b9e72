"""Update rules: elementwise functions over the planes of a record, one source for every backend and device.

AdamW is decoupled weight decay (Loshchilov and Hutter, 2019) with the order of operations of
`torch.optim.AdamW`. Every operation is rounded on its own (no fused multiply-add on CPU), so an element's
result depends on nothing but its inputs: not on the slice it is computed in, its address or the number of
threads.

With bf16 weights the master is still fp32 and exact, split over two planes of 16 bits:

    weight    = (bits + 0x8000) >> 16     nearest bf16, ties away from zero
    remainder = bits - (weight << 16)     in [-32768, 32767]

[Note: words] CPU code generators vectorise neither int16, nor in place bf16 beside fp32, well. So the split
rule reads weight, remainder and gradient as int32 words of two elements (2j below, 2j + 1 above) and computes
the even and the odd lane. These three planes stay in natural order; moments, which nobody else reads, keep
each group of 64 elements as 32 even ones, then 32 odd ones (`deinterleave`, `interleave`):
docs/decisions/0002-remainder-layout.md. Words are little-endian. Infinities and NaNs are not kept apart: they
end a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from outsize.block import ENTRY_ALIGNMENT, Plane
from outsize.config import ComputeType

GROUP = ENTRY_ALIGNMENT
"""Elements; slices of split planes start on a multiple of it, and moments are reordered within it."""

_LOW = 0xFFFF
_HIGH = -0x10000
_HALF = 0x8000


@dataclass(frozen=True, slots=True)
class Hyper:
    """Everything an update needs beside the planes; `step` counts from 1 and includes this update.

    `gradient_scale` multiplies the gradient first (the clip factor).
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    step: int = 1
    gradient_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """An update rule: its state planes in record order, their types, and the functions that update in place.

    `moments` are fp32 in both compute types; `scalars` turns a `Hyper` into the numbers that `update` and
    `update_split` take as one fp32 tensor, so that a changed setting never recompiles anything.

    `update(weight, *moments, gradient, scalars)`    fp32, one dimension
    `update_split(*split_views(...), scalars)`       rows of a group, see [Note: words]
    """

    name: str
    moments: tuple[Plane, ...]
    scalars: Callable[[Hyper], list[float]]
    update: Callable[..., None]
    update_split: Callable[..., None]

    def state(self, compute_type: ComputeType) -> tuple[Plane, ...]:
        """State planes in the order in which a record interleaves them and a kernel takes them."""
        return self.moments if compute_type is ComputeType.FLOAT32 else (*self.moments, Plane.REMAINDER)

    def dtypes(self, compute_type: ComputeType) -> dict[Plane, torch.dtype]:
        """The type of every plane: weight, state and gradient."""
        compute = torch.float32 if compute_type is ComputeType.FLOAT32 else torch.bfloat16
        types = {Plane.WEIGHT: compute, **dict.fromkeys(self.moments, torch.float32)}
        if compute_type is not ComputeType.FLOAT32:
            types[Plane.REMAINDER] = torch.int16
        return {**types, Plane.GRADIENT: compute}

    def element_bytes(self, compute_type: ComputeType) -> dict[Plane, int]:
        """Bytes per element of every plane, as `Record.lay_out` takes them."""
        return {plane: dtype.itemsize for plane, dtype in self.dtypes(compute_type).items()}


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 weight and int16 remainder of an fp32 `master`, any shape; `join` is the exact inverse."""
    bits = master.view(torch.int32)
    high = (bits + _HALF) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a bf16 `weight` and int16 `remainder`."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


def deinterleave(values: Tensor) -> Tensor:
    """A moment plane (1-D, natural order) as the split rule stores it: of each group even, then odd ones."""
    whole = values.numel() - values.numel() % GROUP
    head = values[:whole].view(-1, GROUP // 2, 2).transpose(1, 2).reshape(-1)
    return torch.cat([head, values[whole::2], values[whole + 1 :: 2]])


def interleave(values: Tensor) -> Tensor:
    """The inverse of `deinterleave`: a stored moment plane in natural order."""
    whole = values.numel() - values.numel() % GROUP
    natural = torch.empty_like(values)
    natural[:whole] = values[:whole].view(-1, 2, GROUP // 2).transpose(1, 2).reshape(-1)
    middle = whole + (values.numel() - whole + 1) // 2
    natural[whole::2] = values[whole:middle]
    natural[whole + 1 :: 2] = values[middle:]
    return natural


def _adamw_scalars(hyper: Hyper) -> list[float]:
    assert hyper.step >= 1, hyper
    return [
        hyper.gradient_scale,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        1 - hyper.lr * hyper.weight_decay,
        hyper.lr / (1 - hyper.beta1**hyper.step),
        sqrt(1 - hyper.beta2**hyper.step),
        hyper.eps,
    ]


def _adamw(
    master: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale, rate1, beta2, rate2, decay, step_size, correction2, eps = scalars.unbind()
    gradient = gradient * scale
    moment1 = moment1 + rate1 * (gradient - moment1)
    moment2 = moment2 * beta2 + rate2 * gradient * gradient
    master = master * decay - step_size * moment1 / (moment2.sqrt() / correction2 + eps)
    return master, moment1, moment2


def _update_adamw(
    weight: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor
) -> None:
    planes = (weight, moment1, moment2)
    for plane, value in zip(planes, _adamw(*planes, gradient, scalars), strict=True):
        plane.copy_(value)


def _update_adamw_split(
    weight: Tensor,
    moment1_even: Tensor,
    moment1_odd: Tensor,
    moment2_even: Tensor,
    moment2_odd: Tensor,
    remainder: Tensor,
    gradient: Tensor,
    scalars: Tensor,
) -> None:
    # Each word holds two elements: see [Note: words]. Bits are added as integers, so carries need no care.
    even = (weight << 16) + ((remainder << 16) >> 16)
    odd = (weight & _HIGH) + (remainder >> 16)
    master_even, *moments_even = _adamw(
        even.view(torch.float32), moment1_even, moment2_even, (gradient << 16).view(torch.float32), scalars
    )
    master_odd, *moments_odd = _adamw(
        odd.view(torch.float32), moment1_odd, moment2_odd, (gradient & _HIGH).view(torch.float32), scalars
    )
    even, odd = master_even.view(torch.int32), master_odd.view(torch.int32)
    high_even, high_odd = (even + _HALF) & _HIGH, (odd + _HALF) & _HIGH
    new = (
        ((high_even >> 16) & _LOW) | high_odd,
        ((even - high_even) & _LOW) | ((odd - high_odd) << 16),
        moments_even[0],
        moments_odd[0],
        moments_even[1],
        moments_odd[1],
    )
    old = (weight, remainder, moment1_even, moment1_odd, moment2_even, moment2_odd)
    for plane, value in zip(old, new, strict=True):
        plane.copy_(value)


def split_views(weight: Tensor, state: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Slices of split planes (1-D, whole groups) as `update_split` takes them, sharing the slices' memory."""
    *moments, remainder = state
    views = [_words(weight)]
    for moment in moments:
        halves = moment.view(-1, 2, GROUP // 2)
        views += [halves[:, 0], halves[:, 1]]
    return [*views, _words(remainder), _words(gradient)]


def _words(plane: Tensor) -> Tensor:
    return plane.view(torch.int32).view(-1, GROUP // 2)


ADAMW = Rule("adamw", (Plane.MOMENT1, Plane.MOMENT2), _adamw_scalars, _update_adamw, _update_adamw_split)

RULES = {rule.name: rule for rule in (ADAMW,)}
"""All rules by name; a rule must be here to be compiled, since another process does it."""
