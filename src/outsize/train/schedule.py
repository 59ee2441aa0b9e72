"""The learning rate as a pure function of the step: a linear warm-up, then one of four shapes.

Cosine after SGDR (https://arxiv.org/abs/1608.03983), without restarts; warm-up, stable, decay after MiniCPM
(https://arxiv.org/abs/2404.06395).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

STABLE_PART = 0.8
"""Of the steps after the warm-up, the part in which `Shape.WSD` stays at the peak."""


class Shape(StrEnum):
    """How the learning rate goes on after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    WSD = "wsd"
    CONSTANT = "constant"


def lr_factor(
    step: int, *, warmup_steps: int, num_steps: int | None, shape: Shape = Shape.COSINE, floor: float = 0.1
) -> float:
    """What the peak learning rate is multiplied by in `step` (counted from 0) of `num_steps`.

    Rises linearly to 1 in the last step of the warm-up, then falls to `floor` in the last step of all, and stays there.
    Where `num_steps` is not known yet, it stays at 1 after the warm-up.

    >>> [round(lr_factor(step, warmup_steps=2, num_steps=5), 3) for step in range(6)]
    [0.5, 1.0, 0.775, 0.325, 0.1, 0.1]
    >>> [round(lr_factor(step, warmup_steps=1, num_steps=4, shape=Shape.LINEAR), 3) for step in range(4)]
    [1.0, 0.7, 0.4, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    length = (num_steps or 0) - max(warmup_steps, 1)
    if num_steps is None or length <= 0 or shape is Shape.CONSTANT:
        return 1.0
    progress = min(1.0, (step - max(warmup_steps, 1) + 1) / length)
    match shape:
        case Shape.COSINE:
            left = 0.5 * (1 + math.cos(math.pi * progress))
        case Shape.LINEAR:
            left = 1 - progress
        case Shape.WSD:
            left = min(1.0, (1 - progress) / (1 - STABLE_PART))
    return floor + (1 - floor) * left


def warmup_within(warmup_steps: int, num_steps: int | None) -> int:
    """The warm-up of a run of `num_steps`: half of it at most where it would otherwise not end before the run does.

    >>> warmup_within(10, 4), warmup_within(10, 11), warmup_within(10, None)
    (2, 10, 10)
    """
    return warmup_steps if num_steps is None or warmup_steps < num_steps else num_steps // 2


def scheduler_for(
    optimizer: Optimizer, shape: Shape, warmup_steps: int, num_steps: Callable[[], int | None]
) -> LambdaLR:
    """A scheduler that applies `lr_factor`; asks `num_steps` in each step, for runs limited by time."""
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(step, warmup_steps=warmup_steps, num_steps=num_steps(), shape=shape),
    )
