import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outsize.train.schedule import Shape, lr_factor, scheduler_for

FALLING = [Shape.COSINE, Shape.LINEAR, Shape.WSD]


@given(warmup=st.integers(0, 20), num_steps=st.integers(1, 200), shape=st.sampled_from(FALLING))
def test_rises_to_the_peak_then_falls_to_the_floor(warmup, num_steps, shape):
    factors = [
        lr_factor(step, warmup_steps=warmup, num_steps=num_steps, shape=shape) for step in range(num_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    peak = max(warmup - 1, 0)
    rise, fall = factors[: peak + 1], factors[peak:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    if num_steps > max(warmup, 1):
        assert factors[peak] == 1.0
        assert factors[-1] == pytest.approx(0.1)


def test_known_values():
    assert lr_factor(0, warmup_steps=4, num_steps=10) == 0.25
    assert lr_factor(6, warmup_steps=4, num_steps=10) == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi / 2))
    )
    assert lr_factor(500, warmup_steps=4, num_steps=10) == pytest.approx(0.1)
    assert lr_factor(5, warmup_steps=4, num_steps=None) == 1.0


def test_shapes_differ_as_they_are_named():
    def factors(shape):
        return [lr_factor(step, warmup_steps=0, num_steps=11, shape=shape) for step in range(11)]

    assert factors(Shape.CONSTANT) == [1.0] * 11
    assert np.diff(factors(Shape.LINEAR)) == pytest.approx([-0.09] * 10)
    assert factors(Shape.WSD)[:9] == [1.0] * 9 and factors(Shape.WSD)[9] == pytest.approx(0.55)


def test_scheduler_sets_every_group():
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}], lr=2.0)
    scheduler = scheduler_for(optimizer, Shape.COSINE, 2, lambda: 4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [first for first, _ in seen] == pytest.approx([1.0, 2.0, 1.1, 0.2])
    assert all(first == second for first, second in seen)
