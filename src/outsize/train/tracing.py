"""Recording one step of a run, for `outsize trace`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from outsize.train.api import Api, Predicted
from outsize.train.trace import Trace

_FIRST_RECORDED = 2
"""A model cannot be recorded before its first call."""


class Tracing:
    """Records one step, `first_step` or the next that can be and that no evaluation comes before, and writes it to `path`.

    An evaluation applies the updates that a step would otherwise find, and in the first step everything is given its
    place. With 0 no step is recorded.
    """

    def __init__(self, api: Api, model: nn.Module, first_step: int, path: Path) -> None:
        self._api = api
        self._model = model
        self._first_step = max(first_step, _FIRST_RECORDED)
        self._path = path
        self._is_over = first_step == 0
        self._was_evaluated = False
        self.trace: Trace | None = None
        """What was recorded, once it was."""

    @contextmanager
    def step(self, number: int, predicted: Predicted | None) -> Iterator[None]:
        """The body makes step `number` (from 1); it is recorded where it is the one."""
        if self._is_over or number < self._first_step or self._was_evaluated:
            self._was_evaluated = False
            yield
            return
        with self._api.record(self._model) as recording:
            yield
        self._is_over = True
        expected = predicted.timeline() if predicted is not None else None
        self.trace = Trace(self._path.parent.name, number, expected, recording.timeline)
        self.trace.write(self._path)

    def evaluated(self) -> None:
        """An evaluation was made since the last step."""
        self._was_evaluated = True
