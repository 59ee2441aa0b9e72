import mmap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from outsize.block import Extent
from outsize.errors import StorageError
from outsize.tier import DiskTier, Slab, StripedTier, Tier, VersionedTier, follow_all, wait_all
from outsize.tier.transfer import DoneTransfer, TaskTransfer, Verb, checked_bytes
from tests.doubles import FaultyTier, SlowTier

from .helpers import pages


@pytest.mark.parametrize(
    ("offset", "buffer", "message"),
    [
        (0, pages(8192)[:0], "is empty"),
        (1, pages(4096), "multiples of 4096"),
        (0, pages(8192)[:100], "multiples of 4096"),
        (-4096, pages(4096), "outside"),
        (4096, pages(8192), "outside a tier of 8192"),
        (0, pages(8192)[100:4196], "not at a page"),
        (0, pages(4096).toreadonly(), "read-only"),
        (0, pages(8192)[::2], "not contiguous"),
    ],
)
def test_a_request_that_cannot_be_right_is_a_bug(offset: int, buffer: memoryview, message: str):
    with pytest.raises(AssertionError, match=f"^read L07: .*{message}"):
        checked_bytes(Verb.READ, offset, buffer, "L07", 8192)


def test_a_buffer_of_any_type_comes_back_as_bytes():
    assert len(checked_bytes(Verb.WRITE, 0, pages(8192).cast("f").toreadonly(), "x", 8192)) == 8192


def test_a_transfer_is_over_with_its_last_piece_and_raises_its_first_error_each_time():
    pieces = [Future() for _ in range(3)]
    transfer = TaskTransfer(*pieces)
    pieces[1].set_exception(ValueError("first"))
    pieces[2].set_exception(ValueError("second"))
    assert not transfer.is_done()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(transfer.wait)
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        pieces[0].set_result(None)
        with pytest.raises(ValueError, match="first"):
            waiting.result()
    assert transfer.is_done()
    with pytest.raises(ValueError, match="first"):
        transfer.wait()


def test_done_is_done():
    assert DoneTransfer().is_done()
    DoneTransfer().wait()


class Late:
    """A transfer that is over when it is waited for, and may have failed."""

    def __init__(self, error=None):
        self.error, self.is_over = error, False

    def wait(self):
        self.is_over = True
        if self.error is not None:
            raise self.error

    def follow(self):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("verb", [wait_all, follow_all])
def test_an_error_is_raised_when_nothing_is_under_way_any_more(verb):
    first, second = StorageError("first", hint=""), StorageError("second", hint="")
    transfers = [Late(), Late(first), Late(), Late(second)]
    with pytest.raises(StorageError, match="first"):
        verb(transfers)
    assert all(transfer.is_over for transfer in transfers)
    verb([Late(), Late()])


@pytest.mark.parametrize("kind", ["disk", "slow", "faulty", "striped", "versioned"])
def test_memory_can_be_closed_as_soon_as_its_transfer_is_over(kind: str, disk_folder: Path, monkeypatch):
    """However long the thread that moved the last bytes takes to get out of what it ran."""
    end = Future.set_result

    def linger(task: Future[None], result: None) -> None:
        end(task, result)
        time.sleep(0.1)

    monkeypatch.setattr(Future, "set_result", linger)
    disk = DiskTier(disk_folder, 1 << 20, name="one")
    tier: Tier = disk
    match kind:
        case "slow":
            tier = SlowTier(disk, 0.0)
        case "faulty":
            tier = FaultyTier(disk, [])
        case "striped":
            tier = StripedTier([disk, DiskTier(disk_folder, 1 << 20, name="two")], 1 << 20)
        case "versioned":
            tier = VersionedTier(disk, [Extent(0, 8192)], [Slab(0, 8192, 1)])
    for start in (tier.start_write, tier.start_read):
        memory = mmap.mmap(-1, 8192)
        start(0, memoryview(memory), "L00").wait()
        memory.close()
    tier.close()
