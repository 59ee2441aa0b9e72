import mmap
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from outsize.block import ALIGNMENT
from outsize.files import direct_alignment, filesystem, is_memory_backed


def test_shared_memory_is_memory_and_a_disk_is_not(disk_folder: Path):
    assert not is_memory_backed(disk_folder)
    mounts = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    if mounts.get("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is not on tmpfs")
    assert is_memory_backed(Path("/dev/shm"))


def test_what_cannot_be_asked_gets_the_harmless_answer(tmp_path: Path):
    assert not is_memory_backed(tmp_path / "missing")
    assert direct_alignment(tmp_path / "missing") == ALIGNMENT


def test_direct_io_works_at_the_alignment_that_is_said(disk_folder: Path):
    path = disk_folder / "file"
    path.write_bytes(bytes(1 << 16))
    alignment = direct_alignment(path)
    if not alignment:
        pytest.skip("no direct I/O here")
    assert alignment & (alignment - 1) == 0
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, 1 << 14)
        assert os.preadv(fd, [memoryview(page)[: max(alignment, ALIGNMENT)]], alignment)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("mask", "aligned", "status", "expected"),
    [
        (0x2FFF, 512, 0, 512),
        (0x2000, 4096, 0, 4096),
        (0x2FFF, 0, 0, 0),
        (0x0FFF, 512, 0, ALIGNMENT),
        (0x2FFF, 512, -1, ALIGNMENT),
    ],
)
def test_alignment_is_what_statx_says(mask, aligned, status, expected, monkeypatch):
    """By the layout of `struct statx` in linux/stat.h: the mask first, the alignment of offsets at byte 156."""

    def statx(folder, path, flags, wanted, result):
        assert (folder, path, flags, wanted) == (-100, b"/a/file", 0, 0x2000)
        result[0:4], result[152:156], result[156:160] = (struct.pack("=I", n) for n in (mask, 8, aligned))
        return status

    monkeypatch.setattr(filesystem.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(statx=statx))
    assert direct_alignment(Path("/a/file")) == expected
