"""Recording one step of a run, for `outsize trace`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from outsize.errors import StorageError
from outsize.model.writer import storage_errors
from outsize.train.api import Api
from outsize.train.trace import Trace

if TYPE_CHECKING:
    from outsize.engine import Prediction


class Tracing:
    """Records one step, `first_step` or the next that is like others, and writes it to `path`.

    The first that it sees is not, since everything is given its place then; nor is one that an evaluation comes before,
    which applies the updates that a step would otherwise find. With 0 no step is recorded. A file that cannot be written is
    reported by `say`: it is no reason to end the run.
    """

    def __init__(
        self, api: Api, model: nn.Module, first_step: int, path: Path, say: Callable[[str], None]
    ) -> None:
        self._api = api
        self._model = model
        self._first_step = first_step
        self._path = path
        self._say = say
        self._is_over = first_step == 0
        self._is_left_out = True
        self.trace: Trace | None = None
        """What was recorded, once it was."""

    @contextmanager
    def step(self, number: int, predicted: Prediction | None) -> Iterator[None]:
        """The body makes step `number` (from 1); it is recorded where it is the one."""
        if self._is_over or number < self._first_step or self._is_left_out:
            self._is_left_out = False
            yield
            return
        with self._api.record(self._model) as recording:
            yield
        self._is_over = True
        expected = predicted.timeline() if predicted is not None else None
        self.trace = Trace(self._path.parent.name, number, expected, recording.timeline)
        try:
            with storage_errors(self._path):
                self.trace.write(self._path)
        except StorageError as error:
            self._say(f"step {number} is not kept for outsize trace: {error.message}")

    def evaluated(self) -> None:
        """An evaluation was made since the last step."""
        self._is_left_out = True
