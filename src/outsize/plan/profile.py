"""What a machine can do, as a value: the figures that a plan is simulated with.

A profile is measured (`outsize.hardware`), read from a file, or shipped; it holds rates of each resource alone and how much
one slows another. The file is JSON with the fields of `Profile`; rates are bytes or floating-point operations per second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

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


Kind = TypeVar("Kind", bound=StrEnum)

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
    `spread` gives, by the names of rates, by what part of the rate the measurements of it lay apart from it; a rate that is
    not given was not measured more than once.
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
    update_threads: int | None = None
    """Threads that update weights, the fewest that are nearly as fast as more; None where that was not measured."""
    io_threads: int | None = None
    """The same of threads that read and write each disk."""
    contention: Mapping[Resource, Mapping[Resource, float]] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "source", "identity"):
            if not isinstance(getattr(self, name), str):
                raise self._wrong(name, getattr(self, name), "text")
        for name in ("matmul", "contention", "spread"):
            if not isinstance(getattr(self, name), Mapping):
                raise self._wrong(name, getattr(self, name), "a mapping")
        rates = {name: getattr(self, name) for name in _RATES} | {
            f"matmul.{kind}": rate for kind, rate in self.matmul.items()
        }
        for name, value in rates.items():
            if value is None and name in _OPTIONAL:
                continue
            if not (_is_number(value) and value > 0):
                raise self._wrong(name, value, "a positive number")
            if name in _COUNTS and value != int(value):
                raise self._wrong(name, value, "a whole number")
        if not self.matmul:
            raise ConfigError(
                f"profile {self.name}: matmul has no compute type",
                hint=f"give one of {', '.join(ComputeType)}",
            )
        given = [name for name in _OF_DEVICES if getattr(self, name) is not None]
        if 0 < len(given) < len(_OF_DEVICES):
            missing = next(name for name in _OF_DEVICES if name not in given)
            raise ConfigError(
                f"profile {self.name}: {missing} is missing beside {given[0]}",
                hint=f"a device with memory of its own has {', '.join(_OF_DEVICES)}; a host has none of them",
            )
        for first, others in self.contention.items():
            if not isinstance(others, Mapping):
                raise self._wrong(f"contention.{first}", others, "a mapping")
            for second, speed in others.items():
                if not (_is_number(speed) and 0 < speed <= 1):
                    raise self._wrong(f"contention.{first}.{second}", speed, "more than 0, at most 1")

        for name, part in self.spread.items():
            if name not in _SPREAD or not (_is_number(part) and part >= 0):
                raise self._wrong(f"spread.{name}", part, f"0 or more, of one of {', '.join(_SPREAD)}")

    def _wrong(self, name: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"profile {self.name}: {name} is {_shown(value)}, expected {expected}",
            hint="measure this machine with outsize profile, or correct the file",
        )

    @property
    def has_device(self) -> bool:
        """Whether blocks compute on a device with memory of its own."""
        return self.up is not None

    def speed(self, resource: Resource, others: frozenset[Resource]) -> float:
        """The part of its own speed that `resource` keeps while `others` run."""
        known = self.contention.get(resource, {})
        return math.prod(known.get(other, 1.0) for other in others)

    def at_the_end(self, *, fast: bool) -> Profile:
        """The same machine with every rate at the fast, or the slow, end of what was measured of it."""
        rates: dict[str, Any] = {
            name: rate * (1 + part) if fast else rate / (1 + part)
            for name, part in self.spread.items()
            if (rate := getattr(self, name)) is not None
        }
        return replace(self, **rates)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Profile:
        """The profile that `text` describes. Raises ConfigError naming the field that is missing or wrong."""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
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
            values["matmul"] = _keyed(ComputeType, values["matmul"])
            contention = _keyed(Resource, values.get("contention", {}))
            if isinstance(contention, dict):
                contention = {first: _keyed(Resource, others) for first, others in contention.items()}
            values["contention"] = contention
        except ValueError as error:
            raise ConfigError(f"{where}: {error}", hint="measure it again with outsize profile") from error
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file. Raises ConfigError."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}", hint="name a file that outsize profile wrote"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not text: {error.reason}", hint="name a file that outsize profile wrote"
            ) from error
        return cls.from_json(text, str(path))


_OPTIONAL = (
    *("up", "down", "device_bytes", "device_update", "device_memory", "disk_endurance_bytes"),
    *("update_threads", "io_threads"),
)
_RATES = ("disk_read", "disk_write", "host_copy", "update", "host_bytes", "num_threads", *_OPTIONAL)
_REQUIRED = tuple(name for name in ("name", "source", "matmul", *_RATES) if name not in _OPTIONAL)
_COUNTS = ("host_bytes", "num_threads", "device_bytes", "update_threads", "io_threads")
_SPREAD = ("disk_read", "disk_write", "host_copy", "update", "up", "down", "device_update", "device_memory")
_OF_DEVICES = ("device_bytes", "up", "down")


def _keyed(kind: type[Kind], values: Any) -> Any:
    """A mapping with keys of `kind`; what is none is left for the check of fields. Raises ValueError."""
    return {kind(key): value for key, value in values.items()} if isinstance(values, dict) else values


def _is_number(value: Any) -> bool:
    """Whether `value` is a number that arithmetic on floats can take."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    text = "a number too large" if isinstance(value, int) and value.bit_length() > 1024 else repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
