"""Running a model under Outsize, and plainly, for comparison.

`train` is a plain loop of PyTorch and serves both sides, so that what differs is Outsize alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import outsize
from tests.seams import close_all, is_open

Batch = Mapping[str, torch.Tensor]
LEARNING_RATE = 1e-3
EPS = 1e-4
"""With torch's 1e-8, PyTorch misses the bound against itself: rounding noise in a zero gradient becomes a step."""


def opened(plain: nn.Module, **options: Any) -> nn.Module:
    """A copy of `plain` under Outsize."""
    return outsize.wrap(copy.deepcopy(plain), **options)


def adamw(model: nn.Module, params: Any = None, **options: Any) -> torch.optim.Optimizer:
    """AdamW of Outsize or of torch, whichever `model` needs."""
    options = {"lr": LEARNING_RATE, "eps": EPS, **options}
    if is_open(model):
        return outsize.AdamW(model, params, **options)
    options.pop("max_grad_norm", None)
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad] if params is None else params, **options
    )


@contextmanager
def around_forward(
    module: nn.Module, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Inside, each forward of `module` is between `before(*args)` and `after(output)`: recomputations and tiles too.

    Hooks see calls of the model, each once, and so do not show how a call is computed.
    """
    forward = module.forward

    def surrounded(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args)
        output = forward(*args, **kwargs)
        if after:
            after(output)
        return output

    module.forward = surrounded
    try:
        yield
    finally:
        module.forward = forward


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returned."""
    return output if isinstance(output, torch.Tensor) else output.loss


def train(
    model: nn.Module,
    batches: Iterable[Batch | Sequence[Batch]],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    before_step: Callable[[int], None] = lambda step: None,
    zero_grad: bool = True,
) -> list[float]:
    """One step per batch (a list of them is accumulated); the losses."""
    optimizer = optimizer or adamw(model)
    losses = []
    for step, batch in enumerate(batches):
        for part in [batch] if isinstance(batch, Mapping) else batch:
            loss = loss_of(model(**part))
            loss.backward()
            losses.append(float(loss.detach()))
        before_step(step)
        optimizer.step()
        if zero_grad:
            optimizer.zero_grad()
    return losses


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(model: nn.Module, plain: nn.Module) -> tuple[float, str]:
    """The largest distance of a tensor to the plain model's, as a part of what is promised, and its name."""
    expected = values_of(plain)
    total = sum(float(value.double().square().sum()) for value in expected.values())
    rms = math.sqrt(total / sum(value.numel() for value in expected.values()))
    worst = (0.0, "")
    for name, value in values_of(model).items():
        other = expected[name].double()
        scale = max(float(other.norm()), math.sqrt(other.numel()) * rms)
        worst = max(worst, (float((value.double() - other).norm()) / scale / 1e-6, name))
    return worst


def assert_same_weights(model: nn.Module, plain: nn.Module) -> None:
    """Every tensor is as near to the plain model's as is promised."""
    worst, name = distance(model, plain)
    assert worst <= 1.0, f"{name} is {worst:.3g} times as far from plain PyTorch as is promised"


def assert_same_losses(losses: Sequence[float], expected: Sequence[float], relative: float = 1e-5) -> None:
    """The first losses are equal to 1e-6, all to `relative`."""
    assert len(losses) == len(expected)
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses == pytest.approx(expected, rel=relative)


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """One thread, no chatter, and after the test: every model closes and its memory's books balance."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    close_all()
