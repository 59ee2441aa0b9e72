"""The memory of the process: how much it has and may take, and when malloc returns it."""

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
"""Kernels for products of different shapes; a step of a dense model needs about 40. 64 of them take 34 MiB."""

SPREAD = 1.5
"""Bytes that malloc takes per byte of tensors: measured at 1.45 to 1.6 for blocks of 5 to 50 M parameters."""

_highest_on_device: dict[torch.device, int] = {}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


def peak_bytes() -> int:
    """The peak of the resident memory of this process."""
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
    """Let malloc keep freed memory of any size for reuse (glibc only; elsewhere nothing happens).

    A visit allocates what the one before it freed. By default glibc maps and unmaps each large tensor, and the kernel finds
    and clears its pages each time: measured at 20 GB of pages and a quarter of a training step. Memory that is kept
    counts as used until `give_back`, which a `Ceiling` calls.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def bound_kernel_caches() -> None:
    """Cache at most KERNELS compiled kernels; must be called before the first product in bf16.

    oneDNN compiles a kernel for each new shape and caches 1,024, as does torch: with batches of many lengths these were
    measured to take 700 MiB. Environment variables that are set already stay as they are.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


_arenas: WeakKeyDictionary[HostArena, str] = WeakKeyDictionary()


def register(arena: HostArena, model: str) -> None:
    """Register `arena` as memory of an open model of class `model`."""
    _arenas[arena] = model


def open_models() -> list[tuple[str, int]]:
    """Open models with the bytes of their arenas in host memory, the largest first."""
    held = [(model, arena.in_use_bytes) for arena, model in _arenas.items()]
    return sorted((each for each in held if each[1]), key=lambda each: -each[1])


def give_back() -> None:
    """Return freed memory to the system (glibc only)."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def drop_file_pages() -> None:
    """Unmap pages of libraries, once per process: importing touches some 100 MiB of them, which count as its memory.

    The system keeps them in its page cache, and maps those again that are used (a third, measured). Only pages that are
    mapped read-only and unchanged are dropped.
    """
    libc = _glibc()
    if libc is None:
        return
    for address, num_bytes in _unchanged_mappings(Path("/proc/self/smaps")):
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED)


def _unchanged_mappings(smaps: Path) -> Iterator[tuple[int, int]]:
    """`(address, bytes)` of private, read-only file mappings of which no page was written, relocated or patched."""
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
    """The peak of the memory of tensors on `device`; 0 for the host."""
    if device.type != "cuda":
        return 0
    return max(_highest_on_device.get(device, 0), torch.cuda.max_memory_allocated(device))


def watched(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result of `run()`, and the peak of the bytes of its tensors.

    On a GPU the peak is measured, elsewhere counted: the memory of a process differs by half between equal runs, and a plan
    must not.
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
    """A limit for the memory of the process: freed memory is given back before it would be exceeded.

    `expected_bytes` is lower if the limit leaves more room than is needed: fragments of freed memory are given back once
    the process exceeds it, so that it does not grow from step to step.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = self.expected_bytes = limit_bytes
        self.num_times = 0
        """How often memory was given back; each time costs finding and clearing its pages again."""

    def make_room(self, num_bytes: int) -> None:
        """Call before up to `num_bytes` are allocated, of freed or of new memory."""
        now = resident_bytes()
        if now + num_bytes > self.limit_bytes or now > self.expected_bytes:
            give_back()
            self.num_times += 1


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
