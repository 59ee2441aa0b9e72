import outsize.tier
from outsize.tier import DiskTier, StripedTier, Tier
from tests.doubles import FaultyTier, MemoryTier, NullTier, SlowTier


def test_public_names_are_pinned():
    assert outsize.tier.__all__ == [
        "IO_THREADS",
        "CudaDevice",
        "Device",
        "DeviceArena",
        "DeviceRegion",
        "DiskTier",
        "DoneTransfer",
        "DurableTier",
        "HostArena",
        "HostDevice",
        "LinkStats",
        "Listener",
        "Moment",
        "PaperDevice",
        "Region",
        "Slab",
        "Slot",
        "SlotPool",
        "Stored",
        "StripedTier",
        "TaskTransfer",
        "Tier",
        "TierStats",
        "Transfer",
        "Verb",
        "VersionedTier",
        "Way",
        "at",
        "follow_all",
        "sent",
        "wait_all",
        "wait_over",
    ]
    assert all(hasattr(outsize.tier, name) for name in outsize.tier.__all__)


def test_every_tier_is_a_tier():
    kinds: list[type[Tier]] = [DiskTier, FaultyTier, MemoryTier, NullTier, SlowTier, StripedTier]
    for kind in kinds:
        assert all(callable(getattr(kind, name)) for name in ("start_read", "start_write", "listen", "close"))
