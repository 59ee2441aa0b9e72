"""What is known of each step: one frozen value, one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outsize.engine import Report


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters of a model at one moment."""

    bytes_read: int
    bytes_written: int
    wait_s: Mapping[str, float]

    @classmethod
    def of(cls, report: Report) -> Usage:
        """The counters in `report`, copied."""
        return cls(report.bytes_read, report.bytes_written, dict(report.wait_s))

    def since(self, before: Usage) -> Usage:
        """What was added after `before`."""
        return Usage(
            self.bytes_read - before.bytes_read,
            self.bytes_written - before.bytes_written,
            {link: total - before.wait_s.get(link, 0.0) for link, total in self.wait_s.items()},
        )


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step. Bytes and waits are this step's own; `host_peak_bytes` is the run's so far; steps count from
    1."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    step_s: float
    host_peak_bytes: int
    bytes_read: int
    bytes_written: int
    wait_s: Mapping[str, float]

    def to_json(self) -> str:
        """One line of strict JSON."""
        record = dataclasses.asdict(self)
        if self.grad_norm is not None and not math.isfinite(self.grad_norm):
            record["grad_norm"] = str(self.grad_norm)  # JSON has no infinity
        return json.dumps(record, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the model was worth after `step`: the mean cross-entropy per trained token of the evaluation data."""

    step: int
    loss: float
    num_tokens: int
    duration_s: float
    is_best: bool

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> str:
        """One line of strict JSON; its keys begin with `eval_`, except `step`."""
        figures: dict[str, object] = {
            "step": self.step,
            "eval_loss": self.loss,
            "eval_num_tokens": self.num_tokens,
            "eval_s": self.duration_s,
            "eval_is_best": self.is_best,
        }
        if math.isfinite(self.perplexity):
            figures["eval_perplexity"] = self.perplexity
        return json.dumps(figures, allow_nan=False)
