from outsize.train.pace import CountedPace, TimedPace


def test_counted():
    pace = CountedPace(2)
    assert not pace.is_over() and pace.num_steps() == 2
    pace.step_done()
    assert not pace.is_over()
    pace.step_done()
    assert pace.is_over()


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_timed_fills_the_time_and_leaves_the_slow_first_step_out():
    clock = Clock()
    pace = TimedPace(20.0, clock)
    assert pace.num_steps() is None
    times = iter([5.0] + [1.0] * 100)
    steps = 0
    while not pace.is_over():
        clock.now_s += next(times)
        pace.step_done()
        steps += 1
        if steps >= 2:
            assert pace.num_steps() == 16
    assert steps == 16 and clock.now_s == 120.0


def test_timed_makes_one_step_even_without_time():
    clock = Clock()
    pace = TimedPace(0.5, clock)
    assert not pace.is_over()
    clock.now_s += 3.0
    pace.step_done()
    assert pace.is_over()
