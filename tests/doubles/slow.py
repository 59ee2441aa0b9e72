"""A tier that keeps its caller waiting: the fixture that exposes a missing wait.

A transfer does nothing until its delay is over: what uses a buffer too early sees that it is too early.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from outsize.errors import UsageError
from outsize.tier.base import Tier
from outsize.tier.stats import TierStats
from outsize.tier.transfer import Listener, TaskTransfer, Verb


class SlowTier:
    """`inner`, with every transfer begun `delay` seconds late, in the background.

    `delay` is a figure, or a function of verb and label, called where the transfer is started.
    """

    def __init__(self, inner: Tier, delay: float | Callable[[Verb, str], float]) -> None:
        self.num_bytes = inner.num_bytes
        self._inner = inner
        self._delay = delay
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_open = True

    def start_read(self, offset: int, buffer: memoryview, label: str) -> TaskTransfer:
        """Start a read that begins after the delay."""
        return self._start(Verb.READ, offset, buffer, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> TaskTransfer:
        """Start a write that begins after the delay, with the bytes that are in the buffer then."""
        return self._start(Verb.WRITE, offset, buffer, label)

    def stats(self) -> TierStats:
        """The inner tier's figures."""
        return self._inner.stats()

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of what the inner tier moves."""
        self._inner.listen(listener)

    def finish(self) -> None:
        """Wait until nothing is under way."""
        for thread in self._threads:
            thread.join()
        self._inner.finish()

    def close(self) -> None:
        """Wait for what is under way, then close the inner tier."""
        self._is_open = False
        for thread in self._threads:
            thread.join()
        self._inner.close()

    def _start(self, verb: Verb, offset: int, buffer: memoryview, label: str) -> TaskTransfer:
        if not self._is_open:
            raise UsageError(f"slow tier: {label} was started on a closed tier")
        delay_s = self._delay(verb, label) if callable(self._delay) else self._delay
        task: Future[None] = Future()

        def run(view: memoryview) -> None:
            try:
                with view:
                    time.sleep(delay_s)
                    start = self._inner.start_read if verb is Verb.READ else self._inner.start_write
                    start(offset, view, label).wait()
            except BaseException as error:
                task.set_exception(error)
            else:
                task.set_result(None)

        thread = threading.Thread(target=run, args=(memoryview(buffer),), name=f"outsize-slow {label}")
        thread.start()
        with self._lock:  # transfers are started from several threads
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        return TaskTransfer(task)
