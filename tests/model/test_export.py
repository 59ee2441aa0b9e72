import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, load_model

from outsize.errors import StorageError, StorageFullError, UsageError
from outsize.model import Existing, SafetensorsSource, TensorSource, cut, open_skeleton, write_folder
from tests.model.helpers import read, stored
from tests.pairs import pairwise
from tests.zoo import ZOO, plain_stack


def fetch_from(source, dtype=torch.float32):
    """One buffer for all blocks: a tensor is valid until the next call only."""
    buffer = torch.empty(1 << 20, dtype=dtype)

    def fetch(block):
        buffer.fill_(float("nan"))
        targets, start = [], 0
        for piece in block.pieces:
            targets.append(buffer[start : start + piece.num_elements].view(piece.shape))
            start += piece.num_elements
        source.read(block, targets)
        return targets

    return fetch


def write(model, path, **options):
    source = TensorSource(dict(model.named_parameters()))
    return write_folder(
        model, cut(model, options.pop("limit", None)).blocks, fetch_from(source), path, **options
    )


@pairwise(name=ZOO.keys(), shard=[10**9, 20_000], loaded=[True, False])
def test_round_trip(name, shard, loaded, tmp_path):
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    if loaded:
        skeleton = open_skeleton(tmp_path / "a", torch.float32)
        source = SafetensorsSource(tmp_path / "a", skeleton)
        blocks = cut(skeleton, 1).blocks
        write_folder(skeleton, blocks, fetch_from(source), tmp_path / "b", max_shard_bytes=shard)
    else:
        write(model, tmp_path / "b", max_shard_bytes=shard)
    want, have = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) and want[key].dtype == have[key].dtype for key in want)
    if shard == 10**9:
        assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
    again, info = type(model).from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation=model.config._attn_implementation
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (_, value), (_, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(value, expected)
    batch = ZOO[name].batch()
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_type_is_chosen_or_that_of_the_first_block(tmp_path):
    model = ZOO["llama"].build(dtype=torch.bfloat16)
    source = TensorSource(dict(model.named_parameters()))
    blocks = cut(model).blocks
    write_folder(model, blocks, fetch_from(source, torch.bfloat16), tmp_path / "a")
    write_folder(model, blocks, fetch_from(source, torch.float32), tmp_path / "b", dtype=torch.bfloat16)
    for folder in ("a", "b"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
        again = type(model).from_pretrained(tmp_path / folder)
        assert all(
            torch.equal(a, b) and a.dtype == torch.bfloat16
            for a, b in zip(again.parameters(), model.parameters(), strict=True)
        )


def test_losing_precision_unasked_is_refused(tmp_path):
    model = ZOO["llama"].build()
    source = TensorSource(dict(model.named_parameters()))
    blocks = cut(model).blocks

    def mixed(block):
        return read(source, block, torch.bfloat16 if block is blocks[0] else torch.float32)

    with pytest.raises(UsageError, match=r"precision would be lost[\s\S]*dtype="):
        write_folder(model, blocks, mixed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_folder(model, blocks, mixed, tmp_path / "out", dtype=torch.float32)


def test_tokenizer_files_are_copied_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "vocab.json",
    }
    copied |= {"tokenizer.model", "chat_template.jinja", "preprocessor_config.json"}
    for name in copied:
        (source / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "README.md", "tokenizer.bin"):
        (source / name).write_text("no")
    out = write(ZOO["llama"].build(), tmp_path / "out", tokenizer_from=source)
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == copied | written


def test_settings_that_transformers_will_not_save_are_kept(tmp_path):
    model = ZOO["llama"].build()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    write(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5


def test_plain_module_gives_one_file(tmp_path):
    model, other = plain_stack(), plain_stack(1)
    write(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    load_model(other, tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_taken_folder_is_refused_unless_told(tmp_path):
    model = ZOO["llama"].build()
    out = tmp_path / "out"
    out.mkdir()
    write(model, out)
    (out / "mine").write_text("")
    with pytest.raises(UsageError, match=r"is not empty[\s\S]*overwrite=True"):
        write(model, out)
    write(model, out, existing=Existing.REPLACE)
    assert not (out / "mine").exists()
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(UsageError, match="is not a folder"):
        write(model, out / "config.json", existing=Existing.REPLACE)


def test_saving_over_the_folder_that_is_read(tmp_path):
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    skeleton = open_skeleton(tmp_path / "a", torch.float32)
    source = SafetensorsSource(tmp_path / "a", skeleton)
    write_folder(
        skeleton,
        cut(skeleton).blocks,
        fetch_from(source),
        tmp_path / "a",
        tokenizer_from=tmp_path / "a",
        existing=Existing.REPLACE,
    )
    assert (tmp_path / "a" / "tokenizer.json").exists()
    again = type(model).from_pretrained(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, overwrite):
    model = ZOO["llama"].build()
    out = tmp_path / "out"
    if overwrite:
        write(model, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()} if overwrite else {}
    source = TensorSource(dict(model.named_parameters()))

    def failing(block):
        if block.name == "L01":
            raise KeyboardInterrupt
        return read(source, block)

    with pytest.raises(KeyboardInterrupt):
        write_folder(
            model,
            cut(model).blocks,
            failing,
            out,
            existing=Existing.REPLACE if overwrite else Existing.REFUSE,
        )
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, StorageFullError), (errno.EIO, StorageError)])
@pytest.mark.parametrize("function", ["pwrite", "fsync", "rename"])
def test_a_failing_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, code, error, function):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(error, match=str(tmp_path)):
        write(ZOO["llama"].build(), tmp_path / "out")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    model, fetched = ZOO["llama"].build(), []
    source = TensorSource(dict(model.named_parameters()))

    def fetch(block):
        fetched.append(block.name)
        return read(source, block)

    # Room for all but the last element.
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) - 4
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=num_bytes, f_frsize=1, f_blocks=1 << 40)
    )
    with pytest.raises(StorageFullError, match=f"{tmp_path / 'out'}: .* are to be written, .* are free"):
        write_folder(model, cut(model).blocks, fetch, tmp_path / "out", dtype=torch.float32)
    assert not fetched and os.listdir(tmp_path) == []


def test_files_are_as_safetensors_wants_them(tmp_path):
    out = write(ZOO["albert"].build(), tmp_path / "out")
    content = (out / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == len(content) - 8 - size
    load_file(out / "model.safetensors")
