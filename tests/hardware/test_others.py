import pytest

from outsize.hardware import others
from outsize.hardware.others import OtherPrograms


@pytest.fixture
def machine(monkeypatch):
    """Sets, in seconds: the clock, this process's time, and busy time of both cores."""
    ticks_per_s = others.os.sysconf("SC_CLK_TCK")

    def at(clock_s, own_s, busy_s):
        monkeypatch.setattr(others.time, "monotonic", lambda: clock_s)
        monkeypatch.setattr(others.time, "process_time", lambda: own_s)
        text = f"cpu  {busy_s * ticks_per_s} 0 0 {10**9} {10**9} 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n"
        monkeypatch.setattr(others._STAT.__class__, "read_text", lambda path: text)

    monkeypatch.setattr(others.os, "cpu_count", lambda: 2)
    return at


@pytest.mark.parametrize(
    ("own_s", "busy_s", "part"), [(20, 20, 0.0), (10, 20, 0.5), (5, 15, 0.5), (20, 10, 0.0)]
)
def test_time_that_is_neither_idle_nor_ours_is_that_of_others(own_s, busy_s, part, machine):
    machine(100, 7, 1000)
    watch = OtherPrograms()
    machine(110, 7 + own_s, 1000 + busy_s)
    assert watch.part() == part


def test_a_system_that_does_not_say_has_no_others(monkeypatch, tmp_path):
    monkeypatch.setattr(others, "_STAT", tmp_path / "nothing")
    assert OtherPrograms().part() == 0.0
