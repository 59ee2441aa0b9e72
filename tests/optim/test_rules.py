import inspect
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import outsize
from outsize.block import Plane
from outsize.config import ComputeType, OptimizerName
from outsize.optim import ALGORITHMS, RULES, deinterleave, interleave, join, split
from outsize.optim.rule import ROOT_CODES, SIGNED_CODES
from tests.hypers import hyper

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
        hyper(lr=1e-3, step=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_computes_the_scalars_of_its_rule_from_declared_settings(name):
    rule, scalars = ALGORITHMS[name].rule, ALGORITHMS[name].scalars
    declared = {parameter: 1.0 for parameter in inspect.signature(getattr(outsize, name)).parameters}
    declared["betas"] = (0.5,) * (3 if name == "Adan" else 2)
    taken = inspect.signature(scalars).parameters
    assert set(taken) - {"step", "scale"} <= set(declared)
    values = {"step": 1.0, "scale": 1.0, **declared}
    computed = scalars(**{parameter: values[parameter] for parameter in taken})
    assert {"gradient_scale", *computed} == set(rule.scalars)
    assert len(rule.scalars) == len(set(rule.scalars))


def test_names_on_the_command_line_are_classes_with_their_rules():
    assert {name.name: name.rule for name in OptimizerName} == {
        name: algorithm.rule.name for name, algorithm in ALGORITHMS.items()
    }
    assert [name.value for name in OptimizerName] == ["adamw", "adamw8bit", "lion", "adan", "sgd", "sgdsai"]


def test_settings_of_any_number_type_give_the_same_scalars():
    settings = {"lr": 1, "betas": [0.5, 0.75], "eps": torch.tensor(0.25), "weight_decay": torch.tensor(0.5)}
    plain = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5, "params": []}
    assert ALGORITHMS["AdamW"].hyper(settings, step=3) == ALGORITHMS["AdamW"].hyper(plain, step=3)
    assert all(type(value) is float for value in ALGORITHMS["AdamW"].hyper(settings, step=3))


def test_of_codes_zero_stays_zero_and_nothing_else_becomes_zero():
    values = torch.tensor([[0.0, 1e-12, 0.25, 1.0]])
    codes = ROOT_CODES.encode(values, torch.ones(1, 1))
    assert codes.tolist() == [[0, 1, 128, 255]]
    assert ROOT_CODES.decode(codes, torch.ones(1, 1))[0, 0] == 0.0
    signed = torch.tensor([[-1.0, -0.5, 0.0, 1e-12, 1.0]])
    assert SIGNED_CODES.encode(signed, torch.ones(1, 1)).tolist() == [[-127, -64, 0, 0, 127]]
