"""What an update rule is, and how it runs over the planes of a record: one source for every backend and device.

A rule is an elementwise function: every operation is rounded on its own (no fused multiply-add on CPU), so an
element's result depends on nothing but its inputs: not on the slice it is computed in, its address or the number of
threads. It is written once, over fp32 tensors; `Rule` runs it over the planes of both compute types.

With bf16 weights the master is still fp32 and exact, split over two planes of 16 bits:

    weight    = (bits + 0x8000) >> 16     nearest bf16, ties away from zero
    remainder = bits - (weight << 16)     in [-32768, 32767]

[Note: words] CPU code generators vectorise neither int16, nor in place bf16 beside fp32, well. So the split
rule reads weight, remainder and gradient as int32 words of two elements (2j below, 2j + 1 above) and computes
the even and the odd lane. These three planes stay in natural order; moments, which nobody else reads, keep
each group of 64 elements as 32 even ones, then 32 odd ones (`deinterleave`, `interleave`):
docs/decisions/0002-remainder-layout.md. Words are little-endian. Infinities and NaNs are not kept apart: they
end a run.

[Note: codes] A rule may keep its moments in 8 bits (after Dettmers et al., "8-bit optimizers via block-wise
quantization" (2022), https://arxiv.org/abs/2110.02861): each group of 64 elements is 64 codes, in the order of moments,
then the group's peak in fp32: 68 bytes. Groups are those that slices start on, so none is ever shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from outsize.block import ENTRY_ALIGNMENT, Plane
from outsize.config import ComputeType

GROUP = ENTRY_ALIGNMENT
"""Elements; slices of split planes start on a multiple of it, and moments are reordered within it."""

CODED_GROUP_BYTES = GROUP + 4
"""Bytes of a group of a moment in codes."""

_LOW = 0xFFFF
_HIGH = -0x10000
_HALF = 0x8000
_LEAST_PEAK = 1e-30
"""A group of zeros has a peak too; fp32 magnitudes below it count as zero."""


Hyper: TypeAlias = tuple[float, ...]
"""What an update needs beside the planes, frozen by a step: the values of `Rule.scalars`, in that order. A kernel takes
them as one fp32 tensor, so a changed setting never recompiles anything."""


@dataclass(frozen=True, slots=True)
class Codes:
    """How a moment is kept in one byte per element: see [Note: codes].

    `magnitude(values)`: whose maximum in a group is the peak; `encode(values, peak)` and `decode(codes, peak)`.
    """

    dtype: torch.dtype
    magnitude: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """An update rule: its state planes in record order, and the function that returns their new values.

    `element(master, *moments, gradient, *scalars)` takes the gradient multiplied by the first of `scalars`, and the others
    by position, and returns the new `(master, *moments)`. All are fp32, and of one shape except for the scalars. Moments
    are stored in fp32, whatever the compute type, or in `codes`, one per moment.

    `update(*views(...), scalars)` and `update_split(*views(...), scalars)` work in place.
    """

    name: str
    moments: tuple[Plane, ...]
    element: Callable[..., tuple[Tensor, ...]]
    codes: tuple[Codes, ...] = ()

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the scalars: the factor of the gradient, then the last parameters of `element`."""
        return "gradient_scale", *_parameters(self.element)[len(self.moments) + 2 :]

    def update(self, *arguments: Tensor) -> None:
        """Update fp32 planes: one dimension, or rows of a group where moments are codes."""
        weight, *stored, gradient, scalars = arguments
        (master,) = self._step([weight], [gradient], stored, scalars)
        weight.copy_(master)

    def update_split(self, *arguments: Tensor) -> None:
        """Update split planes: rows of a group, in words of two elements."""
        # See [Note: words]. Bits are added as integers, so carries need no care.
        weight, *stored, remainder, gradient, scalars = arguments
        even = (weight << 16) + ((remainder << 16) >> 16)
        odd = (weight & _HIGH) + (remainder >> 16)
        masters = [even.view(torch.float32), odd.view(torch.float32)]
        gradients = [(gradient << 16).view(torch.float32), (gradient & _HIGH).view(torch.float32)]
        even, odd = (master.view(torch.int32) for master in self._step(masters, gradients, stored, scalars))
        high_even, high_odd = (even + _HALF) & _HIGH, (odd + _HALF) & _HIGH
        weight.copy_(((high_even >> 16) & _LOW) | high_odd)
        remainder.copy_(((even - high_even) & _LOW) | ((odd - high_odd) << 16))

    def _step(
        self,
        masters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        stored: Sequence[Tensor],
        scalars: Tensor,
    ) -> list[Tensor]:
        """The new masters, lane by lane; the moments, `stored` as `views` orders them, are updated in place."""
        scale, *others = scalars.unbind()
        lanes = range(len(masters))
        moments = [self._read(stored, lane, len(lanes)) for lane in lanes]
        new = [
            self.element(masters[lane], *moments[lane], gradients[lane] * scale, *others) for lane in lanes
        ]
        self._write(stored, [values[1:] for values in new])
        return [values[0] for values in new]

    def _read(self, stored: Sequence[Tensor], lane: int, num_lanes: int) -> Sequence[Tensor]:
        """One lane's moments in fp32."""
        if not self.codes:
            return stored[lane::num_lanes]
        peaks = stored[num_lanes :: num_lanes + 1]
        return [
            codes.decode(view, peak)
            for codes, view, peak in zip(self.codes, stored[lane :: num_lanes + 1], peaks, strict=True)
        ]

    def _write(self, stored: Sequence[Tensor], new: Sequence[Sequence[Tensor]]) -> None:
        """Store the new moments, `new[lane][moment]`."""
        views = iter(stored)
        for index in range(len(self.moments)):
            values = [moments[index] for moments in new]
            if not self.codes:
                for value in values:
                    next(views).copy_(value)
                continue
            codes = self.codes[index]
            highest = [codes.magnitude(value).amax(1, keepdim=True) for value in values]
            peak = highest[0] if len(highest) == 1 else torch.maximum(*highest)
            peak = peak.clamp_min(_LEAST_PEAK)
            for value in values:
                next(views).copy_(codes.encode(value, peak))
            next(views).copy_(peak)

    def function(self, compute_type: ComputeType) -> Callable[..., None]:
        """`update` or `update_split`."""
        return self.update if compute_type is ComputeType.FLOAT32 else self.update_split

    def needs_groups(self, compute_type: ComputeType) -> bool:
        """Whether `function` takes whole groups of 64 elements only."""
        return bool(self.codes) or compute_type is not ComputeType.FLOAT32

    def views(
        self, compute_type: ComputeType, weight: Tensor, state: Sequence[Tensor], gradient: Tensor
    ) -> list[Tensor]:
        """Slices of planes (1-D; whole groups where needed) as `function` takes them, sharing the slices' memory."""
        if not self.needs_groups(compute_type):
            return [weight, *state, gradient]
        is_split = compute_type is not ComputeType.FLOAT32
        moments = state[: len(self.moments)]
        stored: list[Tensor] = []
        if self.codes:
            for moment, codes in zip(moments, self.codes, strict=True):
                bytes_ = moment.view(-1, CODED_GROUP_BYTES)[:, :GROUP].view(codes.dtype)
                stored += bytes_.split(GROUP // 2, 1) if is_split else [bytes_]
                stored.append(moment.view(torch.float32).view(-1, CODED_GROUP_BYTES // 4)[:, GROUP // 4 :])
        else:
            for moment in moments:
                stored += moment.view(-1, GROUP).split(GROUP // 2, 1)
        rows = _words if is_split else _rows
        return [rows(weight), *stored, *(rows(plane) for plane in state[len(moments) :]), rows(gradient)]

    def state(self, compute_type: ComputeType) -> tuple[Plane, ...]:
        """State planes in the order in which a record interleaves them and a kernel takes them."""
        return self.moments if compute_type is ComputeType.FLOAT32 else (*self.moments, Plane.REMAINDER)

    def dtypes(self, compute_type: ComputeType) -> dict[Plane, torch.dtype]:
        """The type of every plane: weight, state and gradient; uint8 stands for codes with their peaks."""
        compute = torch.float32 if compute_type is ComputeType.FLOAT32 else torch.bfloat16
        moment = torch.uint8 if self.codes else torch.float32
        types = {Plane.WEIGHT: compute, **dict.fromkeys(self.moments, moment)}
        if compute_type is not ComputeType.FLOAT32:
            types[Plane.REMAINDER] = torch.int16
        return {**types, Plane.GRADIENT: compute}

    def element_bytes(self, compute_type: ComputeType) -> dict[Plane, int | Fraction]:
        """Bytes per element of every plane, as `Record.lay_out` takes them."""
        return {
            plane: Fraction(CODED_GROUP_BYTES, GROUP) if dtype is torch.uint8 else dtype.itemsize
            for plane, dtype in self.dtypes(compute_type).items()
        }


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What an optimizer computes: a rule, and the function that turns an optimizer's settings into the rule's scalars."""

    rule: Rule
    scalars: Callable[..., dict[str, float]]

    def hyper(self, settings: Mapping[str, Any], step: int, gradient_scale: float = 1.0) -> Hyper:
        """Freeze the `step`-th update (from 1) of a parameter whose gradient is multiplied by `gradient_scale` first.

        `settings` may hold more than `scalars` takes, and values of any type that converts to float.
        """
        assert step >= 1, step
        values = {**settings, "step": step}
        scalars = self.scalars(**{name: _as_floats(values[name]) for name in _parameters(self.scalars)})
        scalars["gradient_scale"] = gradient_scale
        return tuple(scalars[name] for name in self.rule.scalars)


def part(plane: Tensor, start: int, stop: int) -> Tensor:
    """Elements `[start, stop)` of a plane, 1-D; of codes the groups that hold them, `start` beginning one."""
    if plane.dtype is not torch.uint8:
        return plane[start:stop]
    assert start % GROUP == 0, start
    return plane[start // GROUP * CODED_GROUP_BYTES : -(-stop // GROUP) * CODED_GROUP_BYTES]


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


@cache
def _parameters(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _as_floats(value: Any) -> float | tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else float(value)


def _words(plane: Tensor) -> Tensor:
    return plane.view(torch.int32).view(-1, GROUP // 2)


def _rows(plane: Tensor) -> Tensor:
    return plane.view(-1, GROUP)


def _encode_signed(values: Tensor, peak: Tensor) -> Tensor:
    return (values / peak * 127).round().to(torch.int8)


def _encode_root(values: Tensor, peak: Tensor) -> Tensor:
    codes = (values.sqrt() / peak * 255).round()
    return torch.where(values > 0, codes.clamp_min(1), 0.0).to(torch.uint8)


SIGNED_CODES = Codes(torch.int8, torch.abs, _encode_signed, lambda codes, peak: codes.float() * (peak / 127))
"""Evenly spaced between minus and plus the largest magnitude of the group."""

ROOT_CODES = Codes(
    torch.uint8, torch.sqrt, _encode_root, lambda codes, peak: (codes.float() * (peak / 255)).square()
)
"""For values that are not negative: evenly spaced roots. What is not zero stays so, or a step would divide by nothing."""
