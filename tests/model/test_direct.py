"""Ranges of files, read past the page cache."""

import ctypes
import errno
import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.errors import FileChangedError, StorageError
from outsize.files import OpenFile
from outsize.model import direct
from outsize.model.direct import FileReader, wait_read

SIZE = 70_001
PIECE = 8192


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(direct, "PIECE_BYTES", PIECE)


@pytest.fixture(scope="module")
def data():
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(data)
    return path


@pytest.fixture
def file(path):
    return OpenFile.open(path)


def fetch(reader, file, offset, count):
    buffer = bytearray(count)
    wait_read(reader.start_read(file, offset, memoryview(buffer)))
    return bytes(buffer)


@pytest.mark.parametrize("is_direct", [True, False])
def test_any_range_is_what_the_file_holds(is_direct, path, data, monkeypatch):
    if not is_direct:
        monkeypatch.setattr(os, "open", refusing_direct(os.open))
    file, reader = OpenFile.open(path), FileReader()

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, SIZE), st.integers(0, SIZE))
    def check(offset, count):
        count = min(count, SIZE - offset)
        assert fetch(reader, file, offset, count) == data[offset : offset + count]

    check()
    assert file.is_direct is is_direct
    reader.close()
    assert fetch(reader, file, 5, 9) == data[5:14], "its threads start again"
    reader.close()


def refusing_direct(real):
    def refuse(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest, **options)

    return refuse


def test_the_page_cache_holds_nothing_of_it(path):
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = FileReader()
    fetch(reader, OpenFile.open(path), 0, SIZE // mmap.PAGESIZE * mmap.PAGESIZE)
    reader.close()
    assert pages_in_cache(path) == 0
    path.read_bytes()
    assert pages_in_cache(path) > 0, "the test can tell"


def pages_in_cache(path):
    with path.open("rb+") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-SIZE // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), pages) == 0
        return sum(page & 1 for page in pages)


def test_a_file_that_was_cut_is_named(file, data, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(data)
    file, reader = OpenFile.open(path), FileReader()
    fetch(reader, file, 0, 10)
    os.truncate(path, 20_000)
    for offset, count in ((0, 20_000), (19_999, 2), (0, SIZE), (40_000, 1)):
        message = rf"{path} was cut short since it was opened: 20000 bytes, {SIZE} before"
        with pytest.raises(FileChangedError, match=message):
            fetch(reader, file, offset, count)
    reader.close()


def test_a_disk_that_fails_is_named_after_all_pieces_are_over(file, monkeypatch):
    reader = FileReader()
    fetch(reader, file, 0, 10)
    real = os.preadv

    def failing(descriptor, buffers, offset):
        if offset == 3 * PIECE:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    pieces = reader.start_read(file, 0, memoryview(bytearray(SIZE)))
    with pytest.raises(
        StorageError, match=f"weights failed at byte {3 * PIECE} of the file: Input/output error"
    ):
        wait_read(pieces)
    assert all(piece.done() for piece in pieces)
    reader.close()
