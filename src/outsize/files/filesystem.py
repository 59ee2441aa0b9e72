"""What a file system says of itself, from statfs(2) and statx(2), which Python does not expose.

Needed because tmpfs accepts O_DIRECT and a "disk" tier on it would eat the memory it is there to save. An
overlay whose upper layer is in memory is not recognised. Where a figure cannot be had, the answer is the
harmless one.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

from outsize.block import ALIGNMENT

_TMPFS_MAGIC = 0x01021994
_RAMFS_MAGIC = 0x858458F6

_AT_FDCWD = -100
_STATX_DIOALIGN = 0x2000
_STATX_DIO_OFFSET_ALIGN_AT = 0x9C
"""Byte of `stx_dio_offset_align` in `struct statx`; the mask filled in is the first word."""


def is_memory_backed(folder: Path) -> bool:
    """Whether `folder` lies on tmpfs or ramfs; False where statfs fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = ctypes.create_string_buffer(256)
    if not hasattr(libc, "statfs") or libc.statfs(os.fsencode(folder), result) != 0:
        return False
    kind = int.from_bytes(result.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return kind & 0xFFFFFFFF in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def direct_alignment(path: Path) -> int:
    """Bytes that offsets of direct I/O on `path` must be multiples of.

    0 where the file system says it has no direct I/O; `ALIGNMENT` where the kernel or the C library cannot
    tell (statx reports it since Linux 6.1).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = ctypes.create_string_buffer(256)
    if not hasattr(libc, "statx"):
        return ALIGNMENT
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, result) != 0:
        return ALIGNMENT
    (filled,) = struct.unpack_from("=I", result)
    if not filled & _STATX_DIOALIGN:
        return ALIGNMENT
    (alignment,) = struct.unpack_from("=I", result, _STATX_DIO_OFFSET_ALIGN_AT)
    return int(alignment)
