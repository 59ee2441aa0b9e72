"""Several tiers as one: every byte has one place, and errors are those of the tier concerned."""

import mmap
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import outsize
from outsize import Pins
from outsize.block import ALIGNMENT
from outsize.config import Budgets, DiskBudget
from outsize.errors import BudgetError, ConfigError, StorageError
from outsize.tier import DiskTier, StripedTier, Verb
from outsize.tier.striped import STRIPE_BYTES, part_bytes
from tests.doubles import Fault, FaultKind, FaultyTier, MemoryTier
from tests.promises.test_placement import Run, assert_same_bits, small_chunks, trained
from tests.running import opened
from tests.zoo import ZOO

__all__ = ["small_chunks"]
TOTAL = 9 * STRIPE_BYTES + 3 * ALIGNMENT


def striped(count, num_bytes=TOTAL, wrap=lambda tier, index: tier):
    size = part_bytes(num_bytes, count)
    return StripedTier([wrap(MemoryTier(size), index) for index in range(count)], num_bytes)


def buffer_of(num_bytes, fill=None):
    memory = mmap.mmap(-1, num_bytes)
    if fill is not None:
        memory[:] = fill
    return memoryview(memory)


@given(st.integers(1, 4), st.data())
@settings(max_examples=100 if os.environ.get("OUTSIZE_SOAK") else 15, deadline=None)
def test_what_is_read_is_what_was_written_wherever_requests_begin(count, data):
    tier, model = striped(count), bytearray(TOTAL)
    pages = TOTAL // ALIGNMENT
    for seed in range(6):
        begin = data.draw(st.integers(0, pages - 1)) * ALIGNMENT
        size = data.draw(st.integers(1, (TOTAL - begin) // ALIGNMENT)) * ALIGNMENT
        content = random.Random(seed).randbytes(size)
        tier.start_write(begin, buffer_of(size, content), "x").wait()
        model[begin : begin + size] = content
    whole = buffer_of(TOTAL)
    tier.start_read(0, whole, "x").wait()
    assert bytes(whole) == bytes(model)
    tier.close()


def test_parts_are_spread_evenly():
    tier = striped(3)
    tier.start_write(0, buffer_of(9 * STRIPE_BYTES, bytes([1]) * (9 * STRIPE_BYTES)), "x").wait()
    for own in tier._tiers:
        held = buffer_of(own.num_bytes)
        own.start_read(0, held, "x").wait()
        assert sum(bytes(held)) == 3 * STRIPE_BYTES


def test_an_error_of_one_is_raised_after_all_are_done():
    tier = striped(
        2, wrap=lambda own, index: FaultyTier(own, [Fault(FaultKind.EIO, Verb.READ, nth=1)]) if index else own
    )
    transfer = tier.start_read(0, buffer_of(4 * STRIPE_BYTES), "L00.weight")
    with pytest.raises(StorageError, match=r"L00\.weight"):
        transfer.wait()
    assert transfer.is_done()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_over_two_folders_gives_the_same_bits(dtype, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    run = Run("llama_tied", dtype)
    losses, values, report = trained(run, disk=folders, home="disk", pins=Pins(weight_slots=1))
    assert_same_bits(run, losses, values)
    assert report.bytes_written > 0


def test_folders_are_written_with_commas_too(tmp_path):
    disks = Budgets.parse(None, None, f"{tmp_path}/a:1GiB,{tmp_path}/b").disks
    assert disks == (DiskBudget(tmp_path / "a", 1 << 30), DiskBudget(tmp_path / "b"))
    (tmp_path / "with,comma").mkdir()
    assert Budgets.parse(None, None, f"{tmp_path}/with,comma").disks == (DiskBudget(tmp_path / "with,comma"),)


@pytest.mark.parametrize("name", ["2026-11-30T11:52", "data:200GiB"])
def test_a_folder_that_exists_is_never_divided_at_a_colon(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "other").mkdir()
    whole = DiskBudget(tmp_path / name)
    assert DiskBudget.parse(str(tmp_path / name)) == whole
    assert Budgets.parse(None, None, f"{tmp_path / name},{tmp_path / 'other'}:1GiB").disks == (
        whole,
        DiskBudget(tmp_path / "other", 1 << 30),
    )
    assert DiskBudget.parse(f"{tmp_path / name}:1GiB") == DiskBudget(tmp_path / name, 1 << 30)


def test_a_folder_that_is_missing_or_named_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        outsize.wrap(ZOO["llama"].build(), disk=[tmp_path, tmp_path])
    with pytest.raises(ConfigError, match="no folder"):
        outsize.wrap(ZOO["llama"].build(), disk=[tmp_path, tmp_path / "absent"])
    with pytest.raises(ConfigError, match="no folder is named"):
        outsize.wrap(ZOO["llama"].build(), disk=[])


def test_each_folder_has_its_own_limit(tmp_path):
    (tmp_path / "b").mkdir()
    model = opened(ZOO["llama"].build().train(), disk=[tmp_path, (tmp_path / "b", "8KiB")], home="disk")
    outsize.AdamW(model)
    with pytest.raises(BudgetError, match="on each of 2"):
        model(**ZOO["llama"].batch())


def test_a_second_folder_that_cannot_be_opened_leaves_nothing(tmp_path, monkeypatch):
    from outsize.store import scratch

    (tmp_path / "b").mkdir()
    opened_tiers = []

    def open_tier(folder, num_bytes, **options):
        if folder.name == "b":
            raise ConfigError("refused")
        opened_tiers.append(DiskTier(folder, num_bytes, **options))
        return opened_tiers[-1]

    monkeypatch.setattr(scratch, "DiskTier", open_tier)
    model = opened(ZOO["llama"].build().train(), disk=[tmp_path, tmp_path / "b"], home="disk")
    outsize.AdamW(model)
    with pytest.raises(ConfigError, match="refused"):
        model(**ZOO["llama"].batch())
    with pytest.raises(RuntimeError):
        opened_tiers[0].start_read(0, buffer_of(ALIGNMENT), "x")  # closed
    assert torch.is_grad_enabled()
