"""Every rule beside AdamW against a plain implementation, and split planes against fp32 ones."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from outsize.block import Plane
from outsize.config import ComputeType
from outsize.optim import (
    ADAMW8BIT,
    ADAN,
    ALGORITHMS,
    LION,
    RULES,
    SGD,
    Backend,
    compile_rule,
    interleave,
    join,
    part,
    split,
    start_compile,
)
from tests.hypers import hyper
from tests.plain_optimizers import PlainAdamW8bit, PlainAdan, PlainLion, PlainSGDSaI, assert_mostly_close

NUM_ELEMENTS, STEPS = 1003, 8
FLOAT32, BFLOAT16 = ComputeType


@dataclass(frozen=True)
class Case:
    """An optimizer and the plain one, with the options of both, and what is measured for ours."""

    optimizer: str
    plain: Any
    options: dict[str, Any]
    measured: dict[str, float]

    @property
    def rule(self):
        return ALGORITHMS[self.optimizer].rule


def case(optimizer, plain, options, **measured):
    return Case(optimizer, plain, options, measured)


TORCH_SGD = torch.optim.SGD
CASES = {
    "sgd": case("SGD", TORCH_SGD, {"weight_decay": 0.1}),
    "sgd momentum": case("SGD", TORCH_SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd nesterov": case("SGD", TORCH_SGD, {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    "sgd-sai": case("SGDSaI", PlainSGDSaI, {"momentum": 0.9, "weight_decay": 0.1}, scale=3.5),
    "lion": case("Lion", PlainLion, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw8bit": case("AdamW8bit", PlainAdamW8bit, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adan": case("Adan", PlainAdan, {"betas": (0.9, 0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adan as given": case("Adan", PlainAdan, {}),
}
COMPILED = [(LION, BFLOAT16), (ADAMW8BIT, BFLOAT16)]
"""Compiled in tests: those with operations that others lack (building takes half a minute)."""


@pytest.fixture(scope="session")
def kernels():
    started = [start_compile(*kind) for kind in COMPILED]
    made = [compile_rule(rule, kind, eager=True) for rule in RULES.values() for kind in ComputeType]
    made += [compilation.wait() for compilation in started]
    return {(kernel.rule.name, kernel.compute_type, kernel.backend): kernel for kernel in made}


def kinds_of(rule):
    """The kernels of a rule that tests make: eager ones, and what is compiled."""
    eager = [(kind, Backend.EAGER) for kind in ComputeType]
    return eager + [(kind, Backend.COMPILED) for compiled, kind in COMPILED if compiled is rule]


def kernel_of(kernels, rule, compute_type, backend):
    if (rule.name, compute_type, backend) not in kernels:
        pytest.skip("no C++ compiler here")
    return kernels[rule.name, compute_type, backend]


def drawn(*seeds):
    """Numbers that bf16 holds, one tensor per seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(NUM_ELEMENTS, generator=generator).bfloat16().float() for generator in generators]


def learning_rate(step):
    return 1e-2 / step


def state_of(rule, num_elements):
    """Moments of zero, as a kernel takes them."""
    num_bytes = -(-num_elements // 64) * 68
    return [
        torch.zeros(num_bytes, dtype=torch.uint8) if rule.codes else torch.zeros(num_elements)
        for _ in rule.moments
    ]


def run(kernel, case, steps=STEPS):
    """Master and fp32 moments in natural order after some steps, with a learning rate that falls and a clip factor."""
    master = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0))
    state = state_of(case.rule, NUM_ELEMENTS)
    weight = master
    if kernel.compute_type is BFLOAT16:
        weight, remainder = split(master)
        state.append(remainder)
    for step, gradient in enumerate(drawn(*range(1, steps + 1)), 1):
        settings = {**case.options, **case.measured, "lr": learning_rate(step)}
        numbers = hyper(case.optimizer, step=step, gradient_scale=0.3, **settings)
        kernel(weight, state, gradient.to(weight.dtype), numbers)
    moments = [] if case.rule.codes else state[: len(case.rule.moments)]
    if kernel.compute_type is FLOAT32:
        return [weight, *moments]
    return [join(weight, state[-1]), *(interleave(moment) for moment in moments)]


def run_plainly(case, steps=STEPS):
    parameter = torch.nn.Parameter(torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0)))
    optimizer = case.plain([parameter], lr=1.0, **case.options)
    if isinstance(optimizer, PlainSGDSaI):
        optimizer.scales[parameter] = case.measured["scale"]
    for step, gradient in enumerate(drawn(*range(1, steps + 1)), 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        parameter.grad = gradient * 0.3
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("name", "compute_type", "backend"),
    [(name, *kind) for name, case in CASES.items() for kind in kinds_of(case.rule)],
)
def test_a_rule_is_its_plain_optimizer(name, compute_type, backend, kernels):
    case = CASES[name]
    kernel = kernel_of(kernels, case.rule, compute_type, backend)
    for steps in (1, 2, STEPS):
        ours, expected = run(kernel, case, steps)[0], run_plainly(case, steps)
        share = 0.01 if case.rule.codes and steps > 1 else 0.0
        assert_mostly_close(ours, expected, share, rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_split_planes_have_the_bits_of_fp32_ones(name, kernels):
    case = CASES[name]
    results = [run(kernels[case.rule.name, kind, Backend.EAGER], case) for kind in ComputeType]
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_compiled_lion_has_the_bits_of_the_eager_one(kernels):
    """Every operation of it is rounded correctly everywhere; a contracted multiply-add would show."""
    compiled = run(kernel_of(kernels, LION, BFLOAT16, Backend.COMPILED), CASES["lion"])
    for value, expected in zip(
        compiled, run(kernels["lion", FLOAT32, Backend.EAGER], CASES["lion"]), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("rule", "compute_type", "backend"),
    [(rule, *kind) for rule in (SGD, LION, ADAN, ADAMW8BIT) for kind in kinds_of(rule)],
    ids=lambda value: getattr(value, "name", value),
)
def test_padding_stays_zero(rule, compute_type, backend, kernels):
    kernel = kernel_of(kernels, rule, compute_type, backend)
    optimizer = next(name for name, algorithm in ALGORITHMS.items() if algorithm.rule is rule)
    dtypes = rule.dtypes(compute_type)
    weight, gradient = (torch.zeros(128, dtype=dtypes[plane]) for plane in (Plane.WEIGHT, Plane.GRADIENT))
    state = state_of(rule, 128)
    if compute_type is BFLOAT16:
        state.append(torch.zeros(128, dtype=torch.int16))
    for step in (1, 2):
        kernel(weight, state, gradient, hyper(optimizer, lr=0.1, step=step, weight_decay=0.1))
    planes = (weight, *(plane for plane in state if plane.dtype is not torch.uint8))
    assert not any(plane.count_nonzero() for plane in planes)


@pytest.mark.parametrize(
    ("rule", "compute_type", "backend"),
    [(ADAN, BFLOAT16, Backend.EAGER), *((ADAMW8BIT, *kind) for kind in kinds_of(ADAMW8BIT))],
    ids=lambda value: getattr(value, "name", value),
)
def test_slices_do_not_change_the_bits(rule, compute_type, backend, kernels):
    """Of the rule with most planes and of the one in codes, cut at groups, the last of them partial."""
    kernel = kernel_of(kernels, rule, compute_type, backend)
    optimizer = "Adan" if rule is ADAN else "AdamW"
    results = []
    for bounds in ([0, NUM_ELEMENTS], [0, 64, 320, NUM_ELEMENTS]):
        weight, *gradients = drawn(*range(5))
        state = state_of(rule, NUM_ELEMENTS)
        if compute_type is BFLOAT16:
            weight, remainder = split(weight * 1.001)
            state.append(remainder)
        for step, gradient in enumerate(gradients, 1):
            for start, stop in pairwise(bounds):
                own = [part(plane, start, stop) for plane in state]
                inside = gradient[start:stop].to(weight.dtype)
                kernel(weight[start:stop], own, inside, hyper(optimizer, lr=1e-2, step=step))
        results.append([weight, *state])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_compiled_codes_are_the_eager_ones_but_for_the_last_bit_of_roots(kernels):
    compiled = run(kernel_of(kernels, ADAMW8BIT, BFLOAT16, Backend.COMPILED), CASES["adamw8bit"])
    eager = run(kernels["adamw8bit", BFLOAT16, Backend.EAGER], CASES["adamw8bit"])
    assert_mostly_close(compiled[0], eager[0], 0.01, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_training_with_codes_stays_near_training_without(beta2, kernels):
    """Gradients of many magnitudes within a group, for long enough that errors would add up."""
    generator = torch.Generator().manual_seed(0)
    target, start = torch.randn(NUM_ELEMENTS, generator=generator), torch.zeros(NUM_ELEMENTS)
    size = torch.randn(NUM_ELEMENTS, generator=generator).exp()
    results = {}
    for name in ("adamw", "adamw8bit"):
        rule, weight = RULES[name], start.clone()
        state = state_of(rule, NUM_ELEMENTS)
        noise = torch.Generator().manual_seed(1)
        for step in range(1, 301):
            gradient = size * (weight - target + torch.randn(NUM_ELEMENTS, generator=noise))
            numbers = hyper(lr=1e-2, betas=(0.9, beta2), step=step, weight_decay=0.0)
            kernels[name, FLOAT32, Backend.EAGER](weight, state, gradient, numbers)
        results[name] = weight
    moved = (results["adamw"] - start).norm()
    assert (results["adamw8bit"] - results["adamw"]).norm() <= 0.05 * moved
    errors = {name: float((weight - target).norm()) for name, weight in results.items()}
    assert errors["adamw8bit"] == pytest.approx(errors["adamw"], rel=0.05)


def test_a_small_element_of_a_group_takes_no_leap(kernels):
    """Its second moment is below the least level of its group; rounded to zero, it would divide by nothing."""
    weight, state = torch.zeros(64), state_of(ADAMW8BIT, 64)
    for step in range(1, 41):
        gradient = torch.full((64,), 0.02 if step <= 30 else 0.0)
        gradient[0] = 100.0 if step == 1 else 0.0
        before = weight.clone()
        numbers = hyper(lr=1e-2, step=step, weight_decay=0.0)
        kernels["adamw8bit", FLOAT32, Backend.EAGER](weight, state, gradient, numbers)
        assert (weight - before).abs().max() <= 0.02


def test_hyperparameters_of_another_rule_are_refused(kernels):
    planes = [torch.zeros(64) for _ in range(3)]
    with pytest.raises(AssertionError, match="sgd"):
        kernels["sgd", FLOAT32, Backend.EAGER](planes[0], planes[1:2], planes[2], hyper("Adan", lr=0.1))
