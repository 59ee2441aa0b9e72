"""A commit as a Hugging Face folder, and for torch.distributed.checkpoint."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import outsize
from outsize.checkpoint import catalogue
from outsize.checkpoint import export as export_module
from outsize.checkpoint.catalogue import contents, verify
from outsize.checkpoint.export import export
from outsize.checkpoint.files import read_manifest
from outsize.checkpoint.reading import CommitReader, CommitReplaced
from outsize.errors import ConfigError, CorruptionError, StorageError, StorageFullError
from tests.checkpoint.runs import Run, batches, manifests
from tests.running import adamw, train, values_of
from tests.zoo import ZOO


def saved_model(folder, name="llama"):
    """An ordinary Hugging Face folder."""
    path = folder / "model"
    ZOO[name].build().save_pretrained(path)
    return path


class Loaded(Run):
    """As `Run`, of a model that was loaded from a folder."""

    def __init__(self, folder, model, store="run", *, prepare=None, optimizer=adamw, **options):
        self.model = outsize.load(
            model, disk=str(folder), **{"home": "disk", "dtype": "float32", **options}
        ).train()
        if prepare is not None:
            prepare(self.model)
        self.optimizer = optimizer(self.model)
        self.path = folder / store
        self.keep = 1
        self.resumed = outsize.checkpoint.resume(self.model, self.optimizer, self.path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_tied"])
def test_an_exported_commit_is_what_save_writes(name, dtype, tmp_path):
    name = name if name in ZOO else "llama"
    run = Loaded(tmp_path, saved_model(tmp_path, name), dtype=dtype)
    run.go(batches(3, name))
    run.finish()
    outsize.save(run.model, tmp_path / "saved")
    export(run.path, tmp_path / "exported")
    ours = load_file(tmp_path / "exported" / "model.safetensors")
    theirs = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert (tmp_path / "exported" / "config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_masters_can_be_exported_exactly(tmp_path):
    run = Loaded(tmp_path, saved_model(tmp_path), dtype="bfloat16")
    run.go(batches(3))
    run.finish()
    export(run.path, tmp_path / "bf16")
    export(run.path, tmp_path / "fp32", dtype="float32")
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    differ = 0
    for key, value in exact.items():
        assert value.dtype is torch.float32
        close = (value - rounded[key].float()).abs() <= value.abs() / 128
        assert close.all(), key
        differ += int((value != rounded[key].float()).sum())
    assert differ


def test_what_was_never_updated_comes_from_the_models_own_files(tmp_path):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name)

    folder = saved_model(tmp_path)
    run = Loaded(tmp_path, folder, prepare=freeze)
    run.go(batches(3))
    run.finish()
    assert any(not block.is_stored for block in manifests(run.path)[-1].blocks)
    export(run.path, tmp_path / "exported")
    values = values_of(run.model)
    for key, value in load_file(tmp_path / "exported" / "model.safetensors").items():
        assert torch.equal(value, values[key]), key
    run.end()
    again = Loaded(tmp_path, folder, prepare=freeze)
    assert again.resumed.step == 3
    again.end()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"x")
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        export(run.path, tmp_path / "again")
    ZOO["llama"].build().to(torch.bfloat16).save_pretrained(folder)
    with pytest.raises(StorageError, match="never updated"):
        Loaded(tmp_path, folder, prepare=freeze)


def test_a_commit_that_is_not_there_is_named(tmp_path):
    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(1))
    run.finish()
    with pytest.raises(ConfigError, match="no commit of step 7"):
        export(run.path, tmp_path / "out", step=7)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("x")
    with pytest.raises(outsize.OutsizeError):
        export(run.path, tmp_path / "out")
    assert (tmp_path / "out" / "thesis").exists()


def test_an_export_for_fsdp_holds_one_piece_at_a_time(tmp_path, monkeypatch):
    """Tables are written by rows, and nothing stays in memory that was written."""
    from outsize.checkpoint import dcp as own

    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(1))
    run.finish()
    given = []
    real = own._Values.value

    def spy(values, key, piece):
        assert not any(value.untyped_storage().nbytes() for value in given)
        given.append(real(values, key, piece))
        return given[-1]

    monkeypatch.setattr(own._Values, "value", spy)
    own.export_dcp(run.path, tmp_path / "dcp")
    metadata = dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    tables = [entry for key, entry in metadata.items() if "embed_tokens" in key and hasattr(entry, "chunks")]
    assert sum(len(entry.size) == 2 and len(entry.chunks) > 1 for entry in tables) == 3
    assert max(value.numel() for value in given) < max(entry.size.numel() for entry in tables)


def test_an_export_for_fsdp_without_room_is_refused_before_it_begins(tmp_path, monkeypatch):
    from outsize.checkpoint import dcp as own

    run = Loaded(tmp_path, saved_model(tmp_path, "llama_tied"))
    run.go(batches(1, "llama"))
    run.finish()
    (tmp_path / "out").mkdir()
    # Masters, under both names of a tied weight, and two moments; room for all but the last element.
    elements = sum(p.numel() for p in run.model.parameters())
    tied = run.model.lm_head.weight.numel()
    room = SimpleNamespace(f_bavail=4 * (3 * elements + tied) - 4, f_frsize=1, f_blocks=1 << 40)
    monkeypatch.setattr(own.os, "statvfs", lambda path: room)
    monkeypatch.setattr(own, "save", lambda *arguments, **options: pytest.fail("began to write"))
    with pytest.raises(StorageFullError, match=r"are to be written, .* are free on its disk"):
        own.export_dcp(run.path, tmp_path / "out" / "dcp")
    assert list((tmp_path / "out").iterdir()) == []
    room.f_bavail += 4 + 256  # the steps
    with pytest.raises(pytest.fail.Exception, match="began to write"):
        own.export_dcp(run.path, tmp_path / "out" / "dcp")


def test_fsdp_users_can_read_an_exported_commit(tmp_path):
    """The folder loads into a plain model and torch's AdamW through torch's own state-dict functions, and goes on."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from outsize.checkpoint.dcp import export_dcp

    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(4))
    run.finish()
    export_dcp(run.path, tmp_path / "dcp")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    optimizer = adamw(plain)
    plain(**batches(1)[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model_state, optimizer_state = get_state_dict(plain, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(plain, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    values = values_of(run.model)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.detach(), values[name]), name
    ours = run.go(batches(2, first=4))
    theirs = []
    for batch in batches(2, first=4):
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_fsdp_users_can_come(tmp_path):
    """What torch's functions saved becomes a commit that a run goes on from."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from outsize.checkpoint.dcp import import_dcp

    folder = saved_model(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = adamw(plain)

    train(plain, batches(3), optimizer)
    model_state, optimizer_state = get_state_dict(plain, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    import_dcp(tmp_path / "dcp", tmp_path / "run", model=folder)
    (found,) = contents(tmp_path / "run").commits
    shown = dict(catalogue.describe(found.manifest))
    assert shown["step"] == "3" and "learning rate" not in shown, "it is that of who resumes"
    run = Loaded(tmp_path, folder)
    assert run.resumed.step == 3
    assert run.go(batches(3, first=3)) == pytest.approx(
        train(plain, batches(3, first=3), optimizer), rel=1e-5
    )
    run.finish()


def test_an_optimizer_that_torch_does_not_have_is_refused(tmp_path):
    from outsize.checkpoint.dcp import export_dcp

    run = Loaded(tmp_path, saved_model(tmp_path), optimizer=lambda model: outsize.AdamW8bit(model, lr=1e-3))
    run.go(batches(1))
    run.finish()
    with pytest.raises(ConfigError, match="AdamW8bit"):
        export_dcp(run.path, tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


def test_a_damaged_commit_is_named_by_every_export(tmp_path):
    from outsize.checkpoint.dcp import export_dcp

    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(1))
    run.end()
    block = manifests(run.path)[-1].blocks[1]
    with (run.path / "data").open("r+b") as file:
        file.seek(block.cells[0].offset + 100)
        file.write(b"xxxx")
    for write in (export, export_dcp):
        with pytest.raises(CorruptionError, match=rf"{block.record.name}\.weight"):
            write(run.path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class Replacing:
    """Lets `run` replace its commit once a reader has read so many cells: three steps, so that its space is used again."""

    def __init__(self, run, monkeypatch, cells, times=1):
        self.run = run
        self.cells = cells
        self.times = times
        self.read = CommitReader._read_cell
        self.count = 0
        monkeypatch.setattr(CommitReader, "_read_cell", lambda *arguments: self(*arguments))

    def __call__(self, reader, block, index, cell):
        self.count += 1
        if self.count == self.cells and self.times:
            self.times -= 1
            self.count = 0
            self.run.go(batches(3, first=self.run.step))
            self.run.finish()
        return self.read(reader, block, index, cell)


def ways_to_read():
    from outsize.checkpoint.dcp import export_dcp

    return {
        "verify": lambda store, out, step: verify(store, step, lambda *told: None),
        "export": lambda store, out, step: export(store, out, step=step),
        "dcp": lambda store, out, step: export_dcp(store, out, step=step),
    }


@pytest.mark.parametrize("way", ["verify", "export", "dcp"])
def test_a_commit_that_is_replaced_while_it_is_read_is_not_called_damaged(way, tmp_path, monkeypatch):
    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(2))
    run.finish()
    read = ways_to_read()[way]
    with monkeypatch.context() as patch:
        Replacing(run, patch, 3)
        assert read(run.path, tmp_path / "out", None).step == 5, "the newest is read again"
    with monkeypatch.context() as patch:
        Replacing(run, patch, 3)
        with pytest.raises(CommitReplaced, match="commit of step 5 was replaced") as caught:
            read(run.path, tmp_path / "named", 5)
        assert "--keep" in caught.value.hint
    assert not (tmp_path / "named").exists()
    with monkeypatch.context() as patch:
        Replacing(run, patch, 3, times=1000)
        with pytest.raises(CommitReplaced):
            read(run.path, tmp_path / "never", None)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("way", ["contents", "verify"])
def test_a_manifest_that_vanishes_before_it_is_read_is_passed_over(way, tmp_path, monkeypatch):
    run = Loaded(tmp_path, saved_model(tmp_path))
    run.go(batches(2))
    run.finish()

    def replaced_first(path, header=None):
        if int(path.stem) == 2 and path.exists():
            run.go(batches(1, first=2))
            run.finish()
        return read_manifest(path, header)

    for module in (export_module, catalogue):
        monkeypatch.setattr(module, "read_manifest", replaced_first)
    if way == "contents":
        (found,) = contents(run.path).commits
        assert found.step == 3 and found.manifest is not None
    else:
        assert verify(run.path, None, lambda *told: None).step == 3
