"""Weights before their first update: what reading and splitting them takes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize import Pins
from outsize.block import Plane
from outsize.model import READ_BUFFERS_BYTES
from outsize.store import weight_reader
from outsize.store.live_bytes import LiveBytes
from outsize.store.weight_reader import SPLIT_BYTES, reading_bytes
from tests.promises.test_untrained import saved
from tests.running import adamw, train
from tests.seams import source_of, store_of
from tests.weight_files import count_reads
from tests.zoo import ZOO


@pytest.fixture
def folders(tmp_path):
    """The same values in bf16 and in fp32."""
    narrow = saved(tmp_path / "bf16", "llama")
    wide = saved(tmp_path / "fp32", "llama")
    tensors = {key: value.float() for key, value in load_file(narrow / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    return narrow, wide


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_training_in_bf16_from_a_bf16_file_reads_each_weight_once(name, home, tmp_path, monkeypatch):
    """Where weights stay in memory; where they stream, once per visit until the first update has stored them."""
    folder = saved(tmp_path / "model", name)
    counts = count_reads(monkeypatch)
    model = outsize.load(folder, dtype="bfloat16", disk=tmp_path, home=home).train()
    train(model, [ZOO[name].batch(seed=seed) for seed in (1, 2, 3)], adamw(model))
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert counts.keys() == stored.keys()
    for key, value in stored.items():
        visits = counts[key] / value.nbytes
        assert visits == 1 if home == "host" else 1 <= visits <= 2, (key, visits)


def test_a_large_part_of_an_expert_is_read_once_for_all_chunks_of_the_first_update(tmp_path, monkeypatch):
    """A row of a stack of experts is larger than what is split at once, and than a chunk."""
    monkeypatch.setattr(weight_reader, "SPLIT_ELEMENTS", 64)
    folder = saved(tmp_path / "model", "mixtral")
    tensors = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = outsize.load(folder, dtype="bfloat16", disk=tmp_path, pins=Pins(resident_bytes=0)).train()
    adamw(model)
    model(**ZOO["mixtral"].batch(seed=1)).loss.backward()
    store = store_of(model)
    record = max(store.records.values(), key=lambda record: record.num_trainable)
    counts = count_reads(monkeypatch)
    remainder = torch.empty(record.num_trainable, dtype=torch.int16)
    for start in range(0, record.num_trainable, 1000):
        stop = min(start + 1000, record.num_trainable)
        store.weight_reader.fill_remainder(record, start, stop, remainder[start:stop])
    experts = {key: value.nbytes for key, value in tensors.items() if ".experts." in key and key in counts}
    assert len(experts) > 4 and {key: counts[key] for key in experts} == experts
    whole = torch.empty_like(remainder)
    store.weight_reader.fill_remainder(record, 0, record.num_trainable, whole)
    assert torch.equal(remainder, whole)


def trained(folder, tmp_path, **options):
    model = outsize.load(folder, dtype="bfloat16", disk=tmp_path, **options).train()
    losses = train(model, [ZOO["llama"].batch(seed=seed) for seed in (1, 2)], adamw(model))
    return model, losses


@pytest.mark.parametrize("home", ["host", "disk"])
def test_the_first_update_from_a_bf16_file_reads_nothing_again(home, folders, tmp_path, monkeypatch):
    real, splits = weight_reader.split, []

    def spy(values):
        splits.append(values.numel())
        return real(values)

    monkeypatch.setattr(weight_reader, "split", spy)
    monkeypatch.setattr(weight_reader, "SPLIT_ELEMENTS", 256)
    model, losses = trained(folders[0], tmp_path, home=home)
    assert not splits
    source = source_of(model)
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    visits = 1 if home == "host" else 2  # forward and backward, before the first update
    assert source.bytes_read <= visits * num_bytes
    _, expected = trained(folders[1], tmp_path, home=home)
    assert losses == expected
    assert splits and max(splits) <= 256


def test_a_remainder_takes_what_is_counted(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_reader, "SPLIT_ELEMENTS", 512)
    model = outsize.load(folders[1], dtype="bfloat16", disk=tmp_path, pins=Pins(resident_bytes=0)).train()
    adamw(model)
    model(**ZOO["llama"].batch(seed=1)).loss.backward()
    store = store_of(model)
    records = list(store.records.values())
    planned = reading_bytes(store.weight_reader.source, records) - READ_BUFFERS_BYTES
    wide = max(entry.piece.shape[-1] for record in records for entry in record.entries)
    assert planned <= (4 + SPLIT_BYTES) * max(512, wide)
    for record in records:
        remainder = torch.empty(record.num_trainable, dtype=torch.int16)
        with LiveBytes() as counted:
            store.weight_reader.fill_remainder(record, 0, record.num_trainable, remainder)
        assert 0 < counted.peak <= planned
        parts = torch.empty_like(remainder)
        for start in range(0, record.num_trainable, 1000):
            stop = min(start + 1000, record.num_trainable)
            store.weight_reader.fill_remainder(record, start, stop, parts[start:stop])
        assert torch.equal(parts, remainder)


def test_what_comes_as_a_whole_is_converted_once(folders, tmp_path, monkeypatch):
    model = outsize.load(folders[1], dtype="bfloat16", disk=tmp_path, pins=Pins(resident_bytes=0)).train()
    adamw(model)
    model(**ZOO["llama"].batch(seed=1)).loss.backward()
    store = store_of(model)
    record = max(store.records.values(), key=lambda record: record.num_trainable)
    expected = torch.empty(record.num_trainable, dtype=torch.int16)
    store.weight_reader.fill_remainder(record, 0, record.num_trainable, expected)
    source = store.weight_reader.source
    monkeypatch.setattr(source, "gives_rows", lambda parameter: False)
    by_rows = reading_bytes(source, [record])
    assert Plane.REMAINDER in record.state and by_rows > 6 * max(e.piece.num_elements for e in record.entries)
    before = source.bytes_read
    found = torch.empty_like(expected)
    for start in range(0, record.num_trainable, 1000):
        stop = min(start + 1000, record.num_trainable)
        store.weight_reader.fill_remainder(record, start, stop, found[start:stop])
    assert torch.equal(found, expected)
    assert source.bytes_read - before == 4 * sum(entry.piece.num_elements for entry in record.entries)
