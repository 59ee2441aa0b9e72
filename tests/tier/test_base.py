"""Waiting for several transfers: all are over before anything is raised, whatever is raised."""

import pytest

from outsize.errors import StorageError
from outsize.tier import follow_all, wait_all, wait_over


class Moving:
    """A transfer that raises each of `errors`, one at each wait, and is over after that."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.is_over = False

    def wait(self):
        if self.errors:
            error = self.errors.pop(0)
            self.is_over = isinstance(error, Exception)  # an interrupt ends the wait, not the transfer
            raise error
        self.is_over = True

    follow = wait

    def is_done(self):
        return self.is_over


@pytest.mark.parametrize("wait", [wait_all, follow_all])
@pytest.mark.parametrize("kind", [StorageError, OSError, MemoryError, AssertionError, KeyboardInterrupt])
def test_all_are_over_before_the_first_error_is_raised(kind, wait):
    moving = [Moving(), Moving(kind("first")), Moving(ValueError("second")), Moving()]
    with pytest.raises(kind, match="first"):
        wait(moving)
    assert all(each.is_done() for each in moving)


def test_cleaning_up_waits_for_all_and_raises_nothing():
    moving = [Moving(KeyboardInterrupt()), Moving(OSError()), Moving()]
    wait_over(moving)
    assert all(each.is_done() for each in moving)


def test_a_second_interrupt_gives_up():
    with pytest.raises(KeyboardInterrupt):
        wait_all([Moving(KeyboardInterrupt(), KeyboardInterrupt(), KeyboardInterrupt())])
