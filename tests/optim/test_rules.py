import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import Plane
from outsize.config import ComputeType
from outsize.optim import ADAMW, RULES, Hyper, deinterleave, interleave, join, split

UPPER = [0x0000, 0x0001, 0x007F, 0x0080, 0x00FF, 0x3F7F, 0x3F80, 0x3FFF, 0x4000, 0x7F00, 0x7F7E]
"""Upper halves: zero, smallest and largest denormals, carries into the exponent, one, largest numbers."""


@pytest.mark.parametrize("upper", UPPER + [half | 0x8000 for half in UPPER], ids=hex)
def test_split_and_join_are_inverse_for_every_lower_half(upper):
    bits = torch.arange(1 << 16, dtype=torch.int64) + (upper << 16)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    weight, remainder = split(bits.view(torch.float32))
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(weight, remainder).view(torch.int32), bits)


@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_the_weight_is_the_nearest_bf16_except_on_ties(upper):
    bits = torch.arange(1 << 16, dtype=torch.int32) + (upper << 16)
    master = bits.view(torch.float32)
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(split(master)[0][~tie], master.bfloat16()[~tie])
    away = (bits[tie] >> 16) + 1
    assert torch.equal(split(master)[0][tie].view(torch.int16).to(torch.int32), away)


@given(st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_interleave_inverts_deinterleave(length):
    values = torch.arange(length, dtype=torch.float32)
    assert torch.equal(interleave(deinterleave(values)), values)
    assert torch.equal(deinterleave(values)[64:], deinterleave(values[64:])) or length < 64


def test_planes_and_their_sizes():
    assert RULES == {"adamw": ADAMW}
    moments = (Plane.MOMENT1, Plane.MOMENT2)
    assert ADAMW.state(ComputeType.FLOAT32) == moments
    assert ADAMW.state(ComputeType.BFLOAT16) == (*moments, Plane.REMAINDER)
    assert ADAMW.element_bytes(ComputeType.FLOAT32) == {
        Plane.WEIGHT: 4,
        Plane.MOMENT1: 4,
        Plane.MOMENT2: 4,
        Plane.GRADIENT: 4,
    }
    assert ADAMW.element_bytes(ComputeType.BFLOAT16) == {
        Plane.WEIGHT: 2,
        Plane.MOMENT1: 4,
        Plane.MOMENT2: 4,
        Plane.REMAINDER: 2,
        Plane.GRADIENT: 2,
    }


def test_steps_count_from_one():
    with pytest.raises(AssertionError):
        ADAMW.scalars(Hyper(lr=1e-3, step=0))
