"""What one chooses about a training run; validated once, then passed whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from outsize.config import Pins
from outsize.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Length:
    """How long to train: exactly one of the three.

    Length(steps=200)   so many updates
    Length(epochs=1)    the data so many times
    Length(minutes=10)  as many steps as fit into the time; the schedule follows the measured step time
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        if len(given) != 1:
            raise ConfigError(
                f"the length of a run is one of steps, epochs and minutes, got {', '.join(given) or 'none'}",
                hint="pass --steps 100, --epochs 1 or --minutes 10",
            )
        for name, value in given.items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: {value} is not positive", hint=f"pass --{name} 1 or more")


@dataclass(frozen=True, slots=True)
class Learning:
    """How weights are updated.

    Learning(lr=1e-5)             the peak learning rate
    Learning(warmup_steps=10)     steps in which it rises to the peak; then it falls along a cosine to a tenth
    Learning(weight_decay=0.01)   for matrices; vectors (norms, biases) have none
    Learning(max_grad_norm=None)  do not clip gradients
    """

    lr: float = 1e-5
    warmup_steps: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: {self.lr} is not a positive number", hint="pass --lr 1e-5")
        if self.warmup_steps < 0:
            raise ConfigError(
                f"warmup_steps: {self.warmup_steps} is negative", hint="pass --warmup 0 or more"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(
                f"weight_decay: {self.weight_decay} is not zero or more", hint="pass --weight-decay 0.01"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm: {self.max_grad_norm} is not positive",
                hint="pass --max-grad-norm 1, or --max-grad-norm none to leave gradients as they are",
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run may keep its bytes: the arguments of `outsize.load`, None where it should measure and
    plan."""

    device: str | None = None
    host: str | None = None
    disk: str | None = None
    home: str | None = None
    dtype: str | None = None
    pins: Pins | None = None


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A whole training run.

    TrainSettings(model, data, out, Length(steps=20))         train the model in folder `model` on the text in
    `data` TrainSettings(..., batch_size=16)                         sequences per step: a weight is loaded
    once for all TrainSettings(..., place=Place(host="3GiB", disk="/x"))   hard budgets
    TrainSettings(..., overwrite=True)                        replace an earlier run in `out` once this one is
    saved
    """

    model: Path
    data: Path
    out: Path
    length: Length
    batch_size: int = 8
    seq_len: int = 512
    learning: Learning = field(default_factory=Learning)
    place: Place = field(default_factory=Place)
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} is less than 1", hint="pass --batch-size 8")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is negative", hint="pass --seed 0 or more")
