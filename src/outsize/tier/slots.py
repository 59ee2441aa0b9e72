"""Pools of fixed buffers: a slot is taken by an owner, used, and given back.

The plan says how many slots of each kind a run needs at most; all are allocated at the start, so that nothing
can run out of memory later.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from outsize.tier.base import Transfer
from outsize.tier.device import DeviceArena, DeviceRegion
from outsize.tier.host import HostArena, Region


class Slot:
    """One buffer of a pool; its bytes are whatever the last owner left.

    `after` is the work that last used them: whoever fills the slot next comes after it.
    """

    def __init__(self, index: int, region: Region | DeviceRegion) -> None:
        self.index = index
        self.region = region
        self.owner: str | None = None
        self.after: tuple[Transfer, ...] = ()

    @property
    def name(self) -> str:
        """The slot's name, such as `weights[1]`."""
        return self.region.name

    @property
    def num_bytes(self) -> int:
        """Bytes of the slot, whole pages."""
        return self.region.num_bytes

    @property
    def buffer(self) -> memoryview:
        """All bytes of a slot in the host's memory, without a copy."""
        assert isinstance(self.region, Region), f"{self.name} is beside the device"
        return self.region.buffer

    def tensor(self, dtype: torch.dtype, num_elements: int, byte_offset: int = 0) -> torch.Tensor:
        """A one-dimensional tensor on the slot's bytes, as `Region.tensor`."""
        return self.region.tensor(dtype, num_elements, byte_offset)


class SlotPool:
    """`count` slots of `slot_bytes` each, allocated at once (BudgetError where `arena` has no room)."""

    def __init__(self, arena: HostArena | DeviceArena, name: str, slot_bytes: int, count: int) -> None:
        assert count >= 0, f"{name}: {count} slots"
        self.name = name
        self.high_water = 0
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        try:
            for index in range(count):
                self._slots.append(Slot(index, arena.allocate(slot_bytes, f"{name}[{index}]")))
        except BaseException:
            self.free()
            raise
        # The slot given back last is taken first: it may still be in a cache.
        self._idle = self._slots[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_taken(self) -> int:
        """Slots that have an owner now; `high_water` is the most there ever were."""
        return len(self._slots) - len(self._idle)

    def take(self, owner: str) -> Slot:
        """An idle slot, now of `owner`; AssertionError naming the owners where the plan took too many."""
        with self._lock:
            assert self._idle, f"{self.name}: no slot for {owner}; " + self._owners()
            slot = self._idle.pop()
            slot.owner = owner
            self.high_water = max(self.high_water, self.num_taken)
        return slot

    def give(self, slot: Slot, after: Sequence[Transfer] = ()) -> None:
        """Take `slot` back, used until `after` is done; AssertionError where it is not of this pool, or has no owner."""
        with self._lock:
            is_ours = slot.index < len(self._slots) and self._slots[slot.index] is slot
            assert is_ours, f"{self.name}: {slot.name} is a slot of another pool"
            assert slot.owner is not None, f"{self.name}: {slot.name} was given back twice"
            slot.owner, slot.after = None, tuple(after)
            self._idle.append(slot)

    def reset(self, after: Sequence[Transfer] = ()) -> None:
        """Take every slot back, whatever owns it; nothing uses one once `after` is done."""
        with self._lock:
            for slot in self._slots:
                slot.owner, slot.after = None, tuple(after)
            self._idle = self._slots[::-1]

    def check_books(self) -> None:
        """Raise AssertionError, listing slots and owners, unless every slot is idle, exactly once."""
        with self._lock:
            assert self.num_taken == 0 and not any(slot.owner for slot in self._slots), (
                f"{self.name}: {self.num_taken} slots are not given back; " + self._owners()
            )
            assert len({id(slot) for slot in self._idle}) == len(self._slots), (
                f"{self.name}: a slot is idle twice"
            )

    def free(self) -> None:
        """Give the memory of all slots back to the arena; AssertionError where one still has an owner."""
        assert not any(slot.owner for slot in self._slots), f"{self.name}: " + self._owners()
        for slot in self._slots:
            slot.region.free()
        self._slots = []
        self._idle = []

    def _owners(self) -> str:
        taken = [f"{slot.name} is held by {slot.owner}" for slot in self._slots if slot.owner is not None]
        return ", ".join(taken) or "no slot is held"
