"""Buffers and extra state: what a `state_dict` has beside parameters is in commits, and comes back from them."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import xxhash
from safetensors.torch import load_file
from torch import nn

import outsize
from outsize.checkpoint import files, store
from outsize.checkpoint.catalogue import describe, verify
from outsize.checkpoint.dcp import export_dcp, import_dcp
from outsize.checkpoint.export import export
from outsize.checkpoint.files import commit_paths, read_header, read_manifest
from outsize.checkpoint.store import remove_commit
from outsize.errors import CorruptionError, StorageError
from tests.zoo import plain_batch, plain_stack

MEAN = "resnet.embedder.embedder.normalization.running_mean"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with buffers, whose folder says 7."""
    path = tmp_path_factory.mktemp("resnet")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    model.get_buffer(MEAN).fill_(7.0)
    model.save_pretrained(path)
    return path


def opened(folder, disk):
    model = outsize.load(folder, disk=disk, dtype="float32").train()
    return model, outsize.AdamW(model, lr=1e-3)


def step(model, optimizer):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def run(folder, tmp_path):
    """A store with one commit, and the buffers that the model had when it was made."""
    model, optimizer = opened(folder, tmp_path)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    step(model, optimizer)
    outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.get_buffer(MEAN).fill_(-1.0)  # after the commit
    outsize.checkpoint.finish(model)
    outsize.checkpoint.close(model)
    assert not torch.equal(buffers[MEAN], torch.full((8,), 7.0))
    return tmp_path / "run", buffers


def assert_same(found, expected):
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


def test_commits_and_exports_have_the_buffers_of_their_moment(run, folder, tmp_path):
    path, buffers = run
    model, optimizer = opened(folder, tmp_path)
    outsize.checkpoint.resume(model, optimizer, path)
    assert_same(dict(model.named_buffers()), buffers)
    outsize.checkpoint.close(model)
    export(path, tmp_path / "exported")
    assert_same(load_file(tmp_path / "exported" / "model.safetensors"), buffers)
    verify(path, None, lambda *figures: None)
    assert dict(describe(read_manifest(commit_paths(path)[0], read_header(path))))["buffers"]


def test_buffers_go_to_dcp_and_back(run, folder, tmp_path):
    path, buffers = run
    export_dcp(path, tmp_path / "dcp")
    found = {"model": {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(found["model"], buffers)
    import_dcp(tmp_path / "dcp", tmp_path / "imported", model=folder)
    model, optimizer = opened(folder, tmp_path)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "imported")
    assert_same(dict(model.named_buffers()), buffers)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"other")])
def test_damaged_buffers_are_named(damage, run, folder, tmp_path):
    path, _ = run
    (buffers,) = (path / "commits").glob("*.safetensors")
    damage(buffers)
    with pytest.raises(CorruptionError, match=r"000001\.safetensors"):
        verify(path, None, lambda *figures: None)
    model, optimizer = opened(folder, tmp_path)
    with pytest.raises(CorruptionError, match=r"000001\.safetensors"):
        outsize.checkpoint.resume(model, optimizer, path)


def test_a_store_of_version_1_goes_on_with_the_buffers_of_the_folder(run, folder, tmp_path):
    path, _ = run
    (manifest,) = commit_paths(path)
    body = json.loads(manifest.read_bytes())
    for key in ("digest", "buffers", "extra_state"):
        del body[key]
    body["version"] = 1
    base = body.pop("base")
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    body["run"]["source"] = {"folder": base["folder"], "files": sizes}
    text = json.dumps(body, separators=(",", ":"))
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    manifest.write_text(f'{text[:-1]},"digest":"{digest}"}}\n')
    manifest.with_suffix(".safetensors").unlink()
    export(path, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported[MEAN], torch.full((8,), 7.0))
    model, optimizer = opened(folder, tmp_path)
    with pytest.warns(RuntimeWarning, match="the commit has no buffers"):
        outsize.checkpoint.resume(model, optimizer, path)
    assert torch.equal(model.get_buffer(MEAN), torch.full((8,), 7.0))


def test_a_commit_whose_buffers_cannot_be_written_leaves_the_one_before(run, folder, tmp_path, monkeypatch):
    path, _ = run
    model, optimizer = opened(folder, tmp_path)
    outsize.checkpoint.resume(model, optimizer, path)
    write = files.write_durably

    def failing(place, data):
        if place.suffix == ".safetensors":
            raise StorageError("no space")
        write(place, data)

    monkeypatch.setattr(store, "write_durably", failing)
    step(model, optimizer)
    outsize.checkpoint.commit(model, optimizer, path)
    with pytest.raises(StorageError, match="no space"):
        outsize.checkpoint.finish(model)
    outsize.checkpoint.close(model)
    assert [place.stem for place in commit_paths(path)] == ["000000000001"]
    verify(path, None, lambda *figures: None)


def test_buffers_go_with_their_manifest(run, folder, tmp_path):
    path, _ = run
    orphan = path / "commits" / "000000000009.safetensors"
    orphan.write_bytes(b"of a commit that a kill cut short")
    model, optimizer = opened(folder, tmp_path)
    outsize.checkpoint.resume(model, optimizer, path)
    assert not orphan.exists()
    outsize.checkpoint.close(model)
    remove_commit(path, 1)
    assert not list((path / "commits").iterdir())


class Counting(nn.Module):
    """A module with extra state of its own kind."""

    def __init__(self, value):
        super().__init__()
        self.stack, self.value = plain_stack(), value

    def forward(self, *args, **kwargs):
        return self.stack(*args, **kwargs)

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def wrapped(value, disk):
    model = outsize.wrap(Counting(value), disk=disk)
    return model, outsize.AdamW(model, lr=1e-3)


@pytest.mark.parametrize("value", [{"seen": [3, 4]}, torch.arange(3)])
def test_extra_state_comes_back(value, tmp_path):
    model, optimizer = wrapped(value, tmp_path)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    model(**plain_batch()).backward()
    optimizer.step()
    outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    outsize.checkpoint.finish(model)
    outsize.checkpoint.close(model)
    again, optimizer = wrapped(None, tmp_path)
    outsize.checkpoint.resume(again, optimizer, tmp_path / "run")
    found = again.value
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("value", [object(), {1: "a key that JSON makes a text"}])
def test_extra_state_that_cannot_be_committed_is_refused_at_once(value, tmp_path):
    model, optimizer = wrapped(value, tmp_path)
    with pytest.raises(StorageError, match=r"_extra_state, the extra state of Counting"):
        outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
