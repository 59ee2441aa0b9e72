"""Where bytes live: host memory in an arena, disk behind two verbs, and the tiers that tests need.

Only this room opens files for state. `base` says what a tier is; everything else is one file per tier.
"""

from outsize.tier.base import Tier, Transfer
from outsize.tier.disk import DiskTier
from outsize.tier.faulty import Fault, FaultKind, FaultyTier
from outsize.tier.host import HostArena, Region
from outsize.tier.memory import MemoryTier
from outsize.tier.null import LoggedTransfer, NullTier
from outsize.tier.slots import Slot, SlotPool
from outsize.tier.slow import SlowTier
from outsize.tier.stats import TierStats
from outsize.tier.transfer import Verb

__all__ = [
    "DiskTier",
    "Fault",
    "FaultKind",
    "FaultyTier",
    "HostArena",
    "LoggedTransfer",
    "MemoryTier",
    "NullTier",
    "Region",
    "Slot",
    "SlotPool",
    "SlowTier",
    "Tier",
    "TierStats",
    "Transfer",
    "Verb",
]
