"""The process's memory: what it has, what it may take, and how malloc gives it back."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from outsize.store import cgroup
from outsize.store.live_bytes import LiveBytes
from outsize.tier import HostArena

Result = TypeVar("Result")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

KERNELS = 64
"""Products of different shapes; a step of a dense model has about 40. 64 of them take 34 MiB."""

SPREAD = 1.5
"""What malloc takes for tensors of a byte: measured at 1.45 to 1.6 for visits of blocks of 5 to 50 M parameters."""

_highest_on_device: dict[torch.device, int] = {}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


def peak_bytes() -> int:
    """The most memory this process ever had."""
    return _status("VmHWM:")


def available_bytes() -> int:
    """Memory that this process can still take: what the system has free, within the limits of its control groups."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limited = cgroup.available_bytes()
    return free if limited is None else min(free, limited)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, of any size, to hand it out again (glibc only; elsewhere nothing happens).

    A visit allocates what the one before it freed. By default glibc maps each large tensor anew, and the kernel finds
    and clears its pages each time: measured at 20 GB of pages and a quarter of a training step. What is kept counts
    as taken until `give_back`, so keeping goes with a ceiling that asks for it (`Ceiling`).
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def bound_kernel_caches() -> None:
    """Keep at most KERNELS compiled products per cache; works until the first product in bf16 is computed.

    oneDNN compiles a product for each new shape and keeps 1,024, as does torch: batches of many lengths were measured to
    take 700 MiB that way. A user's own settings are left alone.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


_arenas: WeakKeyDictionary[HostArena, str] = WeakKeyDictionary()


def register(arena: HostArena, model: str) -> None:
    """Note that `arena` holds memory of an open `model`, by the name of its class."""
    _arenas[arena] = model


def open_models() -> list[tuple[str, int]]:
    """Models that hold memory of the host, the largest first, and the bytes of their arenas."""
    held = [(model, arena.in_use_bytes) for arena, model in _arenas.items()]
    return sorted((each for each in held if each[1]), key=lambda each: -each[1])


def give_back() -> None:
    """Return freed memory to the system (glibc only)."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def drop_file_pages() -> None:
    """Let go of pages of libraries that are mapped and unused, once per process: importing touches some 100 MiB of them.

    They count as memory of the process. The system keeps them in its page cache, and gives those back that are used again
    (a third, measured). Only what is mapped read-only and is unchanged since it was mapped can be dropped.
    """
    libc = _glibc()
    if libc is None:
        return
    for address, num_bytes in _unchanged_mappings(Path("/proc/self/smaps")):
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED)


def _unchanged_mappings(smaps: Path) -> Iterator[tuple[int, int]]:
    """`(address, bytes)` of private, read-only mappings of files of which no page was written, relocated or patched."""
    address = num_bytes = 0
    is_file = False
    for line in smaps.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, _, stop = first.partition("-")
            address, num_bytes = int(start, 16), int(stop, 16) - int(start, 16)
            permissions, _, _, inode = rest.split()[:4]
            is_file = inode != "0" and "w" not in permissions and permissions.endswith("p")
        elif first == "Anonymous:" and is_file and rest.split()[0] == "0":
            yield address, num_bytes


def device_peak_bytes(device: torch.device) -> int:
    """The most memory that tensors ever took beside `device`; 0 where that is the host's."""
    if device.type != "cuda":
        return 0
    return max(_highest_on_device.get(device, 0), torch.cuda.max_memory_allocated(device))


def watched(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `run()` gives, and how many bytes its tensors took at most.

    On a GPU that is measured, elsewhere counted: what a process takes for the same run differs by a half from one time to
    the next, and a plan should not.
    """
    if device.type == "cuda":
        _highest_on_device[device] = device_peak_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, max(0, torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as counted:
        result = run()
    return result, int(counted.peak * (SPREAD if device.type == "cpu" else 1.0))


class Ceiling:
    """The most that the process may take; freed memory is given back where it would otherwise be exceeded.

    `expected_bytes` is less where there is more room than is needed: freed memory that fits into nothing is given back
    when the process has passed that, so that it does not grow from step to step.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = self.expected_bytes = limit_bytes
        self.num_times = 0
        """How often memory was given back: each time, its pages are found and cleared again."""

    def make_room(self, num_bytes: int) -> None:
        """Called before something that takes up to `num_bytes`, of freed memory or of new."""
        now = resident_bytes()
        if now + num_bytes > self.limit_bytes or now > self.expected_bytes:
            give_back()
            self.num_times += 1


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
