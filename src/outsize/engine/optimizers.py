"""The optimizers: what each is, and its settings with their defaults and ranges.

All take `(model, params=None, *, ..., max_grad_norm=None)`; what they share is `Optimizer`, what they compute is in
`outsize.optim.rules`, under the same names. `params` are parameters or groups of them, as in torch; by default all that
require grad. Create one after freezing and before the first `backward()`. Settings out of range raise ConfigError.
"""

from __future__ import annotations

import math
from typing import Any, final

from torch import nn

from outsize.engine.optimizer import (
    DecayRate,
    MaxNorm,
    Nesterov,
    NonNegative,
    Optimizer,
    Params,
    Positive,
    Settings,
    ThreeDecayRates,
    TwoDecayRates,
    declares_settings,
)
from outsize.errors import ConfigError


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by the usual rule: what has two dimensions or more decays, norms and biases do not.

    Two groups of the parameters that require grad, `"name": "decay"` with `weight_decay` and `"name": "no_decay"` with
    0; either may be empty. Tables of embeddings decay. Raises ConfigError for a negative `weight_decay`.
    """
    if weight_decay < 0:
        raise ConfigError(f"decay_groups(weight_decay={weight_decay!r}) is out of range")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trainable if parameter.dim() >= 2]
    others = [parameter for parameter in trainable if parameter.dim() < 2]
    return [
        {"name": "decay", "params": decaying, "weight_decay": weight_decay},
        {"name": "no_decay", "params": others, "weight_decay": 0.0},
    ]


class _AdamW(Optimizer):
    """The settings of AdamW, whatever the moments are stored in."""

    @declares_settings
    def __init__(
        self,
        model: nn.Module,
        params: Params = None,
        *,
        lr: NonNegative = 1e-3,
        betas: TwoDecayRates = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 1e-2,
        max_grad_norm: MaxNorm = None,
    ) -> None: ...


@final
class AdamW(_AdamW):
    """As `torch.optim.AdamW`: two moments, weight decay apart from the gradient.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), https://arxiv.org/abs/1711.05101.
    """


@final
class AdamW8bit(_AdamW):
    """AdamW whose moments are stored in one byte per element, and one fp32 peak per group of 64.

    The first moment is evenly spaced between minus and plus the peak of its group, the root of the second between 0 and
    the peak; what is not zero is not rounded to zero. Computed in fp32. Tables are in 8 bits too.
    Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022), https://arxiv.org/abs/2110.02861,
    with smaller groups, so that evenly spaced codes do, where theirs of 2,048 need a dynamic range within a code.
    """


@final
class SGD(Optimizer):
    """As `torch.optim.SGD` without dampening: `weight_decay` is added to the gradient, momentum sums.

    One moment is stored, with `momentum=0` too.
    """

    @declares_settings
    def __init__(
        self,
        model: nn.Module,
        params: Params = None,
        *,
        lr: NonNegative = 1e-3,
        momentum: NonNegative = 0.0,
        weight_decay: NonNegative = 0.0,
        nesterov: Nesterov = False,
        max_grad_norm: MaxNorm = None,
    ) -> None: ...


@final
class SGDSaI(Optimizer):
    """SGD with momentum, the learning rate of each parameter scaled once, by its first gradient g of n elements.

        scale = norm(g) / (std(g) + eps)              the signal-to-noise ratio g-SNR; sqrt(n) where std(g) is 0
        m     = momentum * m + (1 - momentum) * g
        w     = w * (1 - lr * weight_decay) - lr * scale * m

    norm is the 2-norm, std that of all n elements, before clipping. Where the mean of g is near 0 the scale is near
    sqrt(n): learning rates are far from those of SGD. A table of embeddings has one scale, however it is cut. Scales
    are in state_dicts. The first step reads the gradients that are on disk once more. One moment is stored.
    Source: Xu et al., "No more Adam: learning rate scaling at initialization is all you need" (2024),
    https://arxiv.org/abs/2412.11768.
    """

    _book_names = ("num_steps", "scales")

    @declares_settings
    def __init__(
        self,
        model: nn.Module,
        params: Params = None,
        *,
        lr: NonNegative = 1e-3,
        momentum: DecayRate = 0.9,
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        max_grad_norm: MaxNorm = None,
    ) -> None: ...

    def _measure(self, name: str, settings: Settings) -> dict[str, float]:
        scales = self._books["scales"]
        if name not in scales:
            scales[name] = self._signal_to_noise(name, float(settings["eps"]))
        return {"scale": scales[name]}

    def _signal_to_noise(self, name: str, eps: float) -> float:
        num_elements = self._runtime.model.parameters[name].numel()
        total = squares = 0.0
        for part in self._gradient_parts(name):
            total += float(part.sum())
            squares += float(part.square().sum())
        variance = squares / num_elements - (total / num_elements) ** 2
        # What cancellation leaves of equal elements is not noise.
        if variance <= 1e-14 * squares / num_elements:
            return math.sqrt(num_elements)
        return math.sqrt(squares) / (math.sqrt(variance) + eps)


@final
class Lion(Optimizer):
    """Steps of size `lr` in the direction of the sign of a momentum; one moment is stored.

        w = w * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    Usual learning rates are 3 to 10 times smaller than AdamW's, and weight decay larger by the same factor.
    Source: Chen et al., "Symbolic discovery of optimization algorithms" (2023), https://arxiv.org/abs/2302.06675.
    """

    @declares_settings
    def __init__(
        self,
        model: nn.Module,
        params: Params = None,
        *,
        lr: NonNegative = 1e-4,
        betas: TwoDecayRates = (0.9, 0.99),
        weight_decay: NonNegative = 0.0,
        max_grad_norm: MaxNorm = None,
    ) -> None: ...


@final
class Adan(Optimizer):
    """Adaptive Nesterov momentum: moments of the gradient g, of its change d since the last step, and of a square.

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * d               d is 0 at the first step
        n = beta3 * n + (1 - beta3) * (g + beta2 * d) ** 2
        w = (w - lr * (m + beta2 * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay)

    with bias corrections of m, v and n. The betas are kept parts, as in Adam; the paper's are one minus these. Three
    moments and the last gradient (clipped) are stored; a parameter that misses a step compares with the last it had.
    Source: Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models" (2022),
    https://arxiv.org/abs/2208.06677.
    """

    @declares_settings
    def __init__(
        self,
        model: nn.Module,
        params: Params = None,
        *,
        lr: NonNegative = 1e-3,
        betas: ThreeDecayRates = (0.98, 0.92, 0.99),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        max_grad_norm: MaxNorm = None,
    ) -> None: ...
