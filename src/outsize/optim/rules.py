"""The update rules, elementwise and in fp32, and the hyperparameters that each takes.

AdamW   Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), https://arxiv.org/abs/1711.05101;
        order of operations as in `torch.optim.AdamW`. With moments in 8 bits it is the same rule: [Note: codes].
SGD     with momentum as in `torch.optim.SGD`; the rule serves two optimizers, see `SGDSaIHyper`.
SGDSaI  Xu et al., "No more Adam: learning rate scaling at initialization is all you need" (2024),
        https://arxiv.org/abs/2412.11768.
Lion    Chen et al., "Symbolic discovery of optimization algorithms" (2023), https://arxiv.org/abs/2302.06675.
Adan    Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models" (2022),
        https://arxiv.org/abs/2208.06677; with bias corrections, which the paper replaces by how it starts.

Moments begin at zero, and padding, which is zero everywhere, stays so under every rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from outsize.block import Plane
from outsize.optim.rule import ROOT_CODES, SIGNED_CODES, Hyper, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWHyper(Hyper):
    """Settings of AdamW."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def scalars(self) -> list[float]:
        """As `_adamw` takes them."""
        return [
            self.gradient_scale,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            1 - self.lr * self.weight_decay,
            self.lr / (1 - self.beta1**self.step),
            sqrt(1 - self.beta2**self.step),
            self.eps,
        ]


def _adamw(
    master: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    scale, rate1, beta2, rate2, decay, step_size, correction2, eps = scalars.unbind()
    gradient = gradient * scale
    moment1 = moment1 + rate1 * (gradient - moment1)
    moment2 = moment2 * beta2 + rate2 * gradient * gradient
    master = master * decay - step_size * moment1 / (moment2.sqrt() / correction2 + eps)
    return master, moment1, moment2


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDHyper(Hyper):
    """Settings of SGD: momentum sums gradients, and weight decay is added to the gradient."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def scalars(self) -> list[float]:
        """As `_sgd` takes them."""
        own, past = (self.lr, self.lr * self.momentum) if self.nesterov else (0.0, self.lr)
        return [self.gradient_scale, self.weight_decay, self.momentum, 1.0, 1.0, own, past]


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDSaIHyper(Hyper):
    """Settings of SGD-SaI: momentum averages gradients, `scale` multiplies `lr`, and weight decay is decoupled."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    scale: float = 1.0

    def scalars(self) -> list[float]:
        """As `_sgd` takes them."""
        decay = 1 - self.lr * self.weight_decay
        return [
            self.gradient_scale,
            0.0,
            self.momentum,
            1 - self.momentum,
            decay,
            0.0,
            self.lr * self.scale,
        ]


def _sgd(master: Tensor, moment: Tensor, gradient: Tensor, scalars: Tensor) -> tuple[Tensor, ...]:
    scale, coupled_decay, momentum, rate, decay, gradient_step, moment_step = scalars.unbind()
    gradient = gradient * scale + coupled_decay * master
    moment = moment * momentum + rate * gradient
    master = master * decay - (gradient_step * gradient + moment_step * moment)
    return master, moment


@dataclass(frozen=True, slots=True, kw_only=True)
class LionHyper(Hyper):
    """Settings of Lion."""

    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def scalars(self) -> list[float]:
        """As `_lion` takes them."""
        return [
            self.gradient_scale,
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            1 - self.lr * self.weight_decay,
            self.lr,
        ]


def _lion(master: Tensor, moment: Tensor, gradient: Tensor, scalars: Tensor) -> tuple[Tensor, ...]:
    scale, beta1, rate1, beta2, rate2, decay, lr = scalars.unbind()
    gradient = gradient * scale
    direction = (moment * beta1 + rate1 * gradient).sign()
    return master * decay - lr * direction, moment * beta2 + rate2 * gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class AdanHyper(Hyper):
    """Settings of Adan; the betas are kept parts, as in Adam (the paper's are one minus these)."""

    beta1: float = 0.98
    beta2: float = 0.92
    beta3: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0

    def scalars(self) -> list[float]:
        """As `_adan` takes them; the first step has no gradient before it, so no difference to one."""
        return [
            self.gradient_scale,
            0.0 if self.step == 1 else 1.0,
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.beta3,
            1 - self.beta3,
            self.lr / (1 - self.beta1**self.step),
            self.lr * self.beta2 / (1 - self.beta2**self.step),
            sqrt(1 - self.beta3**self.step),
            self.eps,
            1 / (1 + self.lr * self.weight_decay),
        ]


def _adan(
    master: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    moment3: Tensor,
    previous: Tensor,
    gradient: Tensor,
    scalars: Tensor,
) -> tuple[Tensor, ...]:
    scale, has_previous, beta1, rate1, beta2, rate2, beta3, rate3, *rest = scalars.unbind()
    gradient_step, difference_step, correction3, eps, decay = rest
    gradient = gradient * scale
    difference = has_previous * (gradient - previous)
    ahead = gradient + beta2 * difference
    moment1 = moment1 * beta1 + rate1 * gradient
    moment2 = moment2 * beta2 + rate2 * difference
    moment3 = moment3 * beta3 + rate3 * ahead * ahead
    step = (gradient_step * moment1 + difference_step * moment2) / (moment3.sqrt() / correction3 + eps)
    return (master - step) * decay, moment1, moment2, moment3, gradient


ADAMW = Rule("adamw", (Plane.MOMENT1, Plane.MOMENT2), 8, _adamw)
ADAMW8BIT = Rule("adamw8bit", ADAMW.moments, 8, _adamw, (SIGNED_CODES, ROOT_CODES))
SGD = Rule("sgd", (Plane.MOMENT1,), 7, _sgd)
LION = Rule("lion", (Plane.MOMENT1,), 7, _lion)
ADAN = Rule("adan", (Plane.MOMENT1, Plane.MOMENT2, Plane.MOMENT3, Plane.PREVIOUS), 13, _adan)

RULES = {rule.name: rule for rule in (ADAMW, ADAMW8BIT, SGD, LION, ADAN)}
"""All rules by name; a rule must be here to be compiled, since another process does it."""
