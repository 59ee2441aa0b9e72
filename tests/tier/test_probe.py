from pathlib import Path

import pytest

from outsize.block import ALIGNMENT
from outsize.tier.probe import direct_alignment, is_memory_backed


def test_shared_memory_is_memory_and_a_disk_is_not(disk_folder: Path):
    assert not is_memory_backed(disk_folder)
    mounts = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    if mounts.get("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is not on tmpfs")
    assert is_memory_backed(Path("/dev/shm"))


def test_what_cannot_be_asked_gets_the_harmless_answer(tmp_path: Path):
    assert not is_memory_backed(tmp_path / "missing")
    assert direct_alignment(tmp_path / "missing") == ALIGNMENT


def test_alignment_is_a_power_of_two_or_none(disk_folder: Path):
    path = disk_folder / "file"
    path.touch()
    alignment = direct_alignment(path)
    assert alignment & (alignment - 1) == 0
