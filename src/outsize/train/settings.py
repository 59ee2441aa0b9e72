"""What one chooses about a training run; validated once, then passed whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

from outsize.config import OptimizerName, Pins
from outsize.errors import ConfigError
from outsize.train.data import DataFile, Packing, TooLong
from outsize.train.schedule import Shape

if TYPE_CHECKING:
    from outsize.engine.api import Options


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
    Learning(warmup_steps=10)     steps in which it rises to the peak
    Learning(schedule="linear")   how it goes on from there
    Learning(weight_decay=0.01)   for matrices; vectors (norms, biases) have none
    Learning(max_grad_norm=None)  do not clip gradients
    """

    lr: float = 1e-5
    warmup_steps: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    schedule: Shape = Shape.COSINE
    optimizer: OptimizerName = OptimizerName.AdamW

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
class Evaluating:
    """What the model is measured by, and how often; at most one of files and fraction, None of both: never.

    Evaluating(files=(DataFile(Path("eval.jsonl")),))   files of their own
    Evaluating(fraction=0.02)                           a part of the training sequences, which is not trained on
    Evaluating(..., every=100)                          after so many steps, and at the end (default: at most 5 times)
    """

    files: tuple[DataFile, ...] = ()
    fraction: float | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.files and self.fraction is not None:
            raise ConfigError(
                "evaluation: both files and a fraction are given", hint="pass --eval or --eval-split"
            )
        if weighted := [file for file in self.files if file.weight is not None]:
            raise ConfigError(
                f"eval: {weighted[0]} has a weight, and evaluation takes every file once",
                hint=f"pass --eval {weighted[0].path}",
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError(f"eval_split: {self.fraction} is no fraction", hint="pass --eval-split 0.02")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"eval_every: {self.every} is less than 1", hint="pass --eval-every 100")
        if self.every is not None and not self.is_on:
            raise ConfigError(
                "eval_every: there is nothing to evaluate on", hint="pass --eval FILE or --eval-split 0.02"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.files) or self.fraction is not None


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Whether the run leaves commits that it can go on from.

    Checkpointing(every=100)         after every 100 steps, in OUT.checkpoint
    Checkpointing(every=1, keep=3)   the last three are kept; the disk holds 1 + keep times the state
    Checkpointing(..., resume=True)  go on from the last commit, or begin where there is none
    """

    every: int | None = None
    keep: int = 1
    folder: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"checkpoint_every: {self.every} is less than 1", hint="pass --checkpoint-every 100"
            )
        if self.keep < 1:
            raise ConfigError(f"keep: {self.keep} is less than 1", hint="pass --keep 1 or more")

    @property
    def is_on(self) -> bool:
        """Whether there is a store; one that resumes without `every` commits when it is interrupted."""
        return self.every is not None or self.resume


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A whole training run.

    TrainSettings(model, (DataFile(path),), out, Length(steps=20))   train the model in folder `model` on `path`
    TrainSettings(..., batch_size=16)                                sequences per step: a weight is loaded once for all
    TrainSettings(..., place=Options(host="3GiB", disk="/x"))        hard budgets
    TrainSettings(..., overwrite=True)                               replace an earlier run in `out` once this is saved
    """

    model: Path
    data: tuple[DataFile, ...]
    out: Path
    length: Length
    batch_size: int = 8
    seq_len: int = 512
    packing: Packing | None = None
    too_long: TooLong = TooLong.ERROR
    learning: Learning = field(default_factory=Learning)
    evaluating: Evaluating = field(default_factory=Evaluating)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    place: Options = field(default_factory=lambda: cast("Options", {}))
    """How `outsize.load` opens the model."""
    attention: str | None = None
    from_scratch: bool = False
    """Whether weights are drawn from `seed`, by the model's own rules, instead of read."""
    seed: int = 0
    overwrite: bool = False
    trackers: tuple[str, ...] = ()
    trace_step: int = 4
    """The step that is recorded for `outsize trace`, or the next that no evaluation comes before; 0: none."""

    def __post_init__(self) -> None:
        if self.trace_step < 0:
            raise ConfigError(
                f"trace_step: {self.trace_step} is negative",
                hint="pass --trace-step 4, or 0 to record no step",
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} is less than 1", hint="pass --batch-size 8")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is negative", hint="pass --seed 0 or more")

    @property
    def checkpoint(self) -> Path:
        """The folder of the run's commits."""
        return self.checkpointing.folder or self.out.with_name(f"{self.out.name}.checkpoint")


def flat(settings: TrainSettings) -> dict[str, str | int | float | bool | None]:
    """All settings by the names of the command line's options, as `outsize train --config` reads them."""
    length, learning, evaluating, place = (
        settings.length,
        settings.learning,
        settings.evaluating,
        settings.place,
    )
    return {
        "model": str(settings.model),
        "data": " ".join(map(str, settings.data)),
        "out": str(settings.out),
        "overwrite": settings.overwrite,
        "steps": length.steps,
        "epochs": length.epochs,
        "minutes": length.minutes,
        "batch-size": settings.batch_size,
        "seq-len": settings.seq_len,
        "packing": settings.packing,
        "too-long": settings.too_long,
        "eval": " ".join(map(str, evaluating.files)) or None,
        "eval-split": evaluating.fraction,
        "eval-every": evaluating.every,
        "checkpoint-every": settings.checkpointing.every,
        "keep": settings.checkpointing.keep,
        "checkpoint": None if settings.checkpointing.folder is None else str(settings.checkpointing.folder),
        "lr": learning.lr,
        "optimizer": learning.optimizer,
        "schedule": learning.schedule,
        "warmup": learning.warmup_steps,
        "weight-decay": learning.weight_decay,
        "max-grad-norm": "none" if learning.max_grad_norm is None else learning.max_grad_norm,
        "from-scratch": settings.from_scratch,
        "seed": settings.seed,
        "tracker": " ".join(settings.trackers) or None,
        "trace-step": settings.trace_step,
        **{
            name.replace("_", "-"): _plain(place.get(name))
            for name in ("device", "host", "disk", "home", "dtype", "on_device_full", "compile")
        },
        "attention": settings.attention,
        "pin": " ".join(f"{name}={value}" for name, value in pinned(place.get("pins")).items()) or None,
    }


def _plain(value: object) -> str | int | None:
    return value if value is None or isinstance(value, int) else str(value)


def pinned(pins: Pins | None) -> dict[str, int | bool]:
    """What `pins` decide, by name."""
    if pins is None:
        return {}
    return {pin.name: value for pin in fields(Pins) if (value := getattr(pins, pin.name)) != pin.default}
