"""Host memory: an arena that hands out page-aligned regions and never exceeds its limit.

Each region is an anonymous mapping of its own, so that giving it back gives it back to the operating system,
which malloc and torch's allocators do not promise. A region's pages are taken when it is allocated, so that what the
system cannot give is missing at the start and not in the middle of a step.
"""

from __future__ import annotations

import errno
import mmap
import threading
import weakref
from typing import Protocol

import torch

from outsize.block import align
from outsize.config import format_bytes
from outsize.errors import BudgetError

HUGE_PAGE_BYTES = 2 << 20
"""Regions of at least this size ask for transparent huge pages: fewer faults, fewer pages to pin."""

_MADV_POPULATE_WRITE = 23


class Pinner(Protocol):
    """What makes host memory fit for copies that nobody waits for (a device)."""

    def pin(self, address: int, num_bytes: int, name: str) -> None:
        """Pin these pages."""

    def unpin(self, address: int) -> None:
        """Undo `pin`, when nothing copies there any more."""


class Region:
    """Page-aligned host memory of an arena; made by `HostArena.allocate`, reads as zero at first."""

    def __init__(self, arena: HostArena, name: str, memory: mmap.mmap) -> None:
        self.name = name
        self.num_bytes = len(memory)
        # A cycle would keep the memory of a dropped model until the collector comes by.
        self._arena = weakref.ref(arena)
        self._memory: mmap.mmap | None = memory
        self._unpin: weakref.finalize[..., Region] | None = None

    def pin(self, pinner: Pinner) -> None:
        """Pin all pages; undone when the region is freed or, at the latest, when it is dropped.

        Pages that are unmapped while they are pinned could never be pinned again under the same address.
        """
        address = self.tensor(torch.uint8, self.num_bytes).data_ptr()
        pinner.pin(address, self.num_bytes, self.name)
        self._unpin = weakref.finalize(self, _unpin, pinner, address, self._live())
        self._unpin.atexit = False

    @property
    def is_free(self) -> bool:
        """Whether the region was given back."""
        return self._memory is None

    @property
    def buffer(self) -> memoryview:
        """All bytes of the region, writable, without a copy."""
        return memoryview(self._live())

    def tensor(self, dtype: torch.dtype, num_elements: int, byte_offset: int = 0) -> torch.Tensor:
        """A one-dimensional tensor of `num_elements` from `byte_offset` that shares the region's bytes."""
        end = byte_offset + num_elements * dtype.itemsize
        assert byte_offset >= 0 and num_elements >= 0 and end <= self.num_bytes, (
            f"{self.name}: bytes {byte_offset} to {end} lie outside a region of {self.num_bytes}"
        )
        assert byte_offset % dtype.itemsize == 0, (
            f"{self.name}: byte {byte_offset} is not aligned for {dtype}"
        )
        memory = self._live()
        if num_elements == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=byte_offset)

    def free(self) -> None:
        """Give the memory back to the operating system and the books, at once.

        Views and tensors made from the region must not be used any more; one that is still alive reads zeros.
        Freeing twice is an AssertionError.
        """
        memory = self._live()
        if self._unpin is not None:
            self._unpin()
        self._memory = None
        if (arena := self._arena()) is not None:
            arena._forget(self)
        # The mapping lives as long as a view of it does, and cannot be unmapped before. Its pages can go.
        memory.madvise(mmap.MADV_DONTNEED)

    def _live(self) -> mmap.mmap:
        assert self._memory is not None, f"{self.name}: the region was freed"
        return self._memory


def _advise(memory: mmap.mmap, advice: int, name: str) -> None:
    """Give advice that the kernel may not know. Raises BudgetError where it knows it and has no memory to follow it."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return
        raise BudgetError(
            f"host memory: {name} needs {len(memory)} bytes ({format_bytes(len(memory))}), "
            f"which the system cannot provide: {error.strerror}",
            hint="lower the host budget, or end what else takes memory (a container may have a limit of its own)",
        ) from error


def _unpin(pinner: Pinner, address: int, memory: mmap.mmap) -> None:
    """Unpin pages that are still mapped: `memory` keeps them so until here."""
    pinner.unpin(address)


class HostArena:
    """At most `limit_bytes` of host memory, with books of who holds what; all of it pinned where there is a `pinner`."""

    def __init__(self, limit_bytes: int, pinner: Pinner | None = None) -> None:
        assert limit_bytes >= 0, limit_bytes
        self.limit_bytes = limit_bytes
        self.pinner = pinner
        self._lock = threading.Lock()
        self._regions: dict[int, Region] = {}
        self._in_use_bytes = 0
        self._high_water_bytes = 0

    @property
    def in_use_bytes(self) -> int:
        """Bytes of all regions that are not freed."""
        return self._in_use_bytes

    @property
    def high_water_bytes(self) -> int:
        """The most bytes that were ever in use at once."""
        return self._high_water_bytes

    def allocate(self, num_bytes: int, name: str) -> Region:
        """A region of `num_bytes` rounded up to whole pages, zero, counted until it is freed.

        Raises BudgetError where it would exceed the limit, or where the operating system has no such room.
        """
        assert num_bytes > 0, f"{name}: {num_bytes} bytes"
        size = align(num_bytes)
        with self._lock:
            if self._in_use_bytes + size > self.limit_bytes:
                least = self._in_use_bytes + size
                raise BudgetError(
                    f"host memory: {name} needs {size} bytes ({format_bytes(size)}), but "
                    f"{self._in_use_bytes} of the {self.limit_bytes} bytes allowed "
                    f"({format_bytes(self.limit_bytes)}) are in use",
                    hint=f"allow at least {least} bytes ({format_bytes(least)})",
                )
            try:
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError) as error:
                raise BudgetError(
                    f"host memory: {name} needs {size} bytes ({format_bytes(size)}), "
                    f"which the system refuses: {error}",
                    hint="lower the host budget, or raise the limit of this process (ulimit -v, overcommit)",
                ) from error
            if size >= HUGE_PAGE_BYTES:
                # Unknown where the kernel has no transparent huge pages; small pages do as well.
                _advise(memory, mmap.MADV_HUGEPAGE, name)
            # Unknown to kernels before 5.14, which take pages when they are first touched.
            _advise(memory, _MADV_POPULATE_WRITE, name)
            region = Region(self, name, memory)
            if self.pinner is not None:
                region.pin(self.pinner)
            self._regions[id(region)] = region
            self._in_use_bytes += size
            self._high_water_bytes = max(self._high_water_bytes, self._in_use_bytes)
        return region

    def check_books(self, expected_bytes: int = 0) -> None:
        """Raise AssertionError, listing what is allocated, unless exactly `expected_bytes` are in use."""
        with self._lock:
            held = [(region.name, region.num_bytes) for region in self._regions.values()]
            total = sum(num_bytes for _, num_bytes in held)
            assert total == self._in_use_bytes, (
                f"the books say {self._in_use_bytes} bytes, the regions {total}"
            )
            assert total == expected_bytes, (
                f"{total} bytes are in use, expected {expected_bytes}: "
                + ", ".join(f"{name} ({num_bytes})" for name, num_bytes in held)
            )

    def _forget(self, region: Region) -> None:
        with self._lock:
            del self._regions[id(region)]
            self._in_use_bytes -= region.num_bytes
