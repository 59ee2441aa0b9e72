"""Tiers and a device that stand for real ones in tests: late, faulty, without bytes, or without a disk."""

from tests.doubles.faulty import Fault, FaultKind, FaultyTier
from tests.doubles.memory import MemoryTier
from tests.doubles.null import LoggedTransfer, NullTier
from tests.doubles.slow import SlowTier
from tests.doubles.twin import TwinDevice

__all__ = [
    "Fault",
    "FaultKind",
    "FaultyTier",
    "LoggedTransfer",
    "MemoryTier",
    "NullTier",
    "SlowTier",
    "TwinDevice",
]
