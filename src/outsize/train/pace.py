"""How many steps a run has, and when it is over: counted, or found from the measured time of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Pace(Protocol):
    """Knows the length of a run; told of each step that is done."""

    def num_steps(self) -> int | None:
        """Steps of the whole run, as far as is known now."""

    def is_over(self) -> bool:
        """Whether no further step should begin."""

    def step_done(self) -> None:
        """A step has ended."""

    def go_on(self, num_steps: int, elapsed_s: float) -> None:
        """So many steps, and so much time, were spent by an earlier process."""


class CountedPace:
    """A run of a given number of steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._done = 0

    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self._num_steps

    def is_over(self) -> bool:
        """Whether all are done."""
        return self._done >= self._num_steps

    def step_done(self) -> None:
        """Count one."""
        self._done += 1

    def go_on(self, num_steps: int, elapsed_s: float) -> None:
        """Count them."""
        self._done = num_steps


class TimedPace:
    """A run that ends when the next step would not end within `limit_s`; at least one step.

    The time of a step is the mean so far, without the first, which also warms everything up.
    """

    def __init__(self, limit_s: float, now: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._now = now
        self._start_s = now()
        self._first_done_s = self._last_done_s = self._start_s
        self._done = self._before = 0

    def num_steps(self) -> int | None:
        """Steps done, and those that still fit at the mean step time; None while that is not known."""
        if self._done < 2:
            return None
        left_s = self._start_s + self._limit_s - self._last_done_s
        return self._before + self._done + max(0, int(left_s / max(self._step_s(), 1e-9)))

    def is_over(self) -> bool:
        """Whether the next step would end too late."""
        if self._done == 0:
            return self._before > 0 and self._limit_s <= 0
        return self._now() + self._step_s() > self._start_s + self._limit_s

    def step_done(self) -> None:
        """Take the time of the step that ended now."""
        self._last_done_s = self._now()
        self._done += 1
        if self._done == 1:
            self._first_done_s = self._last_done_s

    def go_on(self, num_steps: int, elapsed_s: float) -> None:
        """Take the time off; the time of a step is measured anew."""
        self._before = num_steps
        self._limit_s -= elapsed_s

    def _step_s(self) -> float:
        if self._done == 1:
            return self._first_done_s - self._start_s
        return (self._last_done_s - self._first_done_s) / (self._done - 1)
