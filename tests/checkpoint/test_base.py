"""The model's own files hold what a commit does not: other weights in their place are never taken in silence."""

import json
import shutil

import pytest
import torch
import xxhash
from safetensors.torch import load_file

import outsize
from outsize.checkpoint.base import Base
from outsize.checkpoint.catalogue import describe, verify
from outsize.checkpoint.export import export
from outsize.checkpoint.files import commit_paths
from outsize.cli.main import main
from outsize.errors import FileChangedError
from outsize.model import file_digests
from tests.checkpoint.runs import batches, manifests
from tests.checkpoint.test_export import Loaded, saved_model
from tests.running import values_of
from tests.weight_files import CHANGES, replace, rewrite, truncate, unlink


def only_one_layer(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)


@pytest.fixture
def folder(tmp_path):
    return saved_model(tmp_path)


def opened(tmp_path, folder, **options):
    return Loaded(tmp_path, folder, prepare=only_one_layer, **options)


def committed(tmp_path, folder):
    """A store with a commit of which most blocks are in `folder` alone, and the values of all parameters."""
    run = opened(tmp_path, folder)
    run.go(batches(2))
    run.finish()
    values = values_of(run.model)
    run.end()
    return run.path, values


changed = pytest.mark.parametrize(("change", "said"), CHANGES.items())


@changed
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_run_does_not_start_with_files_that_changed(change, said, is_trained, folder, tmp_path):
    model = outsize.load(folder, disk=tmp_path, home="disk", dtype="float32")
    if is_trained:
        outsize.AdamW(model.train(), lr=1e-3)
    change(folder)
    with pytest.raises(FileChangedError, match=said) as caught:
        model(**batches(1)[0])
    assert caught.value.hint


@pytest.mark.parametrize("change", [replace, unlink])
@pytest.mark.parametrize("home", ["disk", "host"])
def test_who_holds_the_descriptor_keeps_the_weights(change, home, folder, tmp_path):
    model = outsize.load(folder, disk=tmp_path, home=home, dtype="float32")
    batch = batches(1)[0]
    with torch.no_grad():
        expected = model(**batch).logits.clone()
        change(folder)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("change", "said"), [(truncate, "was cut short since"), (rewrite, "was written to since")]
)
def test_a_file_that_is_written_to_while_weights_stream_from_it_is_named(change, said, folder, tmp_path):
    model = outsize.load(folder, disk=tmp_path, home="disk", dtype="float32")
    batch = batches(1)[0]
    with torch.no_grad():
        model(**batch)
        change(folder)
        with pytest.raises(FileChangedError, match=said):
            model(**batch)


@pytest.mark.parametrize("change", [truncate, rewrite])
def test_other_weights_are_never_saved(change, folder, tmp_path):
    model = outsize.load(folder, disk=tmp_path, home="disk", dtype="float32")
    change(folder)
    with pytest.raises(FileChangedError):
        outsize.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@changed
def test_a_commit_that_needs_files_that_changed_says_so_by_name(change, said, folder, tmp_path):
    run = opened(tmp_path, folder)
    run.go(batches(1))
    run.finish()
    run.go(batches(1, first=1), every=0)
    change(folder)
    with pytest.raises(FileChangedError, match=f"{said}.*never updated") as caught:
        outsize.checkpoint.commit(run.model, run.optimizer, run.path)
    assert "outsize.save" in caught.value.hint
    assert [manifest.step for manifest in manifests(run.path)] == [1]


def test_a_commit_that_stores_all_blocks_needs_no_file(folder, tmp_path):
    run = Loaded(tmp_path, folder)
    run.go(batches(2))
    unlink(folder)
    run.go(batches(1, first=2))
    assert run.finish().step == 3
    (manifest,) = manifests(run.path)
    assert manifest.is_whole and manifest.base.folder == folder and not manifest.base.files
    verify(run.path, None, lambda *told: None)


@changed
def test_a_run_does_not_resume_with_files_that_changed_since_they_were_opened(change, said, folder, tmp_path):
    committed(tmp_path, folder)
    model = outsize.load(folder, disk=tmp_path, home="disk", dtype="float32").train()
    only_one_layer(model)
    optimizer = outsize.AdamW(model, lr=1e-3)
    change(folder)
    with pytest.raises(FileChangedError, match=said):
        outsize.checkpoint.resume(model, optimizer, tmp_path / "run")


def grow(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")


def rename_a_tensor(folder):
    """In a header of as many bytes."""
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"pt"', b'"tf"', 1))


SINCE = {
    replace: "holds other weights than it did",
    rewrite: "holds other weights than it did",
    grow: r"has \d+ bytes, and had \d+",
    rename_a_tensor: "holds other tensors than it did",
    unlink: "is missing",
}


@pytest.mark.parametrize(("change", "said"), SINCE.items())
def test_files_that_are_not_those_of_the_commit_are_named(change, said, folder, tmp_path, capsys):
    store, _ = committed(tmp_path, folder)
    change(folder)
    message = rf"{folder}/model\.safetensors {said}.*: the commit takes weights from there"
    if change is not unlink:
        with pytest.raises(FileChangedError, match=message) as caught:
            opened(tmp_path, folder)
        assert str(folder) in caught.value.hint
    with pytest.raises(FileChangedError, match=message):
        verify(store, None, lambda *told: None)
    with pytest.raises(FileChangedError, match=message):
        export(store, tmp_path / "exported")
    assert main(["checkpoint", "verify", str(store)]) == 1
    assert "--base" in capsys.readouterr().err


def test_a_file_that_was_added_is_named(folder):
    """It may hold the same tensors with other values."""
    files = file_digests(folder)
    base = Base(folder, files)
    base.check(folder, files)
    with pytest.raises(
        FileChangedError, match=rf"{folder}/model-2\.safetensors was not there: the commit takes"
    ):
        base.check(folder, files | {"model-2.safetensors": files["model.safetensors"]})


def test_a_base_that_was_moved_is_found_under_its_new_path(folder, tmp_path, capsys):
    store, values = committed(tmp_path, folder)
    assert dict(describe(manifests(store)[-1]))["other weights"] == f"in the files of {folder}"
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(FileChangedError, match=rf"{folder}/model\.safetensors is missing"):
        verify(store, None, lambda *told: None)
    verify(store, None, lambda *told: None, base=moved)
    assert main(["checkpoint", "verify", str(store), "--base", str(moved)]) == 0
    assert f"are in {moved}, as they were" in capsys.readouterr().out
    export(store, tmp_path / "exported", base=moved)
    for key, value in load_file(tmp_path / "exported" / "model.safetensors").items():
        assert torch.equal(value, values[key]), key
    run = opened(tmp_path, moved)
    assert run.resumed.step == 2
    run.go(batches(1, first=2))
    run.finish()
    assert manifests(store)[-1].base.folder == moved, "the next commit names where it is now"
    run.end()
    copied = tmp_path / "copied"
    shutil.copytree(moved, copied)
    assert opened(tmp_path, copied).resumed.step == 3


def test_a_commit_of_version_2_names_sizes_alone(folder, tmp_path):
    store, _ = committed(tmp_path, folder)
    (path,) = commit_paths(store)
    body = json.loads(path.read_bytes())
    del body["digest"]
    base = body.pop("base")
    sizes = {name: file[0] for name, file in base["files"].items()}
    body["version"] = 2
    body["run"]["source"] = {"folder": base["folder"], "files": sizes}
    text = json.dumps(body, separators=(",", ":"))
    path.write_text(f'{text[:-1]},"digest":"{xxhash.xxh3_128_hexdigest(text.encode())}"}}\n')
    verify(store, None, lambda *told: None)
    run = opened(tmp_path, folder)
    assert run.resumed.step == 2
    run.end()
    grow(folder)
    for read in (lambda: opened(tmp_path, folder), lambda: verify(store, None, lambda *told: None)):
        with pytest.raises(FileChangedError, match=r"has \d+ bytes, and had"):
            read()
