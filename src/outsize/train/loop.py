"""The training loop: text in, an ordinary Hugging Face folder out.

    result = train(TrainSettings(Path("Qwen3-0.6B"), Path("notes.txt"), Path("out"), Length(steps=20)))

A step is one wave: the model is called once with all sequences of a batch, so that a block's weights are
fetched twice per step, whatever the batch size. The loop stops before an update that would spoil the weights,
and what is saved is always the state after a whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from outsize.errors import TrainingError
from outsize.train.api import Api, ClippingOptimizer, Report, public_api
from outsize.train.data import Batch, Dataset, Position, check_data_file, check_seq_len, open_dataset
from outsize.train.interrupt import Interruption
from outsize.train.metrics import MetricsFile, StepMetrics, Usage
from outsize.train.output import OutputFolder
from outsize.train.pace import CountedPace, Pace, TimedPace
from outsize.train.progress import Progress, SilentProgress
from outsize.train.schedule import warmup_cosine
from outsize.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did. `interrupted` tells that it was asked to stop early; the weights are saved all the
    same."""

    out: Path
    losses: tuple[float, ...]
    num_tokens: int
    duration_s: float
    interrupted: bool
    report: Report

    @property
    def num_steps(self) -> int:
        """Updates that were made."""
        return len(self.losses)


def train(
    settings: TrainSettings, *, api: Api | None = None, progress: Progress | None = None
) -> TrainResult:
    """Train as `settings` say, and leave the weights, the tokenizer and `metrics.jsonl` in `settings.out`.

    Nothing is loaded before paths and sizes have been checked. Raises DataError, ConfigError, and whatever
    loading raises, with nothing left behind; raises TrainingError where the loss is not finite, after saving
    the weights as they were before that step.
    """
    check_data_file(settings.data)
    check_seq_len(settings.model, settings.seq_len)
    folder = OutputFolder.claim(
        settings.out, overwrite=settings.overwrite, inputs=(settings.model, settings.data)
    )
    try:
        return _train(settings, folder, api or public_api(), progress or SilentProgress())
    except BaseException:
        folder.give_up()
        raise


def _train(settings: TrainSettings, folder: OutputFolder, api: Api, progress: Progress) -> TrainResult:
    progress.say(f"reading {settings.data}")
    dataset = open_dataset(
        settings.model, settings.data, seq_len=settings.seq_len, seed=settings.seed, spill=folder.tokens
    )
    progress.say(f"loading {settings.model}")
    run = Run.start(settings, api, dataset)
    started_s = time.monotonic()
    with Interruption() as interruption, MetricsFile(folder.metrics) as metrics_file:
        with progress:
            while not (run.pace.is_over() or interruption.requested):
                try:
                    metrics = run.step()
                except _LossNotFinite as error:
                    raise _save_and_explain(error, settings, folder, api, run) from error
                metrics_file.write(metrics)
                progress.show(metrics, run.pace.num_steps(), run.report())
        interrupted = interruption.requested
        progress.say(f"saving {folder.out}")
        folder.publish(_saver(settings, api, run.model))
    return TrainResult(
        out=folder.out,
        losses=tuple(run.losses),
        num_tokens=len(run.losses) * settings.batch_size * settings.seq_len,
        duration_s=time.monotonic() - started_s,
        interrupted=interrupted,
        report=run.report(),
    )


class _LossNotFinite(Exception):
    """The loss or the gradient of a step is not finite; the step was not taken. Never leaves this file."""


class Run:
    """A model in training: `step` makes one update and tells what it took. Make one with `start`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: ClippingOptimizer,
        scheduler: LRScheduler,
        batches: Batches,
        pace: Pace,
        api: Api,
    ) -> None:
        self.model = model
        self.pace = pace
        self.losses: list[float] = []
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._batches = batches
        self._api = api

    @classmethod
    def start(cls, settings: TrainSettings, api: Api, dataset: Dataset) -> Run:
        """Load the model, lay out its state, and stand before the first step."""
        place, learning = settings.place, settings.learning
        model = api.load(
            settings.model,
            device=place.device,
            host=place.host,
            disk=place.disk,
            home=place.home,
            dtype=place.dtype,
            pins=place.pins,
            seed=settings.seed,
        )
        model.train()
        torch.manual_seed(settings.seed)
        optimizer = api.AdamW(
            model, lr=learning.lr, weight_decay=learning.weight_decay, max_grad_norm=learning.max_grad_norm
        )
        spare_vectors(optimizer)
        pace = pace_of(settings, dataset)
        scheduler = warmup_cosine(optimizer, learning.warmup_steps, pace.num_steps)
        return cls(model, optimizer, scheduler, Batches(dataset, settings.batch_size), pace, api)

    def step(self) -> StepMetrics:
        """Make one update. Raises _LossNotFinite before anything has changed."""
        before, started_s = Usage.of(self.report()), time.perf_counter()
        lr = float(self._optimizer.param_groups[0]["lr"])
        batch = self._batches.next()
        loss = self._forward(batch)
        loss.backward()
        self._check_gradient()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self.losses.append(loss.item())
        self.pace.step_done()
        return self._metrics(lr, batch["input_ids"].numel(), time.perf_counter() - started_s, before)

    def report(self) -> Report:
        """What the model has used so far."""
        return self._api.report(self.model)

    def _forward(self, batch: Batch) -> torch.Tensor:
        loss = cast(torch.Tensor, self.model(**batch).loss)
        if not math.isfinite(loss.item()):
            raise _LossNotFinite(f"the loss of step {len(self.losses) + 1} is {loss.item()}")
        return loss

    def _check_gradient(self) -> None:
        norm = self._optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise _LossNotFinite(f"the gradient norm of step {len(self.losses) + 1} is {norm}")

    def _metrics(self, lr: float, num_tokens: int, step_s: float, before: Usage) -> StepMetrics:
        report = self.report()
        used = Usage.of(report).since(before)
        return StepMetrics(
            step=len(self.losses),
            loss=self.losses[-1],
            lr=lr,
            grad_norm=self._optimizer.grad_norm,
            tokens_per_s=num_tokens / step_s,
            step_s=step_s,
            host_peak_bytes=report.host_peak_bytes,
            bytes_read=used.bytes_read,
            bytes_written=used.bytes_written,
            wait_s=used.wait_s,
        )


class Batches:
    """The batches of a dataset, one after the other; `position` is the first sequence not yet used."""

    def __init__(self, dataset: Dataset, batch_size: int, position: Position | None = None) -> None:
        self.position = position or Position()
        self._dataset = dataset
        self._batch_size = batch_size

    def next(self) -> Batch:
        """The next batch."""
        batch = self._dataset.batch(self.position, self._batch_size)
        self.position = self._dataset.advance(self.position, self._batch_size)
        return batch


def spare_vectors(optimizer: ClippingOptimizer) -> None:
    """Move parameters of one dimension (norms, biases) into groups of their own, without weight decay."""
    for group in list(optimizer.param_groups):
        vectors = [parameter for parameter in group["params"] if parameter.ndim < 2]
        if vectors and group["weight_decay"]:
            # In place and not through add_param_group: nothing is added, and the optimizer may have laid out
            # its state.
            group["params"] = [parameter for parameter in group["params"] if parameter.ndim >= 2]
            optimizer.param_groups.append({**group, "params": vectors, "weight_decay": 0.0})


def pace_of(settings: TrainSettings, dataset: Dataset) -> Pace:
    """How long the run is, in steps or by the clock."""
    length = settings.length
    if length.minutes is not None:
        return TimedPace(length.minutes * 60, time.monotonic)
    if length.steps is not None:
        return CountedPace(length.steps)
    assert length.epochs is not None
    return CountedPace(dataset.num_steps(length.epochs, settings.batch_size))


def _saver(settings: TrainSettings, api: Api, model: nn.Module) -> Callable[[Path], None]:
    return lambda path: api.save(model, path, tokenizer_from=settings.model)


def _save_and_explain(
    error: _LossNotFinite, settings: TrainSettings, folder: OutputFolder, api: Api, run: Run
) -> TrainingError:
    """Save the weights as they were before the step that failed, if any step was taken, and say so."""
    if not run.losses:
        return TrainingError(
            f"{error}; no step was taken and nothing was saved",
            hint="the model's weights or the data are at fault; try --dtype float32",
        )
    folder.publish(_saver(settings, api, run.model))
    return TrainingError(
        f"{error}; that step was not taken",
        hint=f"the weights after step {len(run.losses)} are saved in {folder.out}; go on with a lower --lr",
    )
