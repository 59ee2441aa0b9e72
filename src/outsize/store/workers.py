"""The threads that move, read and update blocks, and how they end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.path import Path
from outsize.tier import Device, Tier


@dataclass(frozen=True, slots=True)
class Workers:
    """Everything that works for one store; refers neither to the store nor to the memory of its blocks.

    `threads` are in the order in which they end: later ones finish the work of earlier ones.
    """

    path: Path
    device: Device
    disk: Tier | None
    threads: tuple[ThreadPoolExecutor, ...] = ()
    optimizer: OptimizerWorker | None = None

    def finish(self) -> None:
        """Wait until nothing moves any more, whether it failed or not: every worker is idle then."""
        if self.optimizer is not None:
            self.optimizer.finish()
        for thread in self.threads:
            thread.submit(lambda: None).result()
        self.path.finish()
        self.device.finish()
        if self.disk is not None:
            self.disk.finish()

    def close(self) -> None:
        """End the threads, those first whose work others finish, and close the disk, whatever goes wrong."""
        with ExitStack() as stack:
            if self.disk is not None:
                stack.callback(self.disk.close)
            stack.callback(self.device.finish)
            stack.callback(self.path.close)
            for thread in reversed(self.threads):
                stack.callback(thread.shutdown)
            if self.optimizer is not None:
                stack.callback(self.optimizer.close)
