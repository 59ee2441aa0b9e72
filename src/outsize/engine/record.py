"""Recording a step of a model: what happened when, as a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from outsize.engine.executor import Executor
from outsize.engine.runtime import runtime_of
from outsize.errors import UsageError
from outsize.plan.timeline import Timeline
from outsize.store.offload import ActivationOffload
from outsize.store.recorder import Recorder


class Recording:
    """What `record` gives: `timeline` is there once its body is over."""

    def __init__(self) -> None:
        self._timeline: Timeline | None = None

    @property
    def timeline(self) -> Timeline:
        """What was recorded. Raises UsageError while recording goes on, and where it ended with an error."""
        if self._timeline is None:
            raise UsageError(
                "the recording is not over, or ended with an error",
                hint="take its timeline after the body of outsize.record(model)",
            )
        return self._timeline


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record what `model` does in the body, which should be one whole step: forward, backward and `optimizer.step()`.

    Computing, updates, transfers and waits, with their times in seconds, and the memory taken. Steps before the third
    read weights from their files; they are not like those that follow. Raises UsageError where the model was not called
    yet, or is being recorded.
    """
    runtime = runtime_of(model)
    executor, offload = runtime.backing.executor, runtime.backing.offload
    if executor is None:
        raise UsageError(
            "a model cannot be recorded before its first call",
            hint="call it once, so that everything has its place, then record a step",
        )
    if executor.recorder is not None:
        raise UsageError("the model is being recorded already", hint="end the first outsize.record")
    recording = Recording()
    recorder = Recorder(runtime.model.device)
    try:
        _tell(executor, offload, recorder)
        recorder.begin()
        yield recording
        recording._timeline = recorder.timeline()
    finally:
        _tell(executor, offload, None)


def _tell(executor: Executor, offload: ActivationOffload | None, recorder: Recorder | None) -> None:
    """Let everything that works for a model tell `recorder` of it, or nobody."""
    store = executor.store
    listener = recorder.moved if recorder is not None else None
    store.device.listen(listener)
    if store.disk is not None:
        store.disk.listen(listener)
    if store.updates.worker is not None:
        store.updates.worker.recorder = recorder
    if offload is not None:
        offload.tell(recorder)
    executor.recorder = recorder
