"""Ctrl-C as a request: once, finish the step and save; twice, stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interruption:
    """While entered, the first SIGINT or SIGTERM sets `requested` and calls `tell`; the second raises KeyboardInterrupt.

    `tell` runs inside the signal handler: it may have interrupted a print, so it must not print or wait for a lock.
    Does nothing outside the main thread, where Python delivers no signals.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.requested = False
        self._tell = tell
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._tell()
