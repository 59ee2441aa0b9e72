"""Which machine this is: what a measured profile holds for, and what it no longer holds for."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from outsize.config import format_bytes
from outsize.errors import ConfigError
from outsize.store import cgroup


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine_bytes() -> int:
    """Memory of the machine, whatever this process may take of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes() -> int:
    """Memory that this process may take at most: the machine's, or the limit of its container or job where that is less."""
    limit = cgroup.limit_bytes()
    return machine_bytes() if limit is None else min(machine_bytes(), limit)


def package_version() -> str:
    """The version of this package; empty where it is not installed."""
    try:
        return metadata.version("outsize")
    except metadata.PackageNotFoundError:
        return ""


def disk_number(folder: Path) -> str:
    """`major-minor` of the device that `folder` lies on. Raises ConfigError where there is no such folder."""
    try:
        number = os.stat(folder).st_dev
    except OSError as error:
        raise ConfigError(
            f"disk folder {folder}: {error.strerror}", hint="pass an existing folder on a local disk"
        ) from error
    return f"{os.major(number)}-{os.minor(number)}"


def machine_text() -> str:
    """Processor, cores, memory and accelerator: what stays when packages are upgraded, and from job to job."""
    parts = [cpu_model(), f"{num_cores()} cores", format_bytes(machine_bytes())]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def machine_key() -> str:
    """A short name of `machine_text` for files."""
    return hashlib.sha256(machine_text().encode()).hexdigest()[:12]


def identity(folder: Path) -> str:
    """All that the figures depend on: the machine, versions, and the disk of `folder`. Raises ConfigError."""
    return f"{machine_text()}, torch {torch.__version__}, outsize {package_version()}, disk {disk_number(folder)}"
