"""The update rules, elementwise and in fp32, and the numbers that each takes.

AdamW   Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), https://arxiv.org/abs/1711.05101;
        order of operations as in `torch.optim.AdamW`. With moments in 8 bits it is the same rule: [Note: codes].
SGD     with momentum as in `torch.optim.SGD`; the rule serves two optimizers, see `_sgdsai_scalars`.
SGDSaI  Xu et al., "No more Adam: learning rate scaling at initialization is all you need" (2024),
        https://arxiv.org/abs/2412.11768.
Lion    Chen et al., "Symbolic discovery of optimization algorithms" (2023), https://arxiv.org/abs/2302.06675.
Adan    Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models" (2022),
        https://arxiv.org/abs/2208.06677; with the bias corrections that the paper's initialization makes unnecessary.

A rule is a function of tensors, and a function of an optimizer's settings that returns the rule's scalars by name, in
double precision. Moments start at zero, and every rule keeps padding, which is zero in all planes, at zero.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from outsize.block import Plane
from outsize.optim.rule import ROOT_CODES, SIGNED_CODES, Algorithm, Rule

Scalars = dict[str, float]


def _adamw_scalars(
    step: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Scalars:
    """What `_adamw` takes in its `step`-th update."""
    beta1, beta2 = betas
    return {
        "rate1": 1 - beta1,
        "beta2": beta2,
        "rate2": 1 - beta2,
        "decay": 1 - lr * weight_decay,
        "step_size": lr / (1 - beta1**step),
        "correction2": sqrt(1 - beta2**step),
        "eps": eps,
    }


def _adamw(
    master: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    gradient: Tensor,
    rate1: Tensor,
    beta2: Tensor,
    rate2: Tensor,
    decay: Tensor,
    step_size: Tensor,
    correction2: Tensor,
    eps: Tensor,
) -> tuple[Tensor, ...]:
    moment1 = moment1 + rate1 * (gradient - moment1)
    moment2 = moment2 * beta2 + rate2 * gradient * gradient
    master = master * decay - step_size * moment1 / (moment2.sqrt() / correction2 + eps)
    return master, moment1, moment2


def _sgd_scalars(lr: float, momentum: float, weight_decay: float, nesterov: float) -> Scalars:
    """What `_sgd` takes for SGD: momentum sums gradients, and weight decay is added to the gradient."""
    return {
        "coupled_decay": weight_decay,
        "momentum": momentum,
        "rate": 1.0,
        "decay": 1.0,
        "gradient_step": lr if nesterov else 0.0,
        "moment_step": lr * momentum if nesterov else lr,
    }


def _sgdsai_scalars(lr: float, momentum: float, weight_decay: float, scale: float) -> Scalars:
    """What `_sgd` takes for SGD-SaI: momentum averages gradients, `scale` multiplies `lr`, weight decay is decoupled."""
    return {
        "coupled_decay": 0.0,
        "momentum": momentum,
        "rate": 1 - momentum,
        "decay": 1 - lr * weight_decay,
        "gradient_step": 0.0,
        "moment_step": lr * scale,
    }


def _sgd(
    master: Tensor,
    moment: Tensor,
    gradient: Tensor,
    coupled_decay: Tensor,
    momentum: Tensor,
    rate: Tensor,
    decay: Tensor,
    gradient_step: Tensor,
    moment_step: Tensor,
) -> tuple[Tensor, ...]:
    gradient = gradient + coupled_decay * master
    moment = moment * momentum + rate * gradient
    master = master * decay - (gradient_step * gradient + moment_step * moment)
    return master, moment


def _lion_scalars(lr: float, betas: tuple[float, float], weight_decay: float) -> Scalars:
    """What `_lion` takes."""
    beta1, beta2 = betas
    return {
        "beta1": beta1,
        "rate1": 1 - beta1,
        "beta2": beta2,
        "rate2": 1 - beta2,
        "decay": 1 - lr * weight_decay,
        "lr": lr,
    }


def _lion(
    master: Tensor,
    moment: Tensor,
    gradient: Tensor,
    beta1: Tensor,
    rate1: Tensor,
    beta2: Tensor,
    rate2: Tensor,
    decay: Tensor,
    lr: Tensor,
) -> tuple[Tensor, ...]:
    direction = (moment * beta1 + rate1 * gradient).sign()
    return master * decay - lr * direction, moment * beta2 + rate2 * gradient


def _adan_scalars(
    step: float, lr: float, betas: tuple[float, float, float], eps: float, weight_decay: float
) -> Scalars:
    """What `_adan` takes in its `step`-th update; the first has no previous gradient to subtract.

    A beta is the share of a moment that a step keeps, as in Adam; the paper's betas are one minus these.
    """
    beta1, beta2, beta3 = betas
    return {
        "has_previous": 0.0 if step == 1 else 1.0,
        "beta1": beta1,
        "rate1": 1 - beta1,
        "beta2": beta2,
        "rate2": 1 - beta2,
        "beta3": beta3,
        "rate3": 1 - beta3,
        "gradient_step": lr / (1 - beta1**step),
        "difference_step": lr * beta2 / (1 - beta2**step),
        "correction3": sqrt(1 - beta3**step),
        "eps": eps,
        "decay": 1 / (1 + lr * weight_decay),
    }


def _adan(
    master: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    moment3: Tensor,
    previous: Tensor,
    gradient: Tensor,
    has_previous: Tensor,
    beta1: Tensor,
    rate1: Tensor,
    beta2: Tensor,
    rate2: Tensor,
    beta3: Tensor,
    rate3: Tensor,
    gradient_step: Tensor,
    difference_step: Tensor,
    correction3: Tensor,
    eps: Tensor,
    decay: Tensor,
) -> tuple[Tensor, ...]:
    difference = has_previous * (gradient - previous)
    ahead = gradient + beta2 * difference
    moment1 = moment1 * beta1 + rate1 * gradient
    moment2 = moment2 * beta2 + rate2 * difference
    moment3 = moment3 * beta3 + rate3 * ahead * ahead
    step = (gradient_step * moment1 + difference_step * moment2) / (moment3.sqrt() / correction3 + eps)
    return (master - step) * decay, moment1, moment2, moment3, gradient


ADAMW = Rule("adamw", (Plane.MOMENT1, Plane.MOMENT2), _adamw)
ADAMW8BIT = Rule("adamw8bit", ADAMW.moments, _adamw, (SIGNED_CODES, ROOT_CODES))
SGD = Rule("sgd", (Plane.MOMENT1,), _sgd)
LION = Rule("lion", (Plane.MOMENT1,), _lion)
ADAN = Rule("adan", (Plane.MOMENT1, Plane.MOMENT2, Plane.MOMENT3, Plane.PREVIOUS), _adan)

ALGORITHMS = {
    "AdamW": Algorithm(ADAMW, _adamw_scalars),
    "AdamW8bit": Algorithm(ADAMW8BIT, _adamw_scalars),
    "SGD": Algorithm(SGD, _sgd_scalars),
    "SGDSaI": Algorithm(SGD, _sgdsai_scalars),
    "Lion": Algorithm(LION, _lion_scalars),
    "Adan": Algorithm(ADAN, _adan_scalars),
}
"""What each optimizer computes, by the name of its class in `outsize.engine.optimizers`, which declares its settings."""

RULES = {algorithm.rule.name: algorithm.rule for algorithm in ALGORITHMS.values()}
"""All rules by name, as the process that compiles one looks it up."""
