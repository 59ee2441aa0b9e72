"""The folder of a store: whose it is, what is refused, and what may happen to it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash

import outsize
from outsize.checkpoint.catalogue import contents, verify
from outsize.checkpoint.files import Header, commit_paths, plan_slabs, read_header
from outsize.checkpoint.manifest import Manifest
from outsize.checkpoint.reading import CommitReader, CommitSource
from outsize.checkpoint.store import Store, remove_commit, remove_store
from outsize.cli.main import main
from outsize.errors import ConfigError, CorruptionError, OutsizeError, StorageError
from outsize.tier import Slab
from tests.checkpoint.runs import Run, batches, check_store, manifests
from tests.running import values_of
from tests.seams import abandon


def quiet(block, done, total):
    pass


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A store with the commits of steps 2 and 3; tests change copies of it."""
    torch.set_num_threads(1)  # as the tests that resume from it
    run = Run(tmp_path_factory.mktemp("committed"), keep=2)
    run.go(batches(3))
    run.end()
    return run.path


@pytest.fixture
def store(committed, tmp_path):
    return shutil.copytree(committed, tmp_path / "run")


def alter(path, change):
    """A manifest with another content, and the digest that belongs to it."""
    body = json.loads(path.read_text())
    body.pop("digest")
    change(body)
    text = json.dumps(body, separators=(",", ":"))
    path.write_text(f'{text[:-1]},"digest":"{xxhash.xxh3_128_hexdigest(text.encode())}"}}\n')


def test_a_manifest_is_what_was_written(store):
    path = commit_paths(store)[-1]
    manifest = Manifest.loads(path.read_bytes(), path)
    assert manifest.dumps() == path.read_bytes()
    assert manifest == Manifest.loads(manifest.dumps(), path)


def test_every_altered_byte_of_a_manifest_is_found(store):
    path = commit_paths(store)[-1]
    data = path.read_bytes()
    for index in range(0, len(data) - 1, max(1, len(data) // 400)):
        altered = bytearray(data)
        altered[index] ^= 1
        with pytest.raises(OutsizeError):
            Manifest.loads(bytes(altered), path)
    for length in range(0, len(data) - 1, max(1, len(data) // 100)):
        with pytest.raises(OutsizeError):
            Manifest.loads(data[:length], path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=99), "version 99"),
        (lambda body: body.update(format="other"), "format"),
        (lambda body: body.pop("blocks"), "blocks"),
        (lambda body: body["blocks"][0].pop("cells"), "cells"),
        (lambda body: body["blocks"][0]["cells"].pop(), "cells"),
        (lambda body: body["blocks"][0]["cells"][0].__setitem__(2, 17), "cells"),
        (lambda body: body["blocks"][0]["cells"][0].__setitem__(2, 1 << 40), "does not have"),
        (lambda body: body["blocks"][0]["cells"][0].__setitem__(3, []), "digests"),
        (lambda body: body["blocks"][0]["state"].append("soul"), "soul"),
        (
            lambda body: body["blocks"][1]["cells"][0].__setitem__(2, body["blocks"][2]["cells"][0][2]),
            "given to another",
        ),
        (lambda body: body.update(step=77), "step 77"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_by_name(change, message, store, tmp_path):
    alter(commit_paths(store)[-1], change)
    with pytest.raises(OutsizeError, match=message):
        Run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "no object"),
        ('{"format": "x"}', "format"),
        ('{"format": "outsize-store", "version": 9}', "version 9"),
        ('{"format": "outsize-store", "version": 1, "data": ["data"]}', "slabs"),
        ('{"format": "outsize-store", "version": 1, "data": [], "slabs": []}', "names no data"),
        (
            '{"format": "outsize-store", "version": 1, "data": ["data"], "slabs": '
            '[{"offset": 0, "extent_bytes": 4096, "count": 2}, {"offset": 4096, "extent_bytes": 4096, "count": 2}]}',
            "overlap",
        ),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(text, message, store, tmp_path):
    (store / "store.json").write_text(text)
    with pytest.raises(OutsizeError, match=message):
        Run(tmp_path)
    with pytest.raises(OutsizeError, match=message):
        contents(store)


def test_commits_without_a_header_are_refused(store, tmp_path):
    (store / "store.json").unlink()
    with pytest.raises(OutsizeError, match=r"no store\.json|something else"):
        Run(tmp_path)


def test_data_that_is_gone_or_cut_is_named(store, tmp_path):
    data = store / "data"
    kept = data.read_bytes()
    data.unlink()
    with pytest.raises(StorageError, match="data"):
        verify(store, None, quiet)
    data.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CorruptionError, match="reach to"):
        verify(store, None, quiet)
    with pytest.raises(CorruptionError, match="reach to"):
        Run(tmp_path, keep=2)
    assert len(manifests(store)) == 2
    assert len(data.read_bytes()) == len(kept) // 2, "nothing was done to it"


@pytest.mark.parametrize("which", [0, -1])
def test_a_flipped_bit_is_found_and_named(which, store, tmp_path):
    manifest = manifests(store)[-1]
    block = manifest.blocks[1]
    cell = block.cells[which]
    with (store / "data").open("r+b") as file:
        file.seek(cell.offset + 100)
        byte = file.read(1)
        file.seek(cell.offset + 100)
        file.write(bytes([byte[0] ^ 1]))
    plane = "weight" if which == 0 else "state"
    with pytest.raises(CorruptionError, match=rf"{block.record.name}\.{plane}"):
        verify(store, None, quiet)
    before = manifests(store)[0]
    verify(store, before.step, quiet)
    run = Run(tmp_path, keep=2)
    with pytest.raises(CorruptionError, match=rf"{block.record.name}\.{plane}"):
        run.go(batches(2, first=3))
        run.finish()
    abandon(run.model)


def test_a_store_may_be_moved(store, tmp_path):
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(store, moved)
    verify(moved, None, quiet)
    run = Run(moved.parent, keep=2)
    assert run.resumed.step == 3
    run.go(batches(1, first=3))
    run.end()
    assert manifests(moved)[-1].step == 4


def test_a_copy_of_a_store_is_a_store(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    verify(copy, None, quiet)


def test_data_on_several_drives_is_found_where_the_header_says(tmp_path):
    drives = [tmp_path / name for name in ("one", "two")]
    for drive in drives:
        drive.mkdir()
    run = Run(tmp_path, disk=[str(drive) for drive in drives])
    losses = run.go(batches(3))
    run.end()
    header = read_header(run.path)
    assert len(header.data) == 2 and all(os.path.isabs(name) for name in header.data)
    verify(run.path, None, quiet)
    again = Run(tmp_path, disk=[str(drive) for drive in drives])
    losses += again.go(batches(2, first=3))
    again.end()
    plain = Run(tmp_path, "plain", disk=[str(drive) for drive in drives])
    assert plain.go(batches(5), every=0) == losses
    drives[1].rename(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"gone|does not exist|cannot be read"):
        verify(run.path, None, quiet)


OTHER_PROCESS = """
import sys
from pathlib import Path
from outsize.checkpoint.store import Store
from outsize.errors import StorageError
for line in sys.stdin:
    try:
        store = Store.claim(Path(line.strip()), 1)
        print("claimed", flush=True)
    except StorageError as error:
        print(str(error).splitlines()[0], flush=True)
"""


def test_a_store_has_one_process_until_that_ends(tmp_path):
    """A second one is refused with the first one's pid; the lock of one that was killed is taken over."""
    run = Run(tmp_path)
    run.go(batches(1))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OTHER_PROCESS], stdin=pipe, stdout=pipe, text=True) as other:

        def claim():
            other.stdin.write(f"{run.path}\n")
            other.stdin.flush()
            return other.stdout.readline()

        assert f"process {os.getpid()}" in claim()
        with pytest.raises(StorageError, match="in use"):
            remove_store(run.path)
        run.end()
        assert claim() == "claimed\n"
        with pytest.raises(StorageError, match=f"process {other.pid}"):
            Run(tmp_path)
        other.kill()
    Run(tmp_path).end(finish=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        Run(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="no checkpoint"):
        remove_store(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        Store.claim(folder / "thesis.txt", 1)
    with pytest.raises(ConfigError, match="no checkpoint"):
        contents(folder)


@pytest.mark.parametrize("names", [("data/x", "model/y"), ("commits/one.json",), ("lock", "data/x")])
def test_a_folder_with_names_like_ours_is_left_alone(names, tmp_path):
    for name in names:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        Run(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint"):
        remove_store(tmp_path / "run")
    assert all((tmp_path / "run" / name).read_text() == "years of work" for name in names)


@pytest.mark.parametrize(
    "names", [(), ("commits/",), ("commits/", "lock"), ("commits/", "lock", "data", ".store.json.partial")]
)
def test_the_beginnings_of_a_store_are_taken_over(names, tmp_path):
    (tmp_path / "run").mkdir()
    for name in names:
        path = tmp_path / "run" / name
        path.mkdir() if name.endswith("/") else path.touch()
    run = Run(tmp_path)
    run.go(batches(1))
    run.end()
    verify(run.path, None, quiet)


def test_what_a_killed_process_left_half_written_goes(store, tmp_path):
    (store / "commits" / ".000000000004.json.partial").write_text("{")
    (store / ".store.json.partial").write_text("{")
    Run(tmp_path, keep=2).end(finish=False)
    assert not list(store.rglob("*.partial"))


def test_one_commit_and_all_can_be_removed(store, tmp_path):
    first = manifests(store)[0].step
    remove_commit(store, first)
    assert [manifest.step for manifest in manifests(store)] == [3]
    run = Run(tmp_path, keep=2)
    run.go(batches(2, first=3))
    run.finish()
    run.versions.check_books()
    run.end()
    check_store(store)
    remove_store(store)
    assert not store.exists()


def test_a_store_that_is_removed_takes_nothing_else_with_it(store, tmp_path, capsys):
    (store / "notes.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(store)
    assert main(["checkpoint", "remove", str(link), "--all"]) == 0
    assert "MiB are free again" in capsys.readouterr().out
    assert [path.name for path in store.iterdir()] == ["notes.txt"]
    assert main(["checkpoint", "remove", str(link), "--all"]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert [path.name for path in store.iterdir()] == ["notes.txt"]
    (store / "notes.txt").unlink()
    run = Run(tmp_path, link.name)
    run.go(batches(1))
    run.end()
    remove_store(link)
    assert store.is_dir() and not list(store.iterdir()), "the link leads somewhere"
    Run(tmp_path).end(finish=False)


@pytest.mark.parametrize("text", ["{", None])
def test_a_store_without_a_usable_header_can_be_removed(text, store, capsys):
    if text is None:
        (store / "store.json").unlink()
    else:
        (store / "store.json").write_text(text)
    assert main(["checkpoint", "remove", str(store), "--all"]) == 0
    assert not store.exists()


def test_a_kill_while_a_store_is_removed_leaves_nothing_that_names_missing_bytes(store, monkeypatch):
    """Whatever is removed last, what is there before it is a whole store, or one that can be removed again."""
    copies = 0
    unlink = Path.unlink

    def killed(path, missing_ok=False):
        nonlocal copies
        if path.exists() and store in path.parents:
            copies += 1
            copy = store.with_name(f"copy{copies}")
            shutil.copytree(store, copy)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        remove_store(store)
    assert copies == 7, "two commits with their buffers, data, header, lock"
    for number in range(1, copies + 1):
        copy = store.with_name(f"copy{number}")
        if (copy / "store.json").exists():
            for found in contents(copy).commits:
                verify(copy, found.step, quiet)
        remove_store(copy)
        assert not copy.exists()


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path):
    run = Run(tmp_path, disk=(str(tmp_path), "1MiB"), keep=3)
    with pytest.raises(outsize.OutsizeError, match="on disk") as caught:
        run.go(batches(1))
    assert "MiB" in caught.value.hint
    assert not (run.path / "data").exists()


def test_slabs_are_kept_grown_and_given_back():
    slabs, gone = plan_slabs((), {4096: 4, 8192: 2}, set())
    assert slabs == (Slab(0, 4096, 4), Slab(16384, 8192, 2)) and not gone
    more, gone = plan_slabs(slabs, {4096: 6, 8192: 2}, set())
    assert more == (*slabs, Slab(32768, 4096, 2)) and not gone
    less, gone = plan_slabs(more, {4096: 6}, {16384})
    assert less == more and not gone, "a commit holds an extent of it"
    less, gone = plan_slabs(more, {4096: 6}, set())
    assert less == (slabs[0], Slab(32768, 4096, 2))
    assert [(extent.offset, extent.num_bytes) for extent in gone] == [(16384, 16384)]
    header = Header(("data",), less)
    assert Header.loads(header.dumps(), None) == header
    assert replace(header, slabs=()).num_bytes == 0


class _Wide(torch.nn.Module):
    """A layer whose record is longer than a chunk. Nothing updates `tied`: in fp32, halfway between two values of bf16."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(1024, 1100)
        self.narrow = torch.nn.Linear(1100, 1024)
        self.tied = torch.nn.Parameter(torch.full((1024,), 1 + 2**-8))

    def forward(self, hidden):
        return hidden + self.narrow(torch.relu(self.wide(hidden))) + 0 * self.tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_records_are_read_from_a_commit_in_the_type_they_computed_in(dtype, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(_Wide() for _ in range(2))
    model.forward = lambda hidden: model.layers[1](model.layers[0](hidden)).square().mean()
    outsize.wrap(model, disk=str(tmp_path), home="disk", dtype=dtype)
    optimizer = outsize.AdamW(model, lr=1e-3, weight_decay=0)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    model(torch.randn(2, 1024, dtype=dtype)).backward()
    optimizer.step()
    outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    outsize.checkpoint.finish(model)
    values = values_of(model)
    (manifest,) = manifests(tmp_path / "run")
    with CommitReader(tmp_path / "run", read_header(tmp_path / "run"), manifest) as reader:
        for stored in manifest.blocks:
            pieces = stored.record.block.pieces
            targets = [torch.empty(piece.shape, dtype=dtype) for piece in pieces]
            CommitSource(reader, None).read(stored.record.block, targets)
            for piece, target in zip(pieces, targets, strict=True):
                assert target.equal(values[piece.parameter].to(dtype)), piece
