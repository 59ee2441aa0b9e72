import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outsize.errors import CorruptionError, StorageError, StorageFullError, UsageError
from outsize.tier import disk
from outsize.tier.disk import DiskTier

from .helpers import pages

PAGE = 4096
NUM_PAGES = 64


@pytest.fixture
def tier(disk_folder: Path, monkeypatch) -> Iterator[DiskTier]:
    """A small tier that cuts small pieces, so that small transfers have several."""
    monkeypatch.setattr(disk, "PIECE_BYTES", 4 * PAGE)
    tier = DiskTier(disk_folder, NUM_PAGES * PAGE)
    yield tier
    tier.close()


def write(tier: DiskTier, page: int, count: int, seed: int) -> bytes:
    buffer = pages(count * PAGE, seed)
    tier.start_write(page * PAGE, buffer, f"w{page}").wait()
    return bytes(buffer)


def read(tier: DiskTier, page: int, count: int) -> bytes:
    buffer = pages(count * PAGE)
    tier.start_read(page * PAGE, buffer, f"r{page}").wait()
    return bytes(buffer)


def damage(tier: DiskTier, byte: int) -> None:
    """Flip a bit behind the tier's back."""
    with open(tier.path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1]))
        file.flush()
        os.fsync(file.fileno())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, NUM_PAGES - 1), st.integers(1, NUM_PAGES), st.integers(0, 99)
        ),
        max_size=12,
    )
)
def test_what_is_read_is_what_was_written(tier: DiskTier, steps: list[tuple[bool, int, int, int]]):
    model = bytearray(read(tier, 0, NUM_PAGES))
    for writes, page, count, seed in steps:
        count = min(count, NUM_PAGES - page)
        place = slice(page * PAGE, (page + count) * PAGE)
        if writes:
            model[place] = write(tier, page, count, seed)
        else:
            assert read(tier, page, count) == model[place]
    assert read(tier, 0, NUM_PAGES) == model


def test_many_transfers_at_once(tier: DiskTier):
    buffers = [pages(8 * PAGE, seed) for seed in range(8)]
    for transfer in [tier.start_write(i * 8 * PAGE, b, f"w{i}") for i, b in enumerate(buffers)]:
        transfer.wait()
    back = [pages(8 * PAGE) for _ in buffers]
    transfers = [tier.start_read(i * 8 * PAGE, b, f"r{i}") for i, b in enumerate(back)]
    for transfer in transfers:
        transfer.wait()
        assert transfer.is_done()
    assert back == buffers


def test_the_bytes_are_in_the_file_and_the_file_goes_with_the_tier(disk_folder: Path):
    tier = DiskTier(disk_folder, 8 * PAGE, name="s")
    data = write(tier, 2, 3, 1)
    assert tier.path == disk_folder / "s"
    assert tier.path.read_bytes()[2 * PAGE : 5 * PAGE] == data
    tier.close()
    tier.close()
    assert not list(disk_folder.iterdir())
    with pytest.raises(UsageError, match="L00 was started on a closed tier"):
        tier.start_read(0, pages(PAGE), "L00")


def test_close_waits_for_what_is_under_way(disk_folder: Path, monkeypatch):
    may_go = threading.Event()
    real = os.pwritev
    ended = []

    def held(*args):
        may_go.wait()
        ended.append(args)
        return real(*args)

    monkeypatch.setattr(os, "pwritev", held)
    tier = DiskTier(disk_folder, PAGE)
    transfer = tier.start_write(0, pages(PAGE), "x")
    assert not transfer.is_done()
    threading.Timer(0.05, may_go.set).start()
    tier.close()
    assert transfer.is_done() and len(ended) == 1
    transfer.wait()


def test_the_number_of_threads_may_change_while_bytes_move(tier: DiskTier):
    first = pages(8 * PAGE, 1)
    under_way = tier.start_write(0, first, "w")
    tier.use_threads(1)
    assert under_way.is_done()
    second = write(tier, 8, 8, 2)
    tier.use_threads(6)
    assert read(tier, 0, 8) == bytes(first) and read(tier, 8, 8) == second
    assert tier._threads._max_workers == 6


def test_a_flipped_bit_is_found_and_named(tier: DiskTier):
    write(tier, 8, 16, 1)
    damage(tier, 13 * PAGE + 7)
    with pytest.raises(
        CorruptionError, match=rf"{tier.path}: r8: bytes {12 * PAGE} to {16 * PAGE} of the file"
    ):
        read(tier, 8, 16)
    read(tier, 16, 8)


def test_a_read_that_joins_writes_is_checked(tier: DiskTier):
    """As the weight plane is: written chunk by chunk, read whole."""
    for page in range(1, 22, 3):
        write(tier, page, 3, page)
    damage(tier, 20 * PAGE)
    with pytest.raises(CorruptionError):
        read(tier, 0, 30)


def test_a_write_over_a_part_forgets_the_old_digest(tier: DiskTier):
    write(tier, 0, 4, 1)
    new = write(tier, 2, 4, 2)
    assert read(tier, 0, 6)[2 * PAGE :] == new
    damage(tier, 0)
    read(tier, 0, 6)
    damage(tier, 2 * PAGE)
    with pytest.raises(CorruptionError):
        read(tier, 0, 6)


def test_what_was_never_written_is_not_checked(tier: DiskTier):
    damage(tier, 5)
    assert read(tier, 0, 1)[5] == 1


def test_without_verify_nothing_is_checked(disk_folder: Path):
    tier = DiskTier(disk_folder, 4 * PAGE, verify=False)
    write(tier, 0, 4, 1)
    damage(tier, 0)
    read(tier, 0, 4)
    tier.close()


@pytest.mark.parametrize("part", [0.3, 0.6])
def test_short_counts_are_continued_at_aligned_places(tier: DiskTier, monkeypatch, part: float):
    places = []

    def short(real):
        def call(fd, views, offset):
            places.append(offset)
            view = views[0]
            real(fd, views, offset)
            return len(view) if len(view) <= PAGE else max(PAGE, int(len(view) * part))

        return call

    monkeypatch.setattr(os, "pwritev", short(os.pwritev))
    monkeypatch.setattr(os, "preadv", short(os.preadv))
    assert read(tier, 0, 9) != write(tier, 0, 9, 1)
    assert read(tier, 0, 9) == bytes(pages(9 * PAGE, 1))
    assert len(places) > 9 and all(place % PAGE == 0 for place in places)


def test_a_file_that_ends_early_is_an_error_not_a_loop(tier: DiskTier):
    os.truncate(tier.path, 10 * PAGE)
    with pytest.raises(StorageError, match=rf"read of r8 failed at byte {10 * PAGE} of the file: only 0 of"):
        read(tier, 8, 4)


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_an_io_error_names_file_place_label_and_cause(tier: DiskTier, monkeypatch, call: str):
    real = getattr(os, call)

    def fail(fd, views, offset):
        if offset == 8 * PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, call, fail)
    start, verb = (tier.start_read, "read") if call == "preadv" else (tier.start_write, "write")
    transfer = start(0, pages(16 * PAGE), "L07.state[3]")
    message = (
        rf"{tier.path}: {verb} of L07.state\[3\] failed at byte {8 * PAGE} of the file: Input/output error"
    )
    for _ in range(2):
        with pytest.raises(StorageError, match=message) as caught:
            transfer.wait()
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, StorageFullError)


def test_a_disk_that_fills_up_while_writing(tier: DiskTier, monkeypatch):
    def fail(fd, views, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(StorageFullError, match=r"No space left.*\nhint: free space"):
        write(tier, 0, 1, 1)


def test_a_write_that_failed_cannot_be_read_unnoticed(tier: DiskTier, monkeypatch):
    write(tier, 0, 2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda fd, views, offset: 0)
        with pytest.raises(StorageError, match="only 0 of"):
            write(tier, 0, 2, 2)
    with pytest.raises(CorruptionError):
        read(tier, 0, 2)


def test_at_most_num_threads_calls_are_under_way_and_large_transfers_use_them(disk_folder: Path, monkeypatch):
    monkeypatch.setattr(disk, "PIECE_BYTES", PAGE)
    lock = threading.Lock()
    together = threading.Barrier(3)
    active: set[int] = set()
    most = []

    def count(fd, views, offset):
        with lock:
            active.add(offset)
            most.append(len(active))
        together.wait()
        with lock:
            active.remove(offset)
        return len(views[0])

    monkeypatch.setattr(os, "pwritev", count)
    tier = DiskTier(disk_folder, 12 * PAGE, num_threads=3)
    write(tier, 0, 12, 1)
    tier.close()
    assert max(most) == 3


def test_stats_count_bytes_and_time(tier: DiskTier):
    write(tier, 0, 9, 1)
    read(tier, 3, 2)
    stats = tier.stats()
    assert (stats.bytes_written, stats.bytes_read) == (9 * PAGE, 2 * PAGE)
    assert stats.write_busy_s > 0 and stats.read_busy_s > 0


def test_requests_outside_the_tier_are_bugs(tier: DiskTier):
    with pytest.raises(AssertionError, match="outside"):
        tier.start_write(NUM_PAGES * PAGE, pages(PAGE), "x")


def test_direct_where_the_disk_allows_it_else_the_same_bytes(disk_folder: Path, monkeypatch):
    monkeypatch.setattr("outsize.files.open_file.direct_alignment", lambda path: 0)
    with pytest.warns(RuntimeWarning, match="direct I/O"):
        tier = DiskTier(disk_folder, 8 * PAGE)
    assert not tier.is_direct
    assert write(tier, 1, 7, 1) == read(tier, 1, 7)
    tier.close()
