"""What every backward of a visit checks first: cases that would be silently wrong are refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outsize.errors import UsageError


@dataclass(frozen=True, slots=True)
class BackwardCheck:
    """How often a point's blocks had been updated when its forward ran."""

    point: str
    num_steps: tuple[int, ...]

    def check(self, num_steps: tuple[int, ...]) -> None:
        """Refuse a backward through other weights, and one that must not add to parameters' gradients."""
        if num_steps != self.num_steps:
            raise UsageError(
                f"the weights of {self.point} were updated between its forward and its backward",
                hint="call backward() before optimizer.step()",
            )
        if not torch.autograd._is_checkpoint_valid():
            raise UsageError(
                f"torch.autograd.grad, or backward(inputs=...), through {self.point}: a visit adds to the gradients "
                "of its parameters, which that must not do",
                hint="call loss.backward() and read .grad",
            )
