from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.block import Plane
from outsize.config import ComputeType
from outsize.optim import RULES, AdamWHyper, deinterleave, interleave, join, split

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
    assert list(RULES) == ["adamw", "adamw8bit", "sgd", "lion", "adan"]
    assert all(RULES[rule.name] is rule for rule in RULES.values())
    num_moments = {"adamw": 2, "adamw8bit": 2, "sgd": 1, "lion": 1, "adan": 4}
    for name, rule in RULES.items():
        assert rule.moments[0] is Plane.MOMENT1, "it stands for all state planes in a placement"
        assert len(set(rule.moments)) == num_moments[name]
        assert rule.state(ComputeType.FLOAT32) == rule.moments
        assert rule.state(ComputeType.BFLOAT16) == (*rule.moments, Plane.REMAINDER)
        moments = dict.fromkeys(rule.moments, Fraction(17, 16) if rule.codes else 4)
        assert rule.element_bytes(ComputeType.FLOAT32) == {Plane.WEIGHT: 4, **moments, Plane.GRADIENT: 4}
        narrow = {Plane.WEIGHT: 2, **moments, Plane.REMAINDER: 2, Plane.GRADIENT: 2}
        assert rule.element_bytes(ComputeType.BFLOAT16) == narrow


def test_steps_count_from_one():
    with pytest.raises(AssertionError):
        AdamWHyper(lr=1e-3, step=0)
