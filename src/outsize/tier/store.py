"""The file behind a disk tier: preallocated, direct, owned by one process.

A scratch file is gone when closed: it holds nothing that must outlive the process. A kept one stays, with what it
holds, and may grow. The lock (flock) goes with the process, so a file left behind by a killed one is simply taken over,
and never leaks twice.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from outsize.block import ALIGNMENT, Extent
from outsize.config import format_bytes
from outsize.errors import ConfigError, StorageError, StorageFullError
from outsize.files import FULL_ERRNOS, OpenFile, is_memory_backed

_PUNCH_HOLE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE, which wants FALLOC_FL_KEEP_SIZE."""


class StoreFile:
    """`num_bytes` of disk space under one descriptor, locked against other processes.

    An `anonymous` file has no name once it is open: its space goes with the process, however that ends. One that
    `is_kept` keeps what an earlier process wrote, and what this one writes.

    Raises ConfigError where `folder` cannot hold a store, StorageFullError where it has no room, StorageError
    where the store is in use or the file system refuses.
    """

    def __init__(
        self, folder: Path, name: str, num_bytes: int, *, anonymous: bool = False, is_kept: bool = False
    ) -> None:
        assert not (anonymous and is_kept), name
        assert os.sep not in name and num_bytes > 0 and num_bytes % ALIGNMENT == 0, (name, num_bytes)
        _check_folder(folder)
        self.path = folder / name
        self.num_bytes = num_bytes
        self.is_open = True
        self._is_kept = is_kept
        self._lock_fd = _open_locked(self.path)
        kept_bytes = os.fstat(self._lock_fd).st_size if is_kept else 0
        try:
            _preallocate(self._lock_fd, folder, kept_bytes, num_bytes)
            self.data = _open_data(self.path)
            if anonymous:
                self.path.unlink()
        except BaseException:
            if not kept_bytes:
                self.path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Give the file back, and remove it unless it is kept; closing twice is allowed."""
        if self.is_open:
            self.is_open = False
            if not self._is_kept:
                self.path.unlink(missing_ok=True)
            self.data.close()
            os.close(self._lock_fd)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"disk folder {folder} {what}", hint="pass an existing folder on a local disk")
    if is_memory_backed(folder):
        raise ConfigError(
            f"disk folder {folder} is on tmpfs or ramfs: its files take up memory",
            hint="pass a folder on an NVMe or other local disk, such as one under /var/tmp",
        )


def lock_file(path: Path) -> int:
    """Make `path` this process's until the descriptor that is returned is closed.

    Raises StorageError naming the process that has it; the lock of one that is dead is nobody's.
    """
    return _open_locked(path)


def _open_locked(path: Path) -> int:
    """A locked descriptor of the file at `path`, created where missing."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise ConfigError(
                    f"disk folder {path.parent} is not writable: {error.strerror}",
                    hint="pass a folder that this user may write to",
                ) from error
            if error.errno in FULL_ERRNOS:
                raise StorageFullError(
                    f"disk folder {path.parent} has no room for another file: {error.strerror}",
                    hint="free space or inodes there, or pass another folder",
                ) from error
            raise StorageError(
                f"{path}: the store cannot be opened: {error.strerror}", hint="pass a folder you may write to"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError(f"{path}: not a regular file", hint="remove it, or pass another folder")
            if _lock(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path) -> bool:
    """Lock `fd`; False where its owner removed the file in the meantime, so that the lock is on nothing."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = _lock_owner(os.fstat(fd).st_ino)
        raise StorageError(
            f"{path}: the store is in use by " + ("another process" if owner is None else f"process {owner}"),
            hint="delete the model that has it"
            if owner == os.getpid()
            else "pass another folder, or wait for that process to end",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{path}: the store cannot be locked: {error.strerror}", hint="pass a folder on a local disk"
        ) from error
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _lock_owner(inode: int) -> int | None:
    """Process that holds a lock on `inode`, from /proc/locks; None where that cannot be known."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if (
            len(fields) == 8
            and fields[1] == "FLOCK"
            and fields[5].endswith(f":{inode}")
            and int(fields[4]) > 0
        ):
            return int(fields[4])
    return None


def _preallocate(fd: int, folder: Path, kept_bytes: int, num_bytes: int) -> None:
    """Reserve what comes after the first `kept_bytes`; a file that is longer is cut."""
    try:
        os.ftruncate(fd, min(kept_bytes, num_bytes))
        if num_bytes > kept_bytes:
            os.posix_fallocate(fd, kept_bytes, num_bytes - kept_bytes)
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise StorageError(
                f"{folder}: {format_bytes(num_bytes)} cannot be reserved: {error.strerror}",
                hint="pass a folder on another disk",
            ) from error
        os.ftruncate(fd, kept_bytes)
        info = os.statvfs(folder)
        free_bytes, more_bytes = info.f_bavail * info.f_frsize, num_bytes - kept_bytes
        raise StorageFullError(
            f"disk folder {folder}: the store needs {more_bytes} bytes ({format_bytes(more_bytes)}), "
            f"{free_bytes} bytes ({format_bytes(free_bytes)}) are free",
            hint=f"free space there, or pass a folder with {format_bytes(more_bytes)} free",
        ) from error


def _open_data(path: Path) -> OpenFile:
    """The file for transfers; warns where they go through the page cache."""
    try:
        data = OpenFile.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise StorageError(
            f"{path}: the store cannot be opened: {error.strerror}", hint="pass a folder you may write to"
        ) from error
    if not data.is_direct:
        warnings.warn(
            f"{path.parent}: direct I/O in units of {ALIGNMENT} bytes is refused: transfers go through the "
            "page cache, slower, and with memory that counts against the machine",
            RuntimeWarning,
            stacklevel=4,
        )
    return data


def reserve(fd: int, num_bytes: int) -> bool:
    """Take `num_bytes` of the disk for the file `fd`; False where its file system cannot. Raises OSError where it is full.

    Unlike posix_fallocate it never falls back to writing every block, which takes minutes on a network drive.
    """
    if _libc().fallocate(fd, 0, 0, num_bytes) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        return False
    raise OSError(number, os.strerror(number))


def give_space_back(path: Path, extents: Iterable[Extent]) -> None:
    """Make holes in the file at `path`: their bytes are zero from now on, and take no space where the system can."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for extent in extents:
            _libc().fallocate(
                fd, _PUNCH_HOLE, extent.offset, extent.num_bytes
            )  # space stays taken where refused
    finally:
        os.close(fd)


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return library
