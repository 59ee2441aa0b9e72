"""A file that is open: the holder has its bytes, and learns what became of it."""

import errno
import os

import pytest

from outsize.block import ALIGNMENT
from outsize.errors import FileChangedError, StorageError, UsageError
from outsize.files import OpenFile, open_file
from tests.tier.helpers import pages

SIZE = 3 * ALIGNMENT + 100
DATA = bytes(pages(4 * ALIGNMENT, 1))[:SIZE]


@pytest.fixture
def path(disk_folder):
    (disk_folder / "file").write_bytes(DATA)
    return disk_folder / "file"


def content(file):
    data = bytearray(SIZE)
    file.read_once(0, memoryview(data), "all")
    return bytes(data)


def removed(path):
    path.unlink()


def moved(path):
    path.rename(path.with_name("elsewhere"))


def folder_renamed(path):
    (path.parent / "sub").mkdir()
    path.rename(path.parent / "sub" / "file")


def replaced(path):
    path.with_name("other").write_bytes(DATA[::-1])
    path.with_name("other").rename(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed, "file was removed or moved since it was opened: No such file"),
        (moved, "file was removed or moved"),
        (folder_renamed, "file was removed or moved"),
        (replaced, "file was replaced by another file since it was opened"),
    ],
)
def test_a_name_that_is_lost_is_told_and_the_bytes_stay(change, said, path):
    file = OpenFile.open(path)
    file.check()
    change(path)
    assert content(file) == DATA
    file.check_contents()
    with pytest.raises(FileChangedError, match=said) as caught:
        file.check()
    assert str(path) in str(caught.value) and caught.value.hint


def cut_short(path):
    os.truncate(path, 100)


def rewritten(path):
    """With as many bytes."""
    with path.open("r+b") as stream:
        stream.write(DATA[::-1])


def appended(path):
    with path.open("ab") as stream:
        stream.write(b"x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut_short, f"file was cut short since it was opened: 100 bytes, {SIZE} before"),
        (rewritten, "file was written to since it was opened"),
        (appended, "file was written to since it was opened"),
    ],
)
def test_bytes_that_changed_are_told(change, said, path):
    old = path.stat().st_mtime_ns - 10**9
    os.utime(path, ns=(old, old))  # clocks of file systems are coarse
    file = OpenFile.open(path)
    change(path)
    for check in (file.check, file.check_contents):
        with pytest.raises(FileChangedError, match=said) as caught:
            check()
        assert str(path) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("is_direct", [True, False])
def test_what_is_written_before_or_during_a_read_is_told_by_it(is_direct, path, monkeypatch):
    if not is_direct:
        monkeypatch.setattr(open_file, "direct_alignment", lambda path: 0)
    old = path.stat().st_mtime_ns - 10**9
    os.utime(path, ns=(old, old))
    file = OpenFile.open(path)
    real = os.preadv

    def written_first(*arguments):
        rewritten(path)
        return real(*arguments)

    assert content(file) == DATA
    monkeypatch.setattr(os, "preadv", written_first)
    with pytest.raises(FileChangedError, match="was written to since it was opened"):
        content(file)


def test_the_descriptor_goes_with_the_object(path):
    with path.with_name("another").open("w") as another:
        file = OpenFile.open(path)
        descriptor = file.descriptor
        file.close()
        file.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        os.dup2(another.fileno(), descriptor)  # the number belongs to another file from here on
        try:
            for use in (content, OpenFile.check):
                with pytest.raises(UsageError, match=f"{path} was closed"):
                    use(file)
        finally:
            os.close(descriptor)
    file = OpenFile.open(path)
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_short_counts_through_the_page_cache_are_continued_where_they_ended(path, monkeypatch):
    monkeypatch.setattr(open_file, "direct_alignment", lambda path: 0)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:1000]], offset))
    file = OpenFile.open(path)
    assert not file.is_direct and content(file) == DATA


def test_what_cannot_be_read_names_file_place_and_cause(path, monkeypatch):
    file = OpenFile.open(path)
    with pytest.raises(StorageError, match=rf"{path}: read of x failed at byte \d+ of the file: only \d+ of"):
        file.read_once(SIZE, memoryview(bytearray(10)), "x")

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        content(file)
    assert caught.value.errno == errno.EIO
