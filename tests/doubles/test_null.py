import pytest

from outsize.errors import UsageError
from outsize.tier.transfer import Verb
from tests.doubles.null import LoggedTransfer, NullTier
from tests.tier.helpers import pages


def test_reads_leave_buffers_unchanged_and_everything_is_logged():
    tier = NullTier(1 << 50)
    buffer = pages(8192, seed=1)
    before = bytes(buffer)
    tier.start_write(1 << 40, buffer, "L00.weight").wait()
    transfer = tier.start_read(4096, buffer, "L01.weight")
    assert transfer.is_done()
    assert bytes(buffer) == before
    assert tier.log == [
        LoggedTransfer(Verb.WRITE, "L00.weight", 1 << 40, 8192),
        LoggedTransfer(Verb.READ, "L01.weight", 4096, 8192),
    ]
    assert str(tier.log[1]) == "read L01.weight 8192 at 4096"


def test_it_refuses_what_a_disk_would_refuse():
    tier = NullTier(8192)
    with pytest.raises(AssertionError, match="outside"):
        tier.start_read(8192, pages(4096), "x")
    tier.close()
    tier.close()
    with pytest.raises(UsageError, match="closed"):
        tier.start_read(0, pages(4096), "x")
    assert tier.log == []
