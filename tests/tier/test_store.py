import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.errors import ConfigError, StorageError, StorageFullError
from outsize.files import open_file
from outsize.tier import store
from outsize.tier.store import StoreFile

NAME = "outsize.store"


def test_space_is_reserved_and_given_back(disk_folder: Path):
    file = StoreFile(disk_folder, NAME, 1 << 20)
    info = os.stat(file.path)
    assert info.st_size == 1 << 20
    assert info.st_blocks * 512 >= 1 << 20
    file.close()
    file.close()
    assert not list(disk_folder.iterdir())


def test_a_missing_folder_and_a_file_in_its_place(disk_folder: Path):
    with pytest.raises(ConfigError, match="does not exist\nhint:"):
        StoreFile(disk_folder / "missing", NAME, 4096)
    (disk_folder / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder\nhint:"):
        StoreFile(disk_folder / "file", NAME, 4096)


def test_a_folder_in_memory_is_refused(disk_folder: Path, monkeypatch):
    monkeypatch.setattr(store, "is_memory_backed", lambda folder: True)
    with pytest.raises(ConfigError, match=r"tmpfs or ramfs.*\nhint:"):
        StoreFile(disk_folder, NAME, 4096)
    assert not list(disk_folder.iterdir())


def test_a_folder_that_may_not_be_written(disk_folder: Path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.raises(ConfigError, match=r"not writable: Read-only.*\nhint:"):
        StoreFile(disk_folder, NAME, 4096)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_folder_and_numbers_and_leaves_nothing(disk_folder: Path, monkeypatch, code: int):
    def refuse(fd, offset, num_bytes):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.os, "posix_fallocate", refuse)
    with pytest.raises(
        StorageFullError, match=r"needs 8192 bytes \(8.00 KiB\), \d+ bytes .* are free\nhint:"
    ) as caught:
        StoreFile(disk_folder, NAME, 8192)
    assert str(disk_folder) in str(caught.value)
    assert not list(disk_folder.iterdir())


def test_a_store_larger_than_the_disk_is_refused_for_real(disk_folder: Path):
    info = os.statvfs(disk_folder)
    with pytest.raises(StorageError):
        StoreFile(disk_folder, NAME, (info.f_blocks * info.f_frsize // 4096 + 1) * 4096)
    assert not list(disk_folder.iterdir())


def test_a_second_process_is_told_who_has_it(disk_folder: Path):
    file = StoreFile(disk_folder, NAME, 4096)
    code = (
        "import sys; from pathlib import Path; from outsize.tier.store import StoreFile\n"
        "StoreFile(Path(sys.argv[1]), sys.argv[2], 4096)"
    )
    command = [sys.executable, "-c", code, str(disk_folder), NAME]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{file.path}: the store is in use by process {os.getpid()}" in done.stderr
    with pytest.raises(StorageError, match="in use"):
        StoreFile(disk_folder, NAME, 4096)
    assert file.path.exists()
    file.close()


def test_a_file_left_by_a_killed_process_is_taken_over(disk_folder: Path):
    (disk_folder / NAME).write_bytes(b"left over" * 10_000)
    file = StoreFile(disk_folder, NAME, 4096)
    assert file.path.read_bytes() == bytes(4096)
    file.close()


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(disk_folder: Path, monkeypatch):
    path = disk_folder / NAME
    real = fcntl.flock
    calls = []

    def remove_first(fd, operation):
        real(fd, operation)
        if not calls:
            path.unlink()
        calls.append(fd)

    monkeypatch.setattr(store.fcntl, "flock", remove_first)
    file = StoreFile(disk_folder, NAME, 4096)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(file.data.descriptor), os.stat(path))
    file.close()


def test_a_link_in_the_place_of_the_store_is_not_followed(disk_folder: Path):
    precious = disk_folder / "precious"
    precious.write_text("keep")
    (disk_folder / NAME).symlink_to(precious)
    with pytest.raises(StorageError, match="cannot be opened"):
        StoreFile(disk_folder, NAME, 4096)
    assert precious.read_text() == "keep"


@pytest.mark.parametrize("alignment", [0, 65536])
def test_where_direct_io_is_refused_it_warns(disk_folder: Path, monkeypatch, alignment: int):
    monkeypatch.setattr(open_file, "direct_alignment", lambda path: alignment)
    with pytest.warns(RuntimeWarning, match="direct I/O"):
        file = StoreFile(disk_folder, NAME, 4096)
    assert not file.data.is_direct
    file.close()


def test_where_open_refuses_direct_io_it_warns(disk_folder: Path, monkeypatch):
    real = os.open

    def refuse_direct(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(store.os, "open", refuse_direct)
    with pytest.warns(RuntimeWarning, match="direct I/O"):
        file = StoreFile(disk_folder, NAME, 4096)
    assert not file.data.is_direct
    file.close()
