"""Measuring a model on data that it is not trained on, and keeping the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from outsize.errors import TrainingError
from outsize.train.data import IGNORED, Batch, Dataset, Position
from outsize.train.metrics import Evaluation

TIMES = 5
"""The most evaluations in a run where the user does not say how often."""


class Evaluator:
    """Evaluates every `every` steps, and leaves weights that are the best so far in folder `best`."""

    def __init__(self, dataset: Dataset, batch_size: int, every: int | None, best: Path) -> None:
        self.evaluations: list[Evaluation] = []
        self._dataset = dataset
        self._batch_size = batch_size
        self._every = every
        self._best = best

    @property
    def last_step(self) -> int:
        """The step after which the last evaluation was made; 0 if there was none."""
        return self.evaluations[-1].step if self.evaluations else 0

    def is_best(self, step: int) -> bool:
        """Whether the last evaluation is of `step`, and better than all before it."""
        return self.last_step == step and bool(self.evaluations) and self.evaluations[-1].is_best

    def is_due(self, step: int, num_steps: int | None) -> bool:
        """Whether to evaluate after `step`; never after the last, which has an evaluation of its own."""
        if step == num_steps:
            return False
        every = self._every or (-(-num_steps // TIMES) if num_steps is not None else None)
        return every is not None and step % every == 0

    def is_left_out(self, step: int, num_steps: int | None) -> bool:
        """Whether the evaluation after `step` was due, and is not among those that were made."""
        return self.last_step < step and self.is_due(step, num_steps)

    def evaluate(
        self,
        model: nn.Module,
        step: int,
        save_best: Callable[[], None] | None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Evaluate `model`; where it is better than ever, call `save_best` (None: it is saved anyway, the run being over).

        None where `is_stopping` became true meanwhile. Raises TrainingError where the loss is not finite.
        """
        started_s = time.monotonic()
        measured = mean_loss(model, self._dataset, self._batch_size, is_stopping)
        if measured is None:
            return None
        loss, num_tokens = measured
        if not math.isfinite(loss):
            kept = f"the best weights before are in {self._best}; " if self._best.exists() else ""
            raise TrainingError(
                f"the evaluation loss after step {step} is {loss}", hint=f"{kept}go on with a lower --lr"
            )
        is_best = all(loss < earlier.loss for earlier in self.evaluations)
        evaluation = Evaluation(step, loss, num_tokens, time.monotonic() - started_s, is_best)
        self.evaluations.append(evaluation)
        if is_best and save_best is not None:
            save_best()
        return evaluation


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own loss of a batch. With positions that begin anew there must be no cache: transformers keeps packed
    documents apart only without one, and makes one by default.
    """
    options = {"use_cache": False} if "position_ids" in batch else {}
    return cast(torch.Tensor, model(**batch, **options).loss)


def mean_loss(
    model: nn.Module, dataset: Dataset, batch_size: int, is_stopping: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """The mean cross-entropy over all learned tokens of `dataset`, and their number. Leaves the model's mode as it was.

    None where `is_stopping`, which is asked before each batch, was true.
    """
    was_training = model.training
    model.eval()
    total, num_tokens, position = 0.0, 0, Position()
    try:
        with torch.no_grad():
            while position.epoch == 0:
                if is_stopping():
                    return None
                count = min(batch_size, dataset.num_sequences - position.index)
                batch = dataset.batch(position, count)
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                if learned:
                    total += loss_of(model, batch).item() * learned
                    num_tokens += learned
                position = dataset.advance(position, count)
    finally:
        model.train(was_training)
    return total / num_tokens, num_tokens
