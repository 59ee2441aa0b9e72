"""Trackers by name: TensorBoard, and whatever transformers has a callback for (W&B, MLflow, Comet, ...).

A tracker of transformers is driven with the events it gets from a Trainer: the beginning, logged figures, the end.
Whether one uses the network is its own affair; none is asked for unless named.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from outsize.errors import ConfigError, in_short
from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.watch import RunFacts, Watcher

if TYPE_CHECKING:
    from outsize.engine import Report

TENSORBOARD = "tensorboard"


def trackers(names: Sequence[str], folder: Path) -> list[Watcher]:
    """The trackers of these names; files of theirs go below `folder`.

    Raises ConfigError for a name that nobody knows, and for a tracker whose package is missing.
    """
    return [
        _TensorBoard(folder / TENSORBOARD) if name == TENSORBOARD else _Tracker(name, folder)
        for name in names
    ]


def figures_of(metrics: StepMetrics) -> dict[str, float]:
    """A step as flat names and numbers."""
    figures: dict[str, float | None] = {
        "train/loss": metrics.loss,
        "train/learning_rate": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "train/tokens_per_s": metrics.tokens_per_s,
        "train/step_s": metrics.step_s,
        "memory/host_peak_bytes": metrics.host_peak_bytes,
        "io/bytes_read": metrics.bytes_read,
        "io/bytes_written": metrics.bytes_written,
        "io/wait_s": sum(metrics.wait_s.values()),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def evaluation_figures_of(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as flat names and numbers."""
    return {"eval/loss": evaluation.loss, "eval/perplexity": evaluation.perplexity}


class _TensorBoard(Watcher):
    """Event files, through torch."""

    may_fail = True

    def __str__(self) -> str:
        return f"--tracker {TENSORBOARD}"

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tracker tensorboard: the package is missing", hint="pip install tensorboard"
            ) from error
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def started(self, facts: RunFacts) -> None:
        """Keep the settings as text."""
        lines = [f"    {name}: {value}" for name, value in facts.settings.items() if value is not None]
        self._writer.add_text("settings", "\n".join(lines))

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Write the step."""
        self._write(figures_of(metrics), metrics.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write the evaluation."""
        self._write(evaluation_figures_of(evaluation), evaluation.step)

    def __enter__(self) -> _TensorBoard:
        self._writer = self._make(str(self._folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class _Tracker(Watcher):
    """A callback of transformers, told what a Trainer would tell it."""

    may_fail = True

    def __str__(self) -> str:
        return f"--tracker {self._name}"

    def __init__(self, name: str, folder: Path) -> None:
        from transformers.integrations import integration_utils
        from transformers.trainer_callback import TrainerControl, TrainerState

        known: Mapping[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
        if name not in known:
            raise ConfigError(
                f"--tracker {name}: not known", hint=f"one of {', '.join(sorted({*known, TENSORBOARD}))}"
            )
        try:
            self._callback = known[name]()
        except (RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "its package is missing"
            raise ConfigError(f"--tracker {name}: {reason}", hint=f"pip install {name}") from error
        self._name = name
        self._folder = folder
        self._state = TrainerState(is_world_process_zero=True, is_local_process_zero=True)
        self._control = TrainerControl()
        self._arguments: Any = None

    def started(self, facts: RunFacts) -> None:
        """The beginning of the training. Raises ConfigError where the tracker cannot begin: no login, no network."""
        from transformers import TrainingArguments

        self._arguments = TrainingArguments(
            output_dir=str(self._folder),
            run_name=facts.name,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        self._state.max_steps = facts.num_steps or 0
        try:
            self._tell("on_train_begin")
        except Exception as error:  # trackers raise errors of their own
            raise ConfigError(
                f"{self} cannot begin: {in_short(error)}",
                hint="log in to the tracker, or leave --tracker out",
            ) from error

    def stepped(self, metrics: StepMetrics, report: Report, num_steps: int | None) -> None:
        """Figures of a step."""
        self._log(figures_of(metrics), metrics.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Figures of an evaluation."""
        self._log(evaluation_figures_of(evaluation), evaluation.step)

    def ended(self, report: Report, interrupted: bool) -> None:
        """The end of the training."""
        self._tell("on_train_end")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        self._state.global_step = step
        self._tell("on_log", logs=dict(figures))

    def _tell(self, event: str, **more: Any) -> None:
        handler = getattr(self._callback, event)
        # Callbacks take the model only to look at it; there is none to look at here.
        if "model" in inspect.signature(handler).parameters:
            more["model"] = None
        handler(self._arguments, self._state, self._control, **more)
