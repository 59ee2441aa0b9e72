"""Commits of a training run: when they are made, what they hold beside the model, and how a run goes on from one.

A commit holds the model's state (`outsize.checkpoint`), the place in the data, the schedule, the time spent and the
settings; the steps so far are in `metrics.jsonl`, of which what came after the commit is forgotten.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outsize.checkpoint.files import commit_paths
from outsize.errors import ConfigError
from outsize.train.data import DataFile, Dataset
from outsize.train.metrics import Evaluation, StepMetrics
from outsize.train.settings import TrainSettings, flat

_FREE = {
    *("model", "data", "out", "overwrite", "steps", "epochs", "minutes"),
    *("eval", "eval-split", "eval-every", "tracker", "trace-step"),
    *("device", "host", "disk", "home", "dtype", "pin", "on-device-full", "compile", "attention"),
    *("checkpoint", "checkpoint-every", "keep"),
}
"""Options that a run may change when it goes on; `eval-split` takes sequences from training and is checked apart, and so
are the data, whose files may lie elsewhere."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run had come: `position` in the data, the schedule's state, seconds spent, settings by name, and what the
    data were (`facts_of`)."""

    position: tuple[int, int]
    scheduler: Mapping[str, Any]
    elapsed_s: float
    settings: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]

    def to_extra(self) -> dict[str, Any]:
        """As a commit keeps it."""
        return {"train": dataclasses.asdict(self)}

    @classmethod
    def of_extra(cls, extra: Mapping[str, Any], path: Path) -> Progress:
        """Raises ConfigError where the commit was made by another loop."""
        if "train" not in extra:
            raise ConfigError(
                f"{path}: the commits were made by a loop of one's own, not by outsize train",
                hint="resume there, or export the commit and train from the folder",
            )
        epoch, index = extra["train"]["position"]
        return cls(**{**extra["train"], "position": (int(epoch), int(index))})

    def check(self, settings: TrainSettings, data: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError naming an option, or a file of `data`, with which the run would not be the same run."""
        now = flat(settings)
        fixed = [name for name in now if name not in _FREE or name == "eval-split"]
        for name in fixed:
            if name not in self.settings:
                continue  # an option that the release that made the commit did not have
            before = self.settings[name]
            if before != now[name]:
                raise ConfigError(
                    f"--{name}: {_shown(now[name])}, and the run that is resumed had {_shown(before)}",
                    hint=f"pass --{name} {_shown(before)}, or export the commit and begin a new run from it",
                )
        self._check_data(data)

    def _check_data(self, data: Sequence[Mapping[str, Any]]) -> None:
        again = "or export the commit and begin a new run from it"
        if [file["weight"] for file in data] != [file["weight"] for file in self.data]:
            raise ConfigError(
                f"data: {_files(data)}, and the run that is resumed had {_files(self.data)}",
                hint=f"pass {_files(self.data)}, {again}",
            )
        for now, before in zip(data, self.data, strict=True):
            if now["digest"] != before["digest"]:
                raise ConfigError(
                    f"data: {now['file']} is not what the run that is resumed had: {now['num_tokens']:,} tokens, "
                    f"{before['num_tokens']:,} before",
                    hint=f"pass {_files(self.data)} as it was, with the model's own tokenizer, {again}",
                )


def check_store(settings: TrainSettings) -> None:
    """Raise ConfigError where commits of an earlier run are there that this one is not to go on from."""
    if settings.checkpointing.is_on and not settings.checkpointing.resume:
        commits = commit_paths(settings.checkpoint)
        if commits:
            raise ConfigError(
                f"{settings.checkpoint} holds a commit of an earlier run, after step {int(commits[-1].stem)}",
                hint=f"--resume goes on from it; outsize checkpoint remove {settings.checkpoint} --all forgets it",
            )


def facts_of(dataset: Dataset) -> list[dict[str, Any]]:
    """What each file of `dataset` is, by its tokens and not by where it lies."""
    return [
        {
            "file": str(source.tokens.source),
            "weight": source.weight,
            "num_tokens": source.tokens.num_tokens,
            "digest": source.tokens.digest(),
        }
        for source in dataset.sources
    ]


def _files(data: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(str(DataFile(Path(file["file"]), file["weight"])) for file in data)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


History = tuple[list[StepMetrics], list[Evaluation]]
"""The steps and the evaluations of earlier processes."""


def read_history(path: Path, num_steps: int) -> History:
    """The steps and evaluations in `metrics.jsonl` up to `num_steps`; what cannot be read, or is missing, is left out."""
    steps: dict[int, StepMetrics] = {}
    evaluations: dict[int, Evaluation] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [], []
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
            if step > num_steps:
                continue
            if "eval_loss" in record:
                evaluations[step] = Evaluation(
                    step,
                    record["eval_loss"],
                    record["eval_num_tokens"],
                    record["eval_s"],
                    record["eval_is_best"],
                )
            else:
                if isinstance(record["grad_norm"], str):
                    record["grad_norm"] = float(record["grad_norm"])
                steps[step] = StepMetrics(**record)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]
