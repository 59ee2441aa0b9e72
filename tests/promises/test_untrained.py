"""Where nothing trains, nothing is written: weights are read from the model's own files at each pass."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize import Pins
from outsize.config import Home
from outsize.errors import BudgetError
from outsize.store import weight_reader
from tests.seams import (
    arena_of,
    budget_of,
    close_unchecked,
    disk_of,
    placement_of,
    set_limit,
    set_pins,
    with_twin,
)
from tests.zoo import ZOO

STREAMED = Pins(resident_bytes=0)


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def name(request):
    return request.param


def saved(folder, name, dtype=torch.bfloat16):
    ZOO[name].build(dtype=dtype).save_pretrained(folder)
    return folder


def logits(folder, name, **options):
    model = outsize.load(folder, **{"dtype": "bfloat16", **options}).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        found = [model(**ZOO[name].batch(seed=seed)).logits for seed in (1, 2)]
    return model, found


def test_it_streams_without_a_disk_of_its_own(name, tmp_path):
    folder = saved(tmp_path / "model", name)
    before = sorted(tmp_path.rglob("*"))
    streamed, found = logits(folder, name, pins=STREAMED)
    _, expected = logits(folder, name, home="host")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert disk_of(streamed) is None and not placement_of(streamed).at(Home.DEVICE)
    assert "disk  weights, in their files" in str(outsize.report(streamed))
    assert sorted(tmp_path.rglob("*")) == before


def test_single_entries_in_memory_are_read_once_and_change_nothing(name, tmp_path):
    folder = saved(tmp_path / "model", name)
    _, expected = logits(folder, name, home="host")
    whole, _ = logits(folder, name, pins=STREAMED)
    model, found = logits(folder, name, pins=Pins(resident_bytes=33_000))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    placement = placement_of(model)
    assert placement.resident_bytes + placement.pieces_bytes <= 33_000
    if name == "llama":
        assert placement.pieces
        assert outsize.report(model).bytes_read < outsize.report(whole).bytes_read


def test_memory_that_calls_leave_unused_holds_weights_until_a_call_needs_it(name, tmp_path):
    folder = saved(tmp_path / "model", name)
    _, expected = logits(folder, name, home="host")
    model, _ = logits(folder, name, pins=STREAMED)
    assert not placement_of(model).pieces
    set_pins(model, Pins())
    budget, arena, read = budget_of(model), arena_of(model), []
    limit = budget.limits.host_bytes
    with torch.no_grad():
        for limit_bytes in (limit, limit, 1, 1, limit):
            set_limit(model, limit_bytes)
            before = outsize.report(model).bytes_read
            again = [model(**ZOO[name].batch(seed=seed)).logits for seed in (1, 2)]
            read.append(outsize.report(model).bytes_read - before)
            assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
            placement = placement_of(model)
            assert bool(placement.pieces) is (limit_bytes == limit)
            assert arena.in_use_bytes == arena.limit_bytes == placement.bytes_in(Home.DEVICE)
    assert read[1] < read[3] // 4, "but for rows of embeddings nothing is read"
    close_unchecked(model)


def test_a_disk_that_could_not_hold_it_is_enough(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    model, _ = logits(folder, "llama", disk=f"{tmp_path}:4KiB", home="disk")
    assert disk_of(model) is None


def test_a_device_is_fed_from_the_files(name, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", name)
    _, expected = logits(folder, name, home="host")
    with_twin(monkeypatch, lambda way, label: 0.0)
    model, found = logits(folder, name, home="disk", disk=str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert disk_of(model) is None


def test_weights_that_are_there_in_the_compute_type_are_not_converted(name, tmp_path, monkeypatch):
    folder = saved(tmp_path / "bf16", name)
    wide = saved(tmp_path / "fp32", name)
    tensors = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    converted = []
    real = weight_reader.split

    def spy(values):
        converted.append(values.numel())
        return real(values)

    monkeypatch.setattr(weight_reader, "split", spy)
    _, found = logits(folder, name, pins=STREAMED)
    assert not converted
    _, expected = logits(wide, name, pins=STREAMED)
    assert converted
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_memory_that_is_named_is_what_streaming_takes(tmp_path):
    """A folder on an SSD is not asked for, and what is named works."""
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(BudgetError) as caught:
        logits(folder, "llama", host="1MiB")
    assert "SSD" not in caught.value.hint
    found = re.search(r'host="(\d+MiB)"', caught.value.hint)
    model, _ = logits(folder, "llama", host=found[1], pins=STREAMED)
    assert not placement_of(model).at(Home.DEVICE)
