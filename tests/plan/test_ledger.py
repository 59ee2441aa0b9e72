"""The ledger as a value: sums, comparisons and the one table."""

from outsize.config import Home
from outsize.plan.ledger import Ledger, Purpose, larger


def test_ledgers_add_line_by_line():
    first = Ledger.of(Home.HOST, weights=3, kv=5)
    both = first + Ledger.of(Home.HOST, weights=4) + Ledger.of(Home.DISK, weights=8)
    assert both.lines == {
        (Home.HOST, Purpose.WEIGHTS): 7,
        (Home.HOST, Purpose.KV): 5,
        (Home.DISK, Purpose.WEIGHTS): 8,
    }
    assert both[Home.DEVICE, Purpose.STATE] == 0
    assert both.total(Home.HOST) == 12 and both.total(Home.HOST, Purpose.KV, Purpose.STATE) == 5
    assert first.lines[Home.HOST, Purpose.WEIGHTS] == 3


def test_the_peak_of_calls_that_follow_one_another_is_the_larger_use():
    """In each home by itself; inputs wait in memory that no other call has."""
    training = Ledger.of(Home.HOST, activations=6, visit=1, inputs=4) + Ledger.of(Home.DEVICE, visit=3)
    passes = Ledger.of(Home.HOST, kv=5, visit=3) + Ledger.of(Home.DEVICE, kv=1, visit=1)
    peak = larger(training, passes)
    assert peak == larger(passes, training)
    assert peak == Ledger.of(Home.HOST, kv=5, visit=3, inputs=4) + Ledger.of(Home.DEVICE, visit=3)


def test_weights_in_their_files_take_no_disk():
    ledger = Ledger.of(Home.DISK, inputs=2) + Ledger.of(Home.FILE, files=7)
    assert ledger.total(Home.DISK) == 2
    assert [(row.tier, row.num_bytes) for row in ledger.rows()] == [("disk", 7), ("disk", 2)]


def test_a_table_has_a_row_for_each_line_by_home_and_purpose():
    ledger = Ledger.of(Home.DISK, state=1 << 30) + Ledger.of(Home.HOST, process=4, buffers=1, activations=2)
    ledger += Ledger.of(Home.HOST, slots=8, visit=16, kv=0) + Ledger.of(Home.DEVICE, slots=32)
    rows = [(row.tier, row.what, row.num_bytes) for row in ledger.rows()]
    assert rows == [
        ("device", "slots", 32),
        ("host", "slots", 8),
        ("host", "buffers", 1),
        ("host", "activations (most)", 18),
        ("host", "Python and libraries", 4),
        ("disk", "optimizer state", 1 << 30),
    ]
    assert sum(num_bytes for *_, num_bytes in rows) == sum(map(ledger.total, Home))
    lines = str(ledger).splitlines()
    assert len(lines) == len(rows) and lines[-1].split() == ["disk", "optimizer", "state", "1.00", "GiB"]
