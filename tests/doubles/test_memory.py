import pytest

from outsize.errors import UsageError
from tests.doubles.memory import MemoryTier
from tests.tier.helpers import pages


def test_it_stores():
    tier = MemoryTier(16384)
    data, back = pages(8192, seed=1), pages(16384, seed=2)
    tier.start_write(4096, data, "w").wait()
    tier.start_read(0, back, "r").wait()
    assert bytes(back) == bytes(4096) + bytes(data) + bytes(4096)
    tier.close()
    tier.close()
    with pytest.raises(UsageError, match="closed"):
        tier.start_write(0, data, "w")
