"""Where bytes live: beside the device, in the host's memory, on disk, and in the tiers that tests need.

Only this room opens files for state. `base` says what a tier is; everything else is one file per tier.
"""

from outsize.tier.base import DurableTier, Tier, Transfer, follow_all, wait_all, wait_over
from outsize.tier.device import (
    CudaDevice,
    Device,
    DeviceArena,
    DeviceRegion,
    HostDevice,
    LinkStats,
    PaperDevice,
    Way,
    sent,
)
from outsize.tier.disk import IO_THREADS, DiskTier
from outsize.tier.host import HostArena, Region
from outsize.tier.slots import Slot, SlotPool
from outsize.tier.stats import TierStats
from outsize.tier.striped import StripedTier
from outsize.tier.transfer import DoneTransfer, Listener, Moment, TaskTransfer, Verb, at
from outsize.tier.versioned import Slab, Stored, VersionedTier

__all__ = [
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
