"""The part of `outsize`'s public API that training stands on, as types.

The loop takes an `Api` as a parameter: by default the package itself, in tests a plain model with a plain
optimizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast

from torch import nn

from outsize.config import OptimizerName
from outsize.plan.profile import Profile

if TYPE_CHECKING:
    from outsize.engine import Advice, Prediction, Recording, Report
    from outsize.engine.api import Options
    from outsize.engine.optimizer import Optimizer


class Api(Protocol):
    """`outsize`, as far as training needs it."""

    def load(
        self,
        path: str | Path,
        *,
        attention: str | None = None,
        profile: Profile | None = None,
        from_scratch: bool = False,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Open a model whose blocks live in tiers."""

    def decay_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups, those that decay and those that do not."""

    def save(self, model: nn.Module, path: str | Path, tokenizer_from: str | Path | None = None) -> None:
        """Write an ordinary Hugging Face folder to `path`, which is new."""

    def report(self, model: nn.Module) -> Report:
        """What `model` has used so far."""

    def predict(self, model: nn.Module, profile: Profile, *, commit_every: int = 0) -> Prediction:
        """What a step like the last one will take on a machine, with a commit after every `commit_every` steps."""

    def advise(self, model: nn.Module, profile: Profile, step_s: float, stalled_s: float) -> Advice | None:
        """A plan that a measured step shows to be slower than another; `str` of it names the faster one."""

    def record(self, model: nn.Module) -> AbstractContextManager[Recording]:
        """Record the step that `model` makes in the body."""


def optimizer_of(api: Api, name: OptimizerName) -> Callable[..., Optimizer]:
    """The optimizer of that name."""
    return cast("Callable[..., Optimizer]", getattr(api, name.name))


def public_api() -> Api:
    """The package itself."""
    return cast(Api, importlib.import_module("outsize"))
