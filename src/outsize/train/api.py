"""The part of `outsize`'s public API that training stands on, as types.

The loop takes an `Api` as a parameter: by default the package itself, in tests a plain model with a plain
optimizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn
from torch.optim import Optimizer

from outsize.config import Pins
from outsize.plan.profile import Profile
from outsize.plan.timeline import Timeline


class Report(Protocol):
    """What a model has used since it was loaded; `str` of it is a table."""

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state together."""

    @property
    def host_budget_bytes(self) -> int:
        """Bytes of memory allowed."""

    @property
    def host_peak_bytes(self) -> int:
        """The most bytes of memory used so far."""

    @property
    def device_budget_bytes(self) -> int:
        """Bytes allowed of a device with memory of its own; else 0."""

    @property
    def device_peak_bytes(self) -> int:
        """The most bytes used of it so far."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the disk tier so far."""

    @property
    def bytes_written(self) -> int:
        """Bytes written to the disk tier so far."""

    @property
    def wait_s(self) -> Mapping[str, float]:
        """Seconds spent waiting so far, per link."""


class Predicted(Protocol):
    """A step as it was expected."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""

    @property
    def host_bytes(self) -> int:
        """Memory of the process, at most."""

    @property
    def device_bytes(self) -> int:
        """Memory of the device, at most; 0 where the host computes."""

    @property
    def stalled_s(self) -> float:
        """Seconds of a step in which computing waits."""

    @property
    def bytes_read(self) -> int:
        """From the disk, per step."""

    @property
    def bytes_written(self) -> int:
        """To the disk, per step."""

    def timeline(self) -> Timeline:
        """The step in time."""


class Recording(Protocol):
    """What happened while a step was recorded."""

    @property
    def timeline(self) -> Timeline:
        """The step in time; there once it is over."""


class ClippingOptimizer(Optimizer):
    """An optimizer that knows the norm of all gradients together."""

    grad_norm: float | None
    """At the last step, before clipping."""

    def gradient_norm(self) -> float:
        """As the next step would see it."""
        raise NotImplementedError


class Resumed(Protocol):
    """Where a run goes on."""

    @property
    def step(self) -> int:
        """Updates that were made."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the loop gave to the commit."""

    @property
    def notes(self) -> Sequence[str]:
        """What is computed in another way than before."""


class CheckpointApi(Protocol):
    """`outsize.checkpoint`."""

    def resume(
        self, model: nn.Module, optimizer: Optimizer, path: str | Path, *, keep: int = 1
    ) -> Resumed | None:
        """Let the model live in the store at `path`; where it goes on, if it does."""

    def commit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        path: str | Path,
        *,
        keep: int = 1,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Declare a commit, and go on."""

    def finish(self, model: nn.Module) -> object | None:
        """Wait until the last commit is durable."""

    def close(self, model: nn.Module) -> None:
        """Give everything back."""


class Api(Protocol):
    """`outsize`, as far as training needs it."""

    @property
    def checkpoint(self) -> CheckpointApi:
        """Commits."""

    def load(
        self,
        path: str | Path,
        *,
        device: str | None = None,
        host: str | None = None,
        disk: str | None = None,
        home: str | None = None,
        dtype: str | None = None,
        pins: Pins | None = None,
        on_device_full: str = "error",
        compile: bool | None = None,
        attention: str | None = None,
        profile: Profile | None = None,
        from_scratch: bool = False,
        seed: int = 0,
    ) -> nn.Module:
        """A model whose blocks live in tiers."""

    def decay_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups, those that decay and those that do not."""

    def save(self, model: nn.Module, path: str | Path, tokenizer_from: str | Path | None = None) -> None:
        """Write an ordinary Hugging Face folder to `path`, which is new."""

    def report(self, model: nn.Module) -> Report:
        """What `model` has used so far."""

    def predict(self, model: nn.Module, profile: Profile, *, commit_every: int = 0) -> Predicted:
        """What a step like the last one will take on a machine, where a commit follows each so many."""

    def advise(self, model: nn.Module, profile: Profile, step_s: float, stalled_s: float) -> object | None:
        """A plan that would be faster, as far as a measured step shows; `str` of it says which."""

    def record(self, model: nn.Module) -> AbstractContextManager[Recording]:
        """Record the step that `model` makes in the body."""


class MakeOptimizer(Protocol):
    """One of the package's optimizers."""

    def __call__(
        self, model: nn.Module, params: list[dict[str, Any]], *, lr: float, max_grad_norm: float | None
    ) -> ClippingOptimizer:
        """An optimizer over groups of parameters."""


class OptimizerName(StrEnum):
    """The package's optimizers, as the command line names them."""

    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"
    LION = "lion"
    ADAN = "adan"
    SGD = "sgd"
    SGDSAI = "sgdsai"


def optimizer_of(api: Api, name: OptimizerName) -> MakeOptimizer:
    """The optimizer of that name."""
    classes = {
        OptimizerName.ADAMW: "AdamW",
        OptimizerName.ADAMW8BIT: "AdamW8bit",
        OptimizerName.LION: "Lion",
        OptimizerName.ADAN: "Adan",
        OptimizerName.SGD: "SGD",
        OptimizerName.SGDSAI: "SGDSaI",
    }
    return cast(MakeOptimizer, getattr(api, classes[name]))


def public_api() -> Api:
    """The package itself."""
    return cast(Api, importlib.import_module("outsize"))
