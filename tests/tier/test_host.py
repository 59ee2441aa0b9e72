import errno
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outsize.errors import BudgetError
from outsize.tier.host import HostArena


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_a_region_is_zero_page_aligned_and_rounded_up():
    arena = HostArena(1 << 20)
    region = arena.allocate(5000, "x")
    assert region.num_bytes == len(region.buffer) == 8192 == arena.in_use_bytes
    tensor = region.tensor(torch.uint8, 8192)
    assert tensor.data_ptr() % 4096 == 0
    assert not tensor.any()


def test_tensor_and_buffer_share_bytes():
    region = HostArena(1 << 20).allocate(4096, "x")
    tensor = region.tensor(torch.float32, 3, byte_offset=8)
    tensor[:] = torch.tensor([1.0, 2.0, 3.0])
    assert region.buffer[8:20].cast("f").tolist() == [1.0, 2.0, 3.0]
    region.buffer[8:12] = bytes(4)
    assert tensor[0] == 0
    assert region.tensor(torch.float32, 0).numel() == 0


@pytest.mark.parametrize(("num_elements", "byte_offset"), [(1025, 0), (1, 4096), (1, -4), (1, 2), (-1, 0)])
def test_a_tensor_outside_its_region_or_misaligned_is_a_bug(num_elements: int, byte_offset: int):
    region = HostArena(1 << 20).allocate(4096, "x")
    with pytest.raises(AssertionError, match=r"^x: byte"):
        region.tensor(torch.float32, num_elements, byte_offset)


def test_the_limit_holds_and_the_message_gives_the_numbers():
    arena = HostArena(3 * 4096)
    kept = arena.allocate(8192, "kept")
    with pytest.raises(BudgetError, match=r"L07 needs 8192 bytes .* 8192 of the 12288 bytes") as caught:
        arena.allocate(4097, "L07")
    assert "16384" in str(caught.value.hint)
    assert arena.in_use_bytes == arena.high_water_bytes == 8192
    kept.free()
    arena.allocate(3 * 4096, "fits now").free()
    arena.check_books()


def test_what_the_system_refuses_is_a_budget_error():
    arena = HostArena(1 << 62)
    with pytest.raises(BudgetError, match="the system refuses"):
        arena.allocate(1 << 60, "too much")
    arena.check_books()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EFAULT, errno.EINVAL])
@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, 23])
def test_memory_that_cannot_be_populated_is_a_budget_error(code: int, advice: int, monkeypatch):
    """Advice that the kernel does not know is left out; memory that it does not have is missed at once."""

    class Mapping(mmap.mmap):
        def madvise(self, option: int) -> None:
            if option == advice:
                raise OSError(code, os.strerror(code))
            super().madvise(option)

    monkeypatch.setattr(mmap, "mmap", Mapping)
    arena = HostArena(8 << 20)
    if code == errno.EINVAL:
        arena.allocate(4 << 20, "weights").free()
    else:
        with pytest.raises(BudgetError, match=f"weights needs .* cannot provide: {os.strerror(code)}"):
            arena.allocate(4 << 20, "weights")
    arena.check_books()


def test_free_gives_memory_back_at_once_even_under_a_live_tensor():
    num_bytes = 64 << 20
    region = HostArena(num_bytes).allocate(num_bytes, "big")
    stale = region.tensor(torch.uint8, num_bytes)
    stale.fill_(1)
    before = resident_bytes()
    region.free()
    assert before - resident_bytes() > num_bytes * 0.9
    assert stale[0] == 0


def test_memory_is_there_from_the_start():
    """So that what the system cannot give is missing when it is asked for, and not in the middle of a step."""
    num_bytes = 64 << 20
    before = resident_bytes()
    region = HostArena(num_bytes).allocate(num_bytes, "big")
    assert resident_bytes() - before > num_bytes * 0.9
    region.free()


@pytest.mark.parametrize("num_bytes", [(2 << 20) - 4096, 2 << 20])
def test_large_regions_ask_for_huge_pages(num_bytes: int):
    region = HostArena(num_bytes).allocate(num_bytes, "x")
    address = region.tensor(torch.uint8, 1).data_ptr()
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < stop
        elif (
            is_inside and first == "THPeligible:" and not Path("/sys/kernel/mm/transparent_hugepage").exists()
        ):
            pytest.skip("the kernel has no transparent huge pages")
        elif is_inside and first == "VmFlags:":
            assert ("hg" in line.split()) == (num_bytes >= 2 << 20)
            return
    raise AssertionError("the region is not mapped")


def test_a_freed_region_is_refused():
    region = HostArena(4096).allocate(1, "gone")
    region.free()
    assert region.is_free
    for use in (lambda: region.buffer, lambda: region.tensor(torch.uint8, 1), region.free):
        with pytest.raises(AssertionError, match="gone: the region was freed"):
            use()


def test_check_books_names_what_is_left():
    arena = HostArena(1 << 20)
    arena.allocate(4096, "leak")
    with pytest.raises(AssertionError, match=r"4096 bytes are in use, expected 0: leak \(4096\)"):
        arena.check_books()
    arena.check_books(expected_bytes=4096)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40_000)), max_size=40))
def test_books_balance(steps: list[tuple[bool, int]]):
    arena = HostArena(100_000)
    live = []
    peak = 0
    for allocates, number in steps:
        if allocates:
            size = -(-number // 4096) * 4096
            held = sum(region.num_bytes for region in live)
            if held + size > 100_000:
                with pytest.raises(BudgetError):
                    arena.allocate(number, "r")
            else:
                live.append(arena.allocate(number, "r"))
                peak = max(peak, held + size)
        elif live:
            live.pop(number % len(live)).free()
        arena.check_books(sum(region.num_bytes for region in live))
    assert arena.high_water_bytes == peak
