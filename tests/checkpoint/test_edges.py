"""What is rare: copies that are slow, errors and interruptions in between, stores that change their form."""

import os
import time
from contextlib import nullcontext

import pytest
import torch

import outsize
from outsize.checkpoint.catalogue import contents, verify
from outsize.checkpoint.store import Store
from outsize.errors import BudgetError, StorageError
from outsize.store.snapshots import Snapshots
from outsize.store.update_job import UpdateJob
from outsize.tier import DiskTier
from tests.checkpoint.runs import Run, batches, check_store, manifests
from tests.running import values_of
from tests.seams import abandon, close_all, num_commits_kept, with_twin


def quiet(block, done, total):
    pass


def frozen_but(name):
    def prepare(model):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameter_name)

    return prepare


def assert_whole(store):
    found = contents(store).commits
    assert found
    for commit in found:
        assert commit.error is None, commit.error
        verify(store, commit.step, quiet)
    check_store(store)


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_commit_waits_for_the_copies_of_the_one_before(place, tmp_path, monkeypatch):
    """Frozen blocks in memory are copied once: a later commit must not note them before that is over."""
    if place == "device":
        with_twin(monkeypatch)
    copy = Snapshots._copy

    def slowly(*args):
        time.sleep(0.02)
        copy(*args)

    monkeypatch.setattr(Snapshots, "_copy", slowly)
    run = Run(tmp_path, keep=3, home=place, prepare=frozen_but("layers.1"))
    run.go(batches(3))
    assert run.finish().step == 3
    assert_whole(run.path)
    run.versions.check_books()
    run.end()
    assert Run(tmp_path, keep=3, home=place, prepare=frozen_but("layers.1")).resumed.step == 3


def test_a_copy_that_fails_fails_its_commit_and_not_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, home="host", keep=2)
    run.go(batches(2))
    run.finish()
    start_write = DiskTier.start_write

    def fail_once(tier, offset, buffer, label):
        monkeypatch.setattr(DiskTier, "start_write", start_write)
        raise StorageError(f"{label}: no luck")

    monkeypatch.setattr(DiskTier, "start_write", fail_once)
    with pytest.raises(StorageError, match="no luck"):
        run.go(batches(3, first=2))
        run.finish()  # a slow machine has not tried to copy before
    assert_whole(run.path)
    run.go(batches(2, first=5), every=0)
    outsize.checkpoint.commit(run.model, run.optimizer, run.path)
    assert run.finish().step == run.step
    run.versions.check_books()
    assert_whole(run.path)


@pytest.mark.parametrize("verb", ["pwritev", "preadv"])
def test_finish_after_an_error_says_it_and_does_not_hang(verb, tmp_path, monkeypatch):
    run = Run(tmp_path, keep=2)
    run.go(batches(2))
    run.finish()  # or the call that fails may be one of the first commit
    call = getattr(os, verb)

    def fail_once(*args):
        monkeypatch.setattr(os, verb, call)
        raise OSError(5, "EIO")

    monkeypatch.setattr(os, verb, fail_once)
    with pytest.raises(StorageError):
        run.go(batches(2, first=2))
    for _ in range(2):
        try:
            run.finish()
        except StorageError:
            continue
    assert_whole(run.path)
    abandon(run.model)


def test_an_interruption_does_not_spoil_the_commit(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.go(batches(2))
    wait = UpdateJob.wait_applied

    def interrupt(job):
        monkeypatch.setattr(UpdateJob, "wait_applied", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(UpdateJob, "wait_applied", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.go(batches(1, first=2))
    assert run.finish().step == 2
    assert_whole(run.path)


def test_closing_keeps_a_commit_whose_blocks_are_captured(tmp_path, monkeypatch):
    run = Run(tmp_path, home="host")
    run.go(batches(3))
    copy = Snapshots._copy

    def slowly(*args):
        time.sleep(0.02)
        copy(*args)

    monkeypatch.setattr(Snapshots, "_copy", slowly)
    with torch.no_grad():
        run.model(**batches(1)[0])
    run.end(finish=False)
    assert manifests(run.path)[-1].step == 3


def test_a_wholly_frozen_layer_and_more_commits_at_once(tmp_path):
    first = Run(tmp_path, keep=1)
    first.go(batches(3))
    first.end()
    second = Run(tmp_path, keep=2, prepare=lambda model: model.model.layers[0].requires_grad_(False))
    second.go(batches(4, first=3))
    second.finish()
    second.versions.check_books()
    assert_whole(second.path)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_changes_its_form_again_and_again(seed, tmp_path):
    import random

    rng = random.Random(seed)
    step, before = 0, None
    for _ in range(6):
        dtype, keep = rng.choice(["float32", "bfloat16"]), rng.choice([1, 2, 3])
        frozen = rng.sample(["embed", "layers.0", "layers.2.mlp", "norm"], rng.randint(0, 2))

        def prepare(model, frozen=frozen):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not any(part in name for part in frozen))

        note = f"compute type: {before} before, {dtype} now"
        changes = before not in (None, dtype)
        with pytest.warns(RuntimeWarning, match=note) if changes else nullcontext():
            run = Run(tmp_path, dtype=dtype, keep=keep, prepare=prepare, home=rng.choice(["disk", "host"]))
        assert (run.resumed.step if run.resumed else 0) == step
        before = dtype
        count = rng.randint(1, 3)
        run.go(batches(count, first=step))
        step += count
        run.finish()
        run.versions.check_books()
        run.end()
        assert_whole(run.path)


def test_a_kill_while_a_store_becomes_smaller_loses_nothing(tmp_path, monkeypatch):
    def life(dtype, first, die=False):
        with monkeypatch.context() as patch:
            if die:
                import outsize.checkpoint.store as module

                write = module.write_durably

                def dies(path, data):
                    if path.name == "store.json":
                        raise KeyboardInterrupt
                    write(path, data)

                patch.setattr(module, "write_durably", dies)
            with pytest.warns() as _:
                import warnings

                warnings.warn("one at least", stacklevel=1)
                run = Run(tmp_path, dtype=dtype)
            run.go(batches(2, first=first))
            run.end()

    life("float32", 0)
    life("bfloat16", 2)
    life("float32", 4)
    with pytest.raises(KeyboardInterrupt):
        life("float32", 6, die=True)
    close_all()
    assert_whole(tmp_path / "run")
    life("float32", 6)


def test_two_stores_of_one_name_do_not_share_a_disk(tmp_path):
    disks = [tmp_path / "one", tmp_path / "two"]
    for folder in (*disks, tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    for name in ("a", "b"):
        run = Run(tmp_path / name, disk=[str(disk) for disk in disks])
        run.go(batches(2))
        run.end()
    for name in ("a", "b"):
        assert_whole(tmp_path / name / "run")


def test_a_store_is_the_same_by_whatever_path(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    run = Run(tmp_path, "sub/../run")
    run.go(batches(1))
    monkeypatch.chdir(tmp_path)
    outsize.checkpoint.commit(run.model, run.optimizer, "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    outsize.checkpoint.commit(run.model, run.optimizer, tmp_path / "link")
    assert run.finish().step == 1
    assert run.finish().step == 1, "it is durable already"


def test_a_limit_of_the_disk_holds_for_older_forms_too(tmp_path):
    first = Run(tmp_path)
    first.go(batches(2))
    first.end()
    size = (first.path / "data").stat().st_size
    with pytest.warns(RuntimeWarning):
        second = Run(tmp_path, dtype="bfloat16", disk=(str(tmp_path), size + 4096))
    with pytest.raises(BudgetError, match="other forms"):
        second.go(batches(1))
    assert_whole(first.path)


def test_a_resume_that_is_refused_leaves_the_model_as_it_was(tmp_path):
    first = Run(tmp_path)
    first.go(batches(1))
    first.end()
    with pytest.raises(outsize.OutsizeError):
        Run(tmp_path, optimizer=lambda model: outsize.SGD(model, lr=0.1))
    again = Run(tmp_path)
    assert num_commits_kept(again.model) == 1
    assert values_of(again.model)
    assert Store.claim(tmp_path / "other", 1).resume() is None
