import pytest

from outsize.tier import stats
from outsize.tier.stats import Meter, TierStats
from outsize.tier.transfer import Verb


class Clock:
    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


def test_time_is_the_union_of_what_overlaps_and_bytes_count_only_success(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stats, "time", clock)
    meter = Meter()
    with meter.busy(Verb.READ, 10):
        clock.now_s = 1
        with meter.busy(Verb.READ, 20):
            clock.now_s = 3
            assert meter.stats() == TierStats(read_busy_s=3)
        clock.now_s = 4
    clock.now_s = 100
    with pytest.raises(OSError), meter.busy(Verb.WRITE, 5):
        clock.now_s = 101
        raise OSError
    with meter.busy(Verb.READ, 1):
        clock.now_s = 102
    told = []
    meter.listener = lambda verb, label, size, start, end: told.append((verb, label, size, start(), end()))
    with meter.busy(Verb.WRITE, 7, "L00.weight"):
        clock.now_s = 105
    with pytest.raises(OSError), meter.busy(Verb.WRITE, 5, "L01.weight"):
        raise OSError
    meter.listener = None
    with meter.busy(Verb.WRITE, 9, "L02.weight"):
        pass
    assert told == [(Verb.WRITE, "L00.weight", 7, 102, 105)]
    assert meter.stats() == TierStats(bytes_read=31, bytes_written=16, read_busy_s=5, write_busy_s=4)
