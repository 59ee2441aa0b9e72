"""What a machine can do, as a value: the figures that a plan is simulated with.

A profile is measured (`outsize.hardware`), read from a file, or shipped; it holds rates of each resource alone and how much
one slows another. The file is JSON with the fields of `Profile`; rates are bytes or floating-point operations per second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from outsize.config import ComputeType
from outsize.errors import ConfigError

VERSION = 1
"""Of the format; a file of another version is refused."""


class Resource(StrEnum):
    """What an operation keeps busy."""

    COMPUTE = "compute"
    """Blocks, forward and backward."""
    UPDATE = "update"
    """Update rules on the host."""
    READ = "read"
    """The disk, to the host."""
    WRITE = "write"
    UP = "up"
    """The link from the host to a device with memory of its own."""
    DOWN = "down"


WORDS = {
    Resource.COMPUTE: "computing",
    Resource.UPDATE: "updating weights",
    Resource.READ: "reading the disk",
    Resource.WRITE: "writing the disk",
    Resource.UP: "copying to the device",
    Resource.DOWN: "copying from the device",
}
"""What each resource does, as one says it."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine.

    `matmul` gives floating-point operations per second by compute type; `update` bytes per second that an update rule
    moves on the host, `device_update` beside a device. `up` and `down` are None where blocks compute on the host.
    `contention[a][b]` is the speed that `a` keeps while `b` runs, in (0, 1]; pairs that are not given keep all of it.
    """

    name: str
    source: str
    disk_read: float
    disk_write: float
    host_copy: float
    update: float
    matmul: Mapping[ComputeType, float]
    host_bytes: int
    num_threads: int
    identity: str = ""
    """The machine and the versions it was measured with; empty in profiles that were not measured here."""
    device_bytes: int | None = None
    up: float | None = None
    down: float | None = None
    device_update: float | None = None
    device_memory: float | None = None
    disk_endurance_bytes: float | None = None
    """What may be written to the disk in its life; None where nobody says."""
    contention: Mapping[Resource, Mapping[Resource, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in _RATES} | {
            f"matmul.{k}": v for k, v in self.matmul.items()
        }
        for name, value in rates.items():
            is_missing = value is None and name in _OPTIONAL
            if not is_missing and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"profile {self.name}: {name} is {value!r}, expected a positive number",
                    hint="measure this machine with outsize profile, or correct the file",
                )
        if not self.matmul:
            raise ConfigError(
                f"profile {self.name}: matmul has no compute type",
                hint=f"give one of {', '.join(ComputeType)}",
            )
        if (self.up is None) is not (self.down is None):
            raise ConfigError(
                f"profile {self.name}: one of up and down is missing",
                hint="a device has both, a host neither",
            )
        for first, others in self.contention.items():
            for second, speed in others.items():
                if not (isinstance(speed, int | float) and 0 < speed <= 1):
                    raise ConfigError(
                        f"profile {self.name}: contention.{first}.{second} is {speed!r}, expected more than 0, at most 1"
                    )

    @property
    def has_device(self) -> bool:
        """Whether blocks compute on a device with memory of its own."""
        return self.up is not None

    def speed(self, resource: Resource, others: frozenset[Resource]) -> float:
        """The part of its own speed that `resource` keeps while `others` run."""
        known = self.contention.get(resource, {})
        return math.prod(known.get(other, 1.0) for other in others)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Profile:
        """The profile that `text` describes. Raises ConfigError naming the field that is missing or wrong."""
        try:
            values: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{where}: not JSON: {error}", hint="measure it again with outsize profile"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: not a profile", hint="measure this machine with outsize profile")
        version = values.pop("version", None)
        if version != VERSION:
            raise ConfigError(
                f"{where}: version {version!r}, expected {VERSION}",
                hint="measure it again with outsize profile",
            )
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{where}: unknown field {name!r}", hint=f"known are {', '.join(sorted(known))}"
                )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(
                f"{where}: {missing[0]} is missing", hint="measure it again with outsize profile"
            )
        try:
            values["matmul"] = {ComputeType(kind): rate for kind, rate in values["matmul"].items()}
            values["contention"] = {
                Resource(first): {Resource(second): speed for second, speed in others.items()}
                for first, others in values.get("contention", {}).items()
            }
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{where}: {error}", hint="measure it again with outsize profile") from error
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file. Raises ConfigError."""
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}", hint="name a file that outsize profile wrote"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not text: {error.reason}", hint="name a file that outsize profile wrote"
            ) from error
        return cls.from_json(text, str(path))


_OPTIONAL = ("up", "down", "device_bytes", "device_update", "device_memory", "disk_endurance_bytes")
_RATES = ("disk_read", "disk_write", "host_copy", "update", "host_bytes", "num_threads", *_OPTIONAL)
_REQUIRED = tuple(name for name in ("name", "source", "matmul", *_RATES) if name not in _OPTIONAL)
