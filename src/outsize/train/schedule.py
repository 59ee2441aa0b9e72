"""The learning rate as a pure function of the step: a linear warm-up, then half a cosine.

After SGDR (https://arxiv.org/abs/1608.03983), without restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(step: int, *, warmup_steps: int, num_steps: int | None, floor: float = 0.1) -> float:
    """What the peak learning rate is multiplied by in `step` (counted from 0) of `num_steps`.

    Rises linearly to 1 in the last step of the warm-up, falls to `floor` in the last step of all, and stays
    there. Where `num_steps` is not known yet, it stays at 1 after the warm-up.

    >>> [round(lr_factor(step, warmup_steps=2, num_steps=5), 3) for step in range(6)]
    [0.5, 1.0, 0.775, 0.325, 0.1, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if num_steps is None:
        return 1.0
    length = num_steps - max(warmup_steps, 1)
    if length <= 0:
        return 1.0
    progress = min(1.0, (step - max(warmup_steps, 1) + 1) / length)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, num_steps: Callable[[], int | None]) -> LambdaLR:
    """A scheduler that applies `lr_factor`; asks `num_steps` in each step, for runs limited by time."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, warmup_steps=warmup_steps, num_steps=num_steps()))
