import threading

import pytest

from outsize.hardware.rate import Rate, Work, _rate, _Unit, rate, rates_together


class Counted:
    """Work that says how often it ran, and is over at once."""

    def __init__(self, amount=8.0):
        self.amount, self.num_runs, self.num_finished, self.threads = amount, 0, 0, set()

    def run(self):
        self.num_runs += 1
        self.threads.add(threading.get_ident())
        return self.amount

    def finish(self):
        self.num_finished += 1

    def work(self):
        return Work(self.run, self.finish)


def test_a_rate_needs_a_first_unit_and_one_that_counts():
    counted = Counted()
    found = rate(counted.work(), 0.0)
    assert found.middle > 0 and found.mean > 0
    assert counted.num_runs == 2 and counted.num_finished == 1


def test_both_run_until_each_has_a_unit_that_counts():
    first, second = Counted(), Counted()
    assert all(found.mean > 0 for found in rates_together(first.work(), second.work(), 0.0))
    assert first.num_runs >= 2 and second.num_runs >= 2
    assert first.num_finished == second.num_finished == 1
    assert first.threads.isdisjoint(second.threads)


def fails_at(number):
    runs = iter(range(1, 1 << 30))

    def run():
        if next(runs) >= number:
            raise OSError("the disk is gone")
        return 1.0

    return Work(run)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_either_raises_ends_both(number):
    with pytest.raises(OSError, match="the disk is gone"):
        rates_together(fails_at(number), Counted().work(), 0.0 if number < 3 else 60.0)
    with pytest.raises(OSError, match="the disk is gone"):
        rates_together(Counted().work(), fails_at(number), 60.0)


def test_a_unit_that_was_held_up_counts_in_the_mean_only():
    units = [_Unit(0, 1, 4), _Unit(1, 2, 4), _Unit(2, 8, 4)]
    assert _rate(units) == Rate(middle=4.0, mean=1.5)
