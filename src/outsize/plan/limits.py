"""The memory of a machine, and of the process on it, as they were when a plan was made."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.config import format_bytes

SLACK_BYTES = 96 << 20
"""Memory left for what is not planned: malloc's remains, Python objects, thread stacks."""

SLACK_SHARE = 32
"""Of a large budget, its part that is left instead: visits are larger too, and what malloc wastes on them."""

DEVICE_SLACK_BYTES = 64 << 20
"""Memory of the device left for what is not planned: torch's allocator takes pages of 20 MiB for large tensors and of 2
for small ones, and more than one stays partly used."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """A device with memory of its own: the limit, what is free of it, and what was taken before anything was placed."""

    limit_bytes: int
    free_bytes: int
    taken_bytes: int

    @property
    def room_bytes(self) -> int:
        """What planes and activations may take."""
        return min(self.limit_bytes, self.free_bytes) - DEVICE_SLACK_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """All that a plan must stay within. Nothing in here is measured again while plans are compared."""

    host_bytes: int
    """The most that the process may take of the host's memory."""
    base_bytes: int = 0
    """What it takes before anything is placed."""
    reserved_bytes: int = 0
    """Promised to something else: a KV cache, allocated once everything is placed."""
    reading_bytes: int = 0
    """What reading a block from its source takes beside the memory that it is read into."""
    device: DeviceLimits | None = None
    """None if the host computes."""
    others: str = ""
    """Names other models that hold memory, as a part of a sentence."""

    @property
    def is_host(self) -> bool:
        """Whether the host computes."""
        return self.device is None

    @property
    def computes_in(self) -> str:
        """The option that gives memory where blocks compute."""
        return "host" if self.is_host else "device"

    @property
    def slack_bytes(self) -> int:
        """Memory of the host that is left for what is not planned."""
        return max(SLACK_BYTES, self.host_bytes // SLACK_SHARE)

    @property
    def host_room_bytes(self) -> int:
        """What planes, buffers and, if the host computes, activations may take of the host's memory."""
        return self.host_bytes - self.base_bytes - self.reserved_bytes - self.slack_bytes - self.reading_bytes

    @property
    def room_bytes(self) -> int:
        """What planes and activations may take where blocks compute."""
        return self.host_room_bytes if self.device is None else self.device.room_bytes

    @property
    def taken_text(self) -> str:
        """What is taken already, as a part of a sentence."""
        kv = f"the KV cache takes {format_bytes(self.reserved_bytes)}, " if self.reserved_bytes else ""
        return f"the process itself has {format_bytes(self.base_bytes)}, {self.others}{kv}"
