"""The training loop: text in, an ordinary Hugging Face folder out.

    files = (DataFile(Path("notes.txt")),)
    result = train(TrainSettings(Path("Qwen3-0.6B"), files, Path("out"), Length(steps=20)))

A step is one wave: the model is called once with all sequences of a batch, so that a block's weights are
fetched twice per step, whatever the batch size. The loop stops before an update that would spoil the weights,
and what is saved is always the state after a whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from outsize import checkpoint
from outsize.engine import Prediction, Report
from outsize.engine.api import settings_of
from outsize.engine.optimizer import Optimizer
from outsize.errors import TrainingError
from outsize.model import find_weights, resolve_folder
from outsize.plan.profile import Profile
from outsize.train.api import Api, optimizer_of, public_api
from outsize.train.checkpoints import History, Progress, check_store, facts_of, read_history
from outsize.train.compare import Steady, compare
from outsize.train.data import Batch, DataOptions, Dataset, Position, check_files, open_dataset
from outsize.train.evaluate import Evaluator, loss_of
from outsize.train.interrupt import Interruption
from outsize.train.metrics import Evaluation, StepMetrics, Usage
from outsize.train.metrics_file import MetricsFile
from outsize.train.output import OutputFolder
from outsize.train.pace import CountedPace, Pace, TimedPace
from outsize.train.report_page import ReportPage
from outsize.train.saver import Saver
from outsize.train.schedule import scheduler_for, warmup_within
from outsize.train.settings import TrainSettings, flat
from outsize.train.tracing import Tracing
from outsize.train.trackers import trackers
from outsize.train.watch import RunFacts, Watcher, Watchers


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did. `duration_s` is the time of all its processes from the first step on, saving included.

    `interrupted`: it was asked to stop early; the weights are saved all the same, unless there is a commit to go on from
    (`checkpoint`): `out` is then not made. `best` is a folder of its own, unless the last weights are the best or nothing
    was evaluated.
    """

    out: Path
    num_steps: int
    losses: tuple[float, ...]
    num_tokens: int
    duration_s: float
    interrupted: bool
    report: Report
    evaluations: tuple[Evaluation, ...] = ()
    best: Path | None = None
    checkpoint: Path | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured or shown on the way, and why: watchers that failed, by name."""


def train(
    settings: TrainSettings,
    *,
    api: Api | None = None,
    watchers: Sequence[Watcher] = (),
    profile: Profile | None = None,
) -> TrainResult:
    """Train as `settings` say, and leave the weights, the tokenizer, `metrics.jsonl`, `report.html` and
    `timeline.json` in `settings.out`.

    With a `profile` of the machine the fastest of the plans that fit is taken, the run is predicted after its first step,
    and the prediction is compared with what was measured at its end.
    Nothing is loaded before paths and sizes have been checked, and no step is made before there is room for the weights.
    Raises DataError, ConfigError, StorageFullError, and whatever loading raises, with nothing left behind; raises
    TrainingError where the loss is not finite, after saving the weights as they were before that step. Any other error
    between two steps is raised after saving, too, unless there are commits. Raises StorageError where the weights cannot
    be written; the message says where they are instead.
    """
    files = (*settings.data, *settings.evaluating.files)
    check_files(files)
    settings_of(**settings.place).budgets.check_folders()
    check_store(settings)
    if not settings.from_scratch:
        find_weights(resolve_folder(settings.model))
    folder = OutputFolder.claim(
        settings.out,
        overwrite=settings.overwrite,
        inputs=(settings.model, *(file.path for file in files)),
        goes_on=settings.checkpointing.resume,
    )
    try:
        own: list[Watcher] = [MetricsFile(folder.metrics), ReportPage(folder.report)]
        own += trackers(settings.trackers, folder.partial)
        with ExitStack() as stack:
            return _train(settings, folder, api or public_api(), Watchers([*own, *watchers]), profile, stack)
    except BaseException:
        folder.give_up()
        raise


def _train(
    settings: TrainSettings,
    folder: OutputFolder,
    api: Api,
    watchers: Watchers,
    profile: Profile | None,
    stack: ExitStack,
) -> TrainResult:
    watchers.say(f"reading {', '.join(str(file) for file in settings.data)}")
    training, held_out = open_data(settings)
    watchers.say(f"loading {settings.model}")
    run = Run.start(settings, api, training, profile)
    if settings.checkpointing.is_on:
        stack.callback(checkpoint.close, run.model)
    saver = Saver(settings, api, run.model, folder, watchers.say)
    stack.callback(saver.close)
    saver.hold_room()
    evaluator = None
    if held_out is not None:
        evaluator = Evaluator(held_out, settings.batch_size, settings.evaluating.every, folder.best)
    history = run.resume(settings, folder.metrics) if settings.checkpointing.is_on else None
    for note in run.notes:
        watchers.say(note)
    _tell_shorter_warmup(run.pace.num_steps(), settings.learning.warmup_steps, watchers)
    # What is first in a process is not like what follows, whatever its number.
    recorded = settings.trace_step and run.num_steps + settings.trace_step
    tracing = Tracing(api, run.model, recorded, folder.timeline, watchers.say)
    with Interruption(watchers.stopping) as interruption:
        loop = _Loop(settings, api, run, watchers, profile, evaluator, saver, tracing, interruption)
        try:
            with watchers:
                watchers.started(_facts(settings, training, held_out, run))
                loop.steps(history)
                loop.end()
        except _LossNotFinite as error:
            raise _save_and_explain(error, folder, saver, run) from error
        except TrainingError:
            raise  # the evaluation is not finite: the weights may be spoilt, and the best ones are kept
        except Exception as error:
            # Between two steps the weights are whole: what failed there must not cost them.
            if run.is_whole and run.num_steps and not settings.checkpointing.is_on:
                saver.publish(run.num_steps)
                error.add_note(f"the weights after step {run.num_steps} are saved in {folder.out}")
            raise
        interrupted = interruption.requested
        goes_on_later = interrupted and settings.checkpointing.is_on
        if not goes_on_later:
            watchers.say(f"saving {folder.out}")
            is_last_best = evaluator is not None and evaluator.is_best(run.num_steps)
            is_committed = settings.checkpointing.is_on and bool(run.num_steps)
            saver.publish(run.num_steps, keep_best=not is_last_best, is_committed=is_committed)
    return TrainResult(
        out=folder.out,
        num_steps=run.num_steps,
        losses=tuple(run.losses),
        num_tokens=run.num_steps * settings.batch_size * settings.seq_len,
        duration_s=run.elapsed_s,
        interrupted=interrupted,
        report=run.report(),
        evaluations=tuple(evaluator.evaluations) if evaluator is not None else (),
        best=folder.published_best if not goes_on_later else None,
        checkpoint=settings.checkpoint if settings.checkpointing.is_on else None,
        failures=watchers.failures,
    )


def _tell_shorter_warmup(num_steps: int | None, warmup_steps: int, watchers: Watchers) -> None:
    if num_steps is not None and (shorter := warmup_within(warmup_steps, num_steps)) < warmup_steps:
        watchers.say(
            f"warming up in {shorter} of {num_steps} steps: a warm-up of {warmup_steps} would not end"
        )


@dataclass
class _Loop:
    """The steps of a run, and what is done between them."""

    settings: TrainSettings
    api: Api
    run: Run
    watchers: Watcher
    profile: Profile | None
    evaluator: Evaluator | None
    saver: Saver
    tracing: Tracing
    interruption: Interruption
    predicted: Prediction | None = None
    steady: Steady = field(default_factory=Steady)

    def steps(self, history: History | None) -> None:
        """All steps, or as many as are made until the run is interrupted; nothing follows the step under way then."""
        run, watchers, evaluator = self.run, self.watchers, self.evaluator
        if history is not None:
            watchers.resumed(*history)
            # A commit comes before the evaluation of its step: a kill between them leaves that one to be made.
            if evaluator is not None:
                evaluator.evaluations += history[1]
                if evaluator.is_left_out(run.num_steps, run.pace.num_steps()):
                    self._evaluate(evaluator)
        while not (run.pace.is_over() or self.interruption.requested):
            with self.tracing.step(run.num_steps + 1, self.predicted):
                metrics = run.step()
            watchers.stepped(metrics, run.report(), run.pace.num_steps())
            every = self.settings.checkpointing.every
            if every and run.num_steps % every == 0:
                run.commit(self.settings)
            self._after_step(metrics)

    def _after_step(self, metrics: StepMetrics) -> None:
        """Predict and evaluate, unless the run is to end."""
        if self.interruption.requested:
            return
        self._foresee(metrics)
        if self.evaluator is not None and self.evaluator.is_due(metrics.step, self.run.pace.num_steps()):
            self._evaluate(self.evaluator)

    def end(self) -> None:
        """The last commit, the last evaluation, and how right the prediction was. An interrupted run is not evaluated: who
        asked for its end may not wait."""
        run = self.run
        if self.settings.checkpointing.is_on:
            run.finish(self.settings)
        is_evaluated = self.evaluator is None or self.evaluator.last_step == run.num_steps
        if self.evaluator is not None and not is_evaluated and not self.interruption.requested:
            self._evaluate(self.evaluator, is_last=True)
        self.watchers.ended(run.report(), self.interruption.requested)
        if self.predicted is not None:
            compared = compare(self.predicted, self.steady.steps, run.report(), self.tracing.trace)
            self.watchers.compared(compared)

    def _foresee(self, metrics: StepMetrics) -> None:
        """Predict the run after its first step, and name a faster plan after the first that is like others."""
        is_first_steady = self.steady.stepped(metrics)
        if self.profile is None:
            return
        if self.predicted is None:
            every = self.settings.checkpointing.every
            self.predicted = self.api.predict(self.run.model, self.profile, commit_every=every or 0)
        if is_first_steady:
            waited_s = sum(metrics.wait_s.values())
            advice = self.api.advise(self.run.model, self.profile, metrics.step_s, waited_s)
            if advice is not None:
                self.watchers.say(f"another plan would be faster: {advice}")

    def _evaluate(self, evaluator: Evaluator, *, is_last: bool = False) -> None:
        """Evaluate, unless the run is interrupted before or meanwhile."""
        save_best = None if is_last else self.saver.save_best
        evaluation = evaluator.evaluate(
            self.run.model, self.run.num_steps, save_best, lambda: self.interruption.requested
        )
        if evaluation is not None:
            self.watchers.evaluated(evaluation)
        self.tracing.evaluated()
        self.steady.evaluated()


def open_data(settings: TrainSettings) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what the model is measured by. Raises DataError and ConfigError."""
    options = DataOptions(settings.seq_len, settings.packing, settings.too_long, settings.seed)
    training = open_dataset(settings.model, settings.data, options)
    evaluating = settings.evaluating
    if evaluating.fraction is not None:
        return training.split(evaluating.fraction)
    if evaluating.files:
        return training, open_dataset(settings.model, evaluating.files, options, is_shuffled=False)
    return training, None


def _facts(settings: TrainSettings, training: Dataset, held_out: Dataset | None, run: Run) -> RunFacts:
    data = [str(source) for source in training.sources]
    if held_out is not None:
        data += [f"evaluation: {source}" for source in held_out.sources]
    return RunFacts(
        name=settings.out.name,
        settings=flat(settings),
        data=data,
        num_steps=run.pace.num_steps(),
        tokens_per_step=settings.batch_size * settings.seq_len,
        elapsed_s=run.elapsed_before_s,
    )


class _LossNotFinite(Exception):
    """The loss or the gradient of a step is not finite; the step was not taken. Never leaves this file."""


class Run:
    """A model in training: `step` makes one update and tells what it took. Make one with `start`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        batches: Batches,
        pace: Pace,
        api: Api,
    ) -> None:
        self.model = model
        self.pace = pace
        self.num_steps = 0
        """Updates that were made, those of earlier processes included."""
        self.losses: list[float] = []
        """As far as they are known, from the first step on."""
        self.notes: list[str] = []
        self.is_whole = True
        """Whether the weights are those after a whole step: false while one is under way, or after it failed."""
        self.elapsed_before_s = 0.0
        """Seconds that earlier processes spent."""
        self._began_s = time.monotonic()
        self._data: list[dict[str, Any]] = []
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._batches = batches
        self._api = api

    @classmethod
    def start(
        cls, settings: TrainSettings, api: Api, dataset: Dataset, profile: Profile | None = None
    ) -> Run:
        """Load the model, lay out its state, and stand before the first step."""
        learning = settings.learning
        model = api.load(
            settings.model,
            attention=settings.attention,
            profile=profile,
            from_scratch=settings.from_scratch,
            seed=settings.seed,
            **settings.place,
        )
        model.train()
        torch.manual_seed(settings.seed)
        make = optimizer_of(api, learning.optimizer)
        groups = api.decay_groups(model, learning.weight_decay)
        optimizer = make(model, groups, lr=learning.lr, max_grad_norm=learning.max_grad_norm)
        pace = pace_of(settings, dataset)
        warmup_steps = warmup_within(learning.warmup_steps, pace.num_steps())
        scheduler = scheduler_for(optimizer, learning.schedule, warmup_steps, pace.num_steps)
        return cls(model, optimizer, scheduler, Batches(dataset, settings.batch_size), pace, api)

    def step(self) -> StepMetrics:
        """Make one update. Raises _LossNotFinite before anything has changed."""
        before, started_s = Usage.of(self.report()), time.perf_counter()
        lr = float(self._optimizer.param_groups[0]["lr"])
        batch = self._batches.next()
        self.is_whole = False
        loss = self._forward(batch)
        loss.backward()
        self._check_gradient()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self.losses.append(loss.item())
        self.num_steps += 1
        self.is_whole = True
        self.pace.step_done()
        step_s = time.perf_counter() - started_s
        return self._metrics(lr, batch["input_ids"].numel(), step_s, before)

    def report(self) -> Report:
        """What the model has used so far."""
        return self._api.report(self.model)

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on the run, those of earlier processes included."""
        return self.elapsed_before_s + time.monotonic() - self._began_s

    # -- commits -------------------------------------------------------------------------------------------------

    def resume(self, settings: TrainSettings, metrics: Path) -> History | None:
        """Give the model a store, and go on from its last commit; what was done before, None where nothing was."""
        checkpointing = settings.checkpointing
        self._data = facts_of(self._batches.dataset)
        resumed = checkpoint.resume(self.model, self._optimizer, settings.checkpoint, keep=checkpointing.keep)
        if resumed is None:
            if checkpointing.resume:
                self.notes.append(f"{settings.checkpoint} holds no commit yet: the run begins")
            return None
        progress = Progress.of_extra(resumed.extra, settings.checkpoint)
        progress.check(settings, self._data)
        self.notes += [f"going on after step {resumed.step}", *resumed.notes]
        self.num_steps = resumed.step
        self._batches.position = Position(*progress.position)
        self._scheduler.load_state_dict(dict(progress.scheduler))
        self.elapsed_before_s = progress.elapsed_s
        self.pace.go_on(resumed.step, progress.elapsed_s)
        history = read_history(metrics, resumed.step)
        self.losses = [step.loss for step in history[0]]
        return history

    def commit(self, settings: TrainSettings) -> None:
        """Declare a commit of what was done so far."""
        progress = Progress(
            position=(self._batches.position.epoch, self._batches.position.index),
            scheduler=self._scheduler.state_dict(),
            elapsed_s=self.elapsed_s,
            settings=flat(settings),
            data=self._data,
        )
        checkpoint.commit(
            self.model,
            self._optimizer,
            settings.checkpoint,
            keep=settings.checkpointing.keep,
            extra=progress.to_extra(),
        )

    def finish(self, settings: TrainSettings) -> None:
        """Let the last commit be of the last step, and durable."""
        if self.num_steps:
            self.commit(settings)
        checkpoint.finish(self.model)

    def _forward(self, batch: Batch) -> torch.Tensor:
        loss = loss_of(self.model, batch)
        if not math.isfinite(loss.item()):
            raise _LossNotFinite(
                f"the loss of step {self.num_steps + 1} is {loss.item()}{self._batches.names()}"
            )
        return loss

    def _check_gradient(self) -> None:
        norm = self._optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise _LossNotFinite(
                f"the gradient norm of step {self.num_steps + 1} is {norm}{self._batches.names()}"
            )

    def _metrics(self, lr: float, num_tokens: int, step_s: float, before: Usage) -> StepMetrics:
        report = self.report()
        used = Usage.of(report).since(before)
        return StepMetrics(
            step=self.num_steps,
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
        self.position = self._last = position or Position()
        self.dataset = dataset
        self._batch_size = batch_size

    def next(self) -> Batch:
        """The next batch."""
        self._last = self.position
        batch = self.dataset.batch(self.position, self._batch_size)
        self.position = self.dataset.advance(self.position, self._batch_size)
        return batch

    def names(self) -> str:
        """Where the batch that came last stands, for messages."""
        places = self.dataset.places(self._last, self._batch_size)
        more = f" and {len(places) - 3} more sequences" if len(places) > 3 else ""
        return f" (the batch begins at {', '.join(places[:3])}{more})"


def pace_of(settings: TrainSettings, dataset: Dataset) -> Pace:
    """How long the run is, in steps or by the clock."""
    length = settings.length
    if length.minutes is not None:
        return TimedPace(length.minutes * 60, time.monotonic)
    if length.steps is not None:
        return CountedPace(length.steps)
    assert length.epochs is not None
    return CountedPace(dataset.num_steps(length.epochs, settings.batch_size))


def _save_and_explain(error: _LossNotFinite, folder: OutputFolder, saver: Saver, run: Run) -> TrainingError:
    """Save the weights as they were before the step that failed, if any step was taken, and say so."""
    if not run.num_steps:
        return TrainingError(
            f"{error}; no step was taken and nothing was saved",
            hint="the model's weights or the data are at fault; try --dtype float32",
        )
    saver.publish(run.num_steps)
    return TrainingError(
        f"{error}; that step was not taken",
        hint=f"the weights after step {run.num_steps} are saved in {folder.out}; use a lower --lr",
    )
