import threading

import pytest

from outsize.errors import StorageError, UsageError
from outsize.tier.transfer import Verb
from tests.doubles import slow
from tests.doubles.faulty import Fault, FaultKind, FaultyTier
from tests.doubles.memory import MemoryTier
from tests.doubles.slow import SlowTier
from tests.tier.helpers import pages


class Gate:
    """Stands in for the module `time`: a delay lasts until the gate opens."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.delays_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.delays_s.append(seconds)
        assert self.opened.wait()


def test_nothing_moves_until_the_delay_is_over(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(slow, "time", gate)
    inner = MemoryTier(4096)
    tier = SlowTier(inner, delay=3.0)
    data, back = pages(4096, seed=1), pages(4096)
    write = tier.start_write(0, data, "w")
    inner.start_read(0, back, "r").wait()
    assert not write.is_done() and not any(back)
    gate.opened.set()
    write.wait()
    tier.start_read(0, back, "r").wait()
    assert bytes(back) == bytes(data)
    assert gate.delays_s == [3.0, 3.0]
    tier.close()
    with pytest.raises(UsageError, match="closed"):
        tier.start_read(0, back, "r")


def test_the_delay_may_depend_on_the_transfer():
    asked = []

    def delay(verb: Verb, label: str) -> float:
        asked.append((verb, label))
        return 0.0

    tier = SlowTier(MemoryTier(4096), delay)
    tier.start_write(0, pages(4096), "a").wait()
    tier.start_read(0, pages(4096), "b").wait()
    tier.close()
    assert asked == [(Verb.WRITE, "a"), (Verb.READ, "b")]


def test_errors_come_with_wait_and_close_waits():
    tier = SlowTier(FaultyTier(MemoryTier(4096), [Fault(FaultKind.EIO, Verb.READ)]), delay=0.01)
    transfer = tier.start_read(0, pages(4096), "L00")
    tier.close()
    assert transfer.is_done()
    with pytest.raises(StorageError, match="L00"):
        transfer.wait()
