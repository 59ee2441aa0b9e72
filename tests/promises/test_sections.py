"""A frozen section of a record keeps its home in the model's files: no update, plan or commit writes it."""

import re

import pytest
import torch

import outsize
from outsize import Pins
from outsize.block import Group, Plane
from outsize.checkpoint.export import export
from outsize.config import Home
from outsize.errors import StorageError
from outsize.store.weight_reader import WeightReader
from tests.checkpoint.runs import batches, manifests
from tests.checkpoint.test_export import Loaded, saved_model
from tests.running import adamw, opened, settled, train, values_of  # noqa: F401
from tests.seams import flush, placement_of, records_of, settle_updates, with_twin, wrapped_disk
from tests.zoo import ZOO

STEPS = 3


def only_norms(model):
    """About one percent of each layer trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_layernorm" in name)


@pytest.fixture
def folder(tmp_path):
    return saved_model(tmp_path)


def reference(dtype):
    """Losses and weights of the same run on a model in memory, which is stored whole."""
    model = opened(ZOO["llama"].build().train(), dtype=dtype, home="host")
    only_norms(model)
    losses = train(model, batches(STEPS))
    return losses, values_of(model)


class Recording:
    """A disk that notes what is written."""

    def __init__(self, inner, written):
        self._inner = inner
        self._written = written

    def start_write(self, offset, buffer, label):
        self._written.append((label, memoryview(buffer).nbytes))
        return self._inner.start_write(offset, buffer, label)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def trained_bytes(record):
    """Bytes of one step's writes of a block on disk: weights, state and gradient of what trains, in whole pages."""
    planes = (Plane.WEIGHT, Plane.GRADIENT, *record.state)
    return sum(extent.num_bytes for plane in planes for _, _, extent in record.plane_parts(plane))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, None])
def test_only_what_trains_is_ever_written(dtype, slots, folder, tmp_path, monkeypatch):
    written = []
    with wrapped_disk(monkeypatch, lambda tier: Recording(tier, written)):
        model = outsize.load(
            folder, disk=tmp_path, home="disk", dtype=dtype, pins=Pins(weight_slots=slots)
        ).train()
        only_norms(model)
        losses = train(model, batches(STEPS))
        settle_updates(model)
        flush(model)
    records = records_of(model)
    layers = {name: record for name, record in records.items() if record.num_trainable}
    assert layers and all(r.num_trainable < 0.02 * r.num_elements for r in layers.values())
    pattern = re.compile(r"(\w+)\.(weight|gradient|state)\[0\]")
    assert {pattern.fullmatch(label).group(1) for label, _ in written} == layers.keys()
    for name, record in layers.items():
        own = sum(num_bytes for label, num_bytes in written if label.startswith(f"{name}."))
        assert own == STEPS * trained_bytes(record)
    placement = placement_of(model)
    assert placement.disk_bytes == sum(trained_bytes(record) for record in layers.values())
    frozen = records.keys() - layers.keys()
    assert {placement.home(name, Group.WEIGHT) for name in frozen} == {Home.FILE}
    assert (losses, values_of(model).keys()) == (reference(dtype)[0], reference(dtype)[1].keys())
    for name, value in reference(dtype)[1].items():
        assert torch.equal(values_of(model)[name], value), name


HOMES = {"disk": {"home": "disk"}, "host": {"home": "host"}, "slots": {"pins": Pins(weight_slots=1)}}


@pytest.mark.parametrize("twin", [False, True], ids=["here", "device"])
@pytest.mark.parametrize("options", HOMES.values(), ids=HOMES)
def test_a_run_resumes_with_the_frozen_part_from_its_files(options, twin, folder, tmp_path, monkeypatch):
    if twin:
        with_twin(monkeypatch, lambda way, label: 0.001)
    run = Loaded(tmp_path, folder, "whole", prepare=only_norms, **options)
    expected = run.go(batches(2 * STEPS))
    run.finish()
    values = values_of(run.model)
    run.end()
    first = Loaded(tmp_path, folder, prepare=only_norms, **options)
    losses = first.go(batches(STEPS))
    first.end()
    [manifest] = manifests(first.path)
    stored = [block.record for block in manifest.blocks if block.is_stored]
    assert stored and all(record.num_stored < record.num_elements for record in stored)
    assert manifest.num_bytes == sum(3 * record.plane_bytes(Plane.MOMENT1) for record in stored)
    second = Loaded(tmp_path, folder, prepare=only_norms, **options)
    assert second.resumed.step == STEPS
    losses += second.go(batches(STEPS, first=STEPS))
    second.finish()
    assert losses == expected
    for name, value in values_of(second.model).items():
        assert torch.equal(value, values[name]), name
    export(second.path, tmp_path / "exported")
    second.end()
    reloaded = outsize.load(tmp_path / "exported", home="host", dtype="float32")
    for name, value in values_of(reloaded).items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_trained_before_is_not_taken_from_the_files(dtype, folder, tmp_path):
    """Parameters that a commit stores stay stored when they are frozen."""
    run = Loaded(tmp_path, folder, dtype=dtype)
    run.go(batches(STEPS))
    run.finish()
    before = values_of(run.model)
    run.end()
    frozen = Loaded(tmp_path, folder, prepare=only_norms, dtype=dtype)
    frozen.go(batches(1))
    frozen.finish()
    for name, value in values_of(frozen.model).items():
        assert torch.equal(value, before[name]) != ("input_layernorm" in name), name
    frozen.end()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_frozen_begins_to_train_from_the_files(dtype, folder, tmp_path):
    def values_after(prepare_second):
        store = f"run-{prepare_second.__name__}"
        run = Loaded(tmp_path, folder, store, prepare=only_norms, dtype=dtype)
        run.go(batches(STEPS))
        run.end()
        run = Loaded(tmp_path, folder, store, prepare=prepare_second, dtype=dtype)
        before = {name: value.clone() for name, value in values_of(run.model).items()}
        run.go(batches(1))
        run.finish()
        after = values_of(run.model)
        run.end()
        return before, after

    def all_of_it(model):
        model.requires_grad_(True)

    before, after = values_after(all_of_it)
    kept, _ = values_after(only_norms)
    assert before.keys() == kept.keys()
    for name, value in before.items():
        assert torch.equal(value, kept[name]), name
        assert not torch.equal(after[name], value), name


@pytest.mark.parametrize("twin", [False, True], ids=["here", "device"])
def test_a_frozen_part_that_did_not_arrive_is_read_again(twin, folder, tmp_path, monkeypatch):
    """It is only in the files: what the commit gave back is whole without it."""
    if twin:
        with_twin(monkeypatch)
    run = Loaded(tmp_path, folder, prepare=only_norms, home="host")
    run.go(batches(STEPS))
    run.finish()
    values = values_of(run.model)
    run.end()
    again = Loaded(tmp_path, folder, prepare=only_norms, home="host")
    real, failures = WeightReader._read_entries, []

    def fail_once(reader, record, entries, plane):
        if entries and record.num_trainable and not failures:
            failures.append(record.name)
            raise StorageError("injected")
        real(reader, record, entries, plane)

    monkeypatch.setattr(WeightReader, "_read_entries", fail_once)
    with pytest.raises(StorageError, match="injected"):
        again.model(**batches(1)[0])
    assert failures
    for name, value in values_of(again.model).items():
        assert torch.equal(value, values[name]), name
