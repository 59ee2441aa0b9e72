"""How fast a piece of work is done, alone and beside another: the clock of all that is measured.

Two rates are taken of the same units. The one in the middle leaves out what something else held up, and says what a
processor can do. The mean is what was done in all over the time it took in all, and the one to compare for two at once: the
system lets threads that share a core run in turns of some milliseconds, so that most units are as fast as alone, and a few
wait for all the others. Of a disk the mean counts as well: where it stalls, that is the disk's own.

The first unit is not counted: it brings caches, threads and queues into the state they have in the middle of a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Work:
    """What keeps one resource busy: `run` does a unit, some milliseconds of it, and returns how much that was.

    The amount is in bytes or floating-point operations. `finish` waits for what a unit left under way.
    """

    run: Callable[[], float]
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Rate:
    """Amount per second: of the unit in the middle, and over all units."""

    middle: float
    mean: float


@dataclass(frozen=True, slots=True)
class _Unit:
    start_s: float
    stop_s: float
    amount: float

    @property
    def rate(self) -> float:
        return self.amount / max(self.stop_s - self.start_s, 1e-9)


def rate(work: Work, seconds: float) -> Rate:
    """The rate of `work` alone, repeated for `seconds`, and at least once."""
    work.run()
    end_s = time.perf_counter() + seconds
    units = [_timed(work)]
    while time.perf_counter() < end_s:
        units.append(_timed(work))
    work.finish()
    return _rate(units)


def rates_together(first: Work, second: Work, seconds: float) -> tuple[Rate, Rate]:
    """The rates of both while both run, `second` in a thread of its own, for `seconds`, and at least once each.

    Only units that lie wholly inside the time in which both ran count, where there are such. Raises what either raises.
    """
    stop, is_busy = threading.Event(), threading.Event()
    others: list[_Unit] = []

    def keep_busy() -> None:
        try:
            second.run()
            is_busy.set()
            while not stop.is_set():
                others.append(_timed(second))
            second.finish()
        finally:
            is_busy.set()

    with ThreadPoolExecutor(1, thread_name_prefix="outsize-measure") as pool:
        busy = pool.submit(keep_busy)
        try:
            is_busy.wait()
            first.run()
            start_s = time.perf_counter()
            own = [_timed(first)]
            while not busy.done() and not (
                time.perf_counter() >= start_s + seconds and others and others[-1].start_s >= start_s
            ):
                own.append(_timed(first))
        finally:
            stop.set()
        busy.result()
    first.finish()
    stop_s = own[-1].stop_s
    inside = [unit for unit in others if unit.start_s >= start_s and unit.stop_s <= stop_s]
    return _rate(own), _rate(inside or others[-1:])


def _timed(work: Work) -> _Unit:
    start_s = time.perf_counter()
    amount = work.run()
    return _Unit(start_s, time.perf_counter(), amount)


def _rate(units: Sequence[_Unit]) -> Rate:
    amount = sum(unit.amount for unit in units)
    mean = amount / max(units[-1].stop_s - units[0].start_s, 1e-9)
    return Rate(median(unit.rate for unit in units), mean)
