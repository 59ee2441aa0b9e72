"""What a user may choose, parsed and validated once, then passed whole and never edited."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import TypeAlias

from outsize.errors import ConfigError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class Home(StrEnum):
    """Where bytes live between visits, the fastest first."""

    DEVICE = "device"
    """Memory where blocks compute; the host's own where the processor computes."""
    HOST = "host"
    """Memory of a host that does not compute."""
    DISK = "disk"
    FILE = "file"
    """The model's own files, which are only read."""


HOME_CHOICES = (Home.DEVICE, Home.HOST, Home.DISK)
"""What a user may ask for."""


class ComputeType(StrEnum):
    """The number type that blocks compute in; the master weights are fp32 in both cases."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Weights(StrEnum):
    """In how many bits matrices of layers are kept, where not in the compute type."""

    INT8 = "int8"
    INT4 = "int4"


class OptimizerName(StrEnum):
    """The package's optimizers: members are named like their classes; values, in lower case, are for the command line."""

    AdamW = auto()
    AdamW8bit = auto()
    Lion = auto()
    Adan = auto()
    SGD = auto()
    SGDSaI = auto()

    @property
    def rule(self) -> str:
        """The name of its update rule, which compiles under that name."""
        return OptimizerName.SGD if self is OptimizerName.SGDSaI else self


class OnDeviceFull(StrEnum):
    """What follows when a device runs out of memory inside a call."""

    ERROR = "error"
    """A BudgetError that names what fits."""
    RETRY = "retry"
    """What failed is computed again: without activations that were kept, in smaller tiles, with fewer blocks that stay."""


def parse_bytes(text: str | int, what: str = "a size") -> int:
    """Number of bytes in `text`, such as `"3GiB"`, `"500 MB"` or `1024`.

    Raises ConfigError naming `what` where the text is no size.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    if isinstance(text, int) and not isinstance(text, bool):
        num_bytes = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(
                f"{what}: {text!r} is not a size", hint='write a number and a unit, such as "3GiB" or "500MB"'
            )
        num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes <= 0:
        raise ConfigError(f"{what}: {text!r} is not positive", hint='write a size such as "3GiB"')
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` with a binary unit and about three digits.

    >>> format_bytes(3 * 2**30)
    '3.00 GiB'
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            value = num_bytes / size
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{int(num_bytes)} B"


OneDisk: TypeAlias = str | Path | tuple[str | Path, str | int]
Disk: TypeAlias = OneDisk | list[OneDisk]
"""A folder, optionally with a size; or several on different drives, which are used side by side."""


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """A folder that may hold state, and how much of it (`None`: what is free)."""

    folder: Path
    num_bytes: int | None = None

    @classmethod
    def parse(cls, value: OneDisk) -> DiskBudget:
        """`"/nvme/scratch"`, `"/nvme/scratch:200GiB"` or `("/nvme/scratch", "200GiB")`.

        A folder that exists as it stands is never divided at a colon.
        """
        if isinstance(value, tuple):
            return cls(Path(value[0]), parse_bytes(value[1], "disk"))
        text = str(value)
        folder, colon, size = text.rpartition(":")
        has_size = colon and folder and re.fullmatch(r"\s*\d[\d.]*\s*[A-Za-z]*\s*", size)
        if has_size and not Path(text).is_dir():
            return cls(Path(folder), parse_bytes(size, "disk"))
        return cls(Path(text))

    @classmethod
    def parse_all(cls, value: Disk) -> tuple[DiskBudget, ...]:
        """As `parse`, of a list or of `"/nvme0,/nvme1:200GiB"`. Raises ConfigError where a folder is named twice."""
        if isinstance(value, str) and "," in value and not Path(value).is_dir():
            value = list(value.split(","))
        disks = tuple(cls.parse(each) for each in (value if isinstance(value, list) else [value]))
        folders = [disk.folder.resolve() for disk in disks]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None or not disks:
            raise ConfigError(
                f"disk: {twice} is named twice" if twice else "disk: no folder is named",
                hint='name folders on different drives, such as disk=["/nvme0", "/nvme1"]',
            )
        return disks


@dataclass(frozen=True, slots=True)
class Pins:
    """Decisions taken from the planner; whatever stays `None` is planned.

    Pins(weight_slots=2)    how many blocks' weights may be in memory at once, beside the resident ones
    Pins(tile_rows=4)       rows of a batch that a block computes at once
    Pins(resident_bytes=0)  memory, where blocks compute, used to keep planes that would otherwise move
    Pins(resident=(12, 24, 0))  of how many blocks weights, gradients and state stay in memory (without a device)
    Pins(gradient_slots=1)  how many blocks' fp32 gradients may be in memory at once
    Pins(inputs="disk")     where inputs of blocks wait for their backward: "device" (where blocks compute), "host", "disk"
    Pins(kept_blocks=2)     how many layers, the last first, keep their activations, and their weights, for the backward
    Pins(verify=True)       check the checksum of every read from the disk tier
    """

    weight_slots: int | None = None
    gradient_slots: int | None = None
    tile_rows: int | None = None
    resident_bytes: int | None = None
    resident: tuple[int, int, int] | None = None
    inputs: str | None = None
    kept_blocks: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if self.inputs is not None and self.inputs not in HOME_CHOICES:
            raise ConfigError(f"Pins(inputs={self.inputs!r})", hint=f"one of {', '.join(HOME_CHOICES)}")
        resident = self.resident
        if resident is not None and not (
            isinstance(resident, tuple)
            and len(resident) == 3
            and all(isinstance(each, int) and each >= 0 for each in resident)
        ):
            raise ConfigError(
                f"Pins(resident={resident!r}): expected three numbers of blocks",
                hint="resident=(12, 24, 0): weights of 12 blocks and gradients of 24, or leave it to the planner",
            )
        for name, least in (
            ("weight_slots", 1),
            ("gradient_slots", 1),
            ("tile_rows", 1),
            ("resident_bytes", 0),
            ("kept_blocks", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(
                    f"Pins({name}={value!r}): expected a whole number of at least {least}",
                    hint=f"{name}={least} or more, or leave it to the planner",
                )


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a run may use: `host` is a ceiling on the whole process, `disks` folders; `None` is measured."""

    host_bytes: int | None = None
    device_bytes: int | None = None
    disks: tuple[DiskBudget, ...] = ()

    @classmethod
    def parse(cls, device: str | int | None, host: str | int | None, disk: Disk | None) -> Budgets:
        """Read the three arguments of `outsize.load`; raises ConfigError naming the one that is malformed."""
        return cls(
            host_bytes=None if host is None else parse_bytes(host, "host"),
            device_bytes=None if device is None else parse_bytes(device, "device"),
            disks=() if disk is None else DiskBudget.parse_all(disk),
        )

    def check_folders(self) -> None:
        """Raise ConfigError naming a folder that is not there."""
        for disk in self.disks:
            if not disk.folder.is_dir():
                raise ConfigError(
                    f"disk: no folder {disk.folder}", hint="create it on an SSD, or name another"
                )


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, resolved."""

    budgets: Budgets
    home: Home | None
    compute_type: ComputeType
    pins: Pins
    commits: int = 0
    """How many are kept, where any are."""
    on_device_full: OnDeviceFull = OnDeviceFull.ERROR
    compile: bool | None = None
    """Whether layers that are alike are compiled; None: as the run did that is resumed, or else not."""


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: `$OUTSIZE_CACHE`, or `~/.cache/outsize`."""
    return Path(os.environ.get("OUTSIZE_CACHE") or Path.home() / ".cache" / "outsize")


def cache_limit() -> int:
    """The most that packed weights may take in the cache folder: `$OUTSIZE_CACHE_LIMIT`, or 50 GiB; 0 keeps none.

    Raises ConfigError where that is not a size.
    """
    text = os.environ.get("OUTSIZE_CACHE_LIMIT") or "50GiB"
    return 0 if text.strip() == "0" else parse_bytes(text, "OUTSIZE_CACHE_LIMIT")
