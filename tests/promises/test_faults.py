"""Faults: whatever breaks is named, nothing hangs, and what can go on goes on.

A disk that fails in the middle of a step, a source that vanishes, budgets that are too small, a loss that is not finite,
an error of the model's own.
"""

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import outsize
from outsize import Pins
from outsize.config import Home
from outsize.errors import (
    BudgetError,
    ConfigError,
    CorruptionError,
    OutsizeError,
    StorageError,
    StorageFullError,
    UsageError,
)
from outsize.tier import Verb
from tests.doubles import Fault, FaultKind, FaultyTier
from tests.pairs import pairwise
from tests.running import adamw, around_forward, assert_same_weights, opened, train, values_of
from tests.seams import (
    abandon,
    arena_of,
    close,
    close_unchecked,
    disk_of,
    flush,
    gradients_in_slots,
    has_memory,
    is_in_dry_run,
    place_on_disk,
    placement_of,
    set_room,
    settle_updates,
    snapshots_of,
    steps_of_closing,
    wrapped_disk,
)
from tests.zoo import ZOO, plain_batch, plain_stack


def llama(tmp_path, **options):
    options = {"home": "disk", "pins": Pins(weight_slots=2, gradient_slots=1), **options}
    return opened(ZOO["llama"].build().train(), disk=tmp_path, **options)


def batches(count=5):
    return [ZOO["llama"].batch(seed=seed) for seed in range(count)]


# -- the disk --------------------------------------------------------------------------------------------------------

ERRORS = {
    FaultKind.EIO: StorageError,
    FaultKind.ENOSPC: StorageFullError,
    FaultKind.SHORT: StorageError,
    FaultKind.CORRUPTION: CorruptionError,
}


@pairwise(
    kind=[FaultKind.EIO, FaultKind.ENOSPC, FaultKind.CORRUPTION],
    verb=[Verb.READ, Verb.WRITE],
    plane=["weight", "state", "gradient"],
)
def test_a_failing_transfer_is_named_and_nothing_hangs(kind, verb, plane, tmp_path, monkeypatch):
    fault = Fault(kind, verb, label=f"L01.{plane}", nth=2)
    with wrapped_disk(monkeypatch, lambda disk: FaultyTier(disk, [fault])) as tiers:
        model = llama(tmp_path)
        with pytest.raises(ERRORS[kind], match=rf"L01\.{plane}"):
            train(model, batches())
            flush(model)
        assert tiers[0].num_faults == 1
        abandon(model)


@pytest.mark.parametrize(
    ("verb", "plane"),
    [
        *((Verb.READ, plane) for plane in ("weight", "state", "gradient")),
        *((Verb.WRITE, plane) for plane in ("weight", "state", "gradient")),
    ],
)
def test_after_a_failure_everything_can_be_given_back(plane, verb, tmp_path, monkeypatch):
    fault = Fault(FaultKind.EIO, verb, label=f"L01.{plane}", nth=2)
    with wrapped_disk(monkeypatch, lambda disk: FaultyTier(disk, [fault])):
        model = llama(tmp_path)
        with pytest.raises(StorageError):
            train(model, batches())
            flush(model)
        arena = arena_of(model)
        try:
            with contextlib.suppress(StorageError):  # it may be said again
                close_unchecked(model)
            assert not has_memory(model)
            assert arena.in_use_bytes == 0
            assert not list(tmp_path.iterdir())
        finally:
            abandon(model)


def test_everything_is_given_back_whatever_step_of_closing_fails(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    model = llama(tmp_path / "scratch")
    optimizer = adamw(model)
    train(model, batches(1), optimizer)
    arena, disk = arena_of(model), disk_of(model)

    def fail(*args, **kwargs):
        raise ZeroDivisionError("a step of closing")

    for owner, name in steps_of_closing(model):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda real=real: (real(), fail()))
    with pytest.raises(ZeroDivisionError):
        close_unchecked(model)
    arena.check_books()
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(UsageError):
        disk.start_read(0, memoryview(mmap.mmap(-1, 4096)), "closed")


def test_a_commit_that_fails_to_finish_leaves_nothing_open(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    model = llama(tmp_path / "scratch")
    optimizer = adamw(model)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "store")
    train(model, batches(1), optimizer)
    arena = arena_of(model)

    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(snapshots_of(model), "finish", fail)
    with pytest.raises(ZeroDivisionError):
        close_unchecked(model)
    arena.check_books()
    again = llama(tmp_path / "scratch")
    outsize.checkpoint.resume(again, adamw(again), tmp_path / "store")  # the lock was given back


@pytest.mark.parametrize(
    "plane",
    [
        "weight",
        "gradient",
    ],
)
def test_a_read_that_fails_once_leaves_a_session_that_goes_on(plane, tmp_path, monkeypatch):
    """Weights are on disk still, gradients were not added to: the caller may repeat the step."""
    # The first read of the gradient takes up a sum; the second belongs to an update, which cannot be repeated.
    fault = Fault(FaultKind.EIO, Verb.READ, label=f"L01.{plane}[0]", nth=1 if plane == "gradient" else 2)
    with wrapped_disk(monkeypatch, lambda disk: FaultyTier(disk, [fault])):
        model = llama(tmp_path)
        plain = ZOO["llama"].build().train()
        train(plain, [[batch, batch] for batch in batches(2)], adamw(plain))
        optimizer = adamw(model)
        failures = []
        try:
            for batch in batches(2):
                for _ in range(4):
                    try:
                        train_twice(model, batch)
                        break
                    except StorageError as error:
                        failures.append(error)
                        optimizer.zero_grad()
                else:
                    raise failures[-1]
                optimizer.step()
                optimizer.zero_grad()
            assert 1 <= len(failures) <= 2  # the read that failed may be waited for once more
            assert_same_weights(model, plain)
        finally:
            abandon(model)


def test_a_backward_that_fails_leaves_a_clipped_gradient_as_it_was(tmp_path):
    """The factor that clipping left is applied to a copy, which is not written where the visit fails."""
    model = llama(tmp_path)
    model(**batches()[0]).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    weight = model.model.layers[1].mlp.up_proj.weight
    clipped = weight.grad.clone()
    loss = model(**batches()[1]).loss

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    assert torch.equal(weight.grad.clone(), clipped)


def train_twice(model, batch):
    for _ in range(2):
        model(**batch).loss.backward()


def test_bits_that_flip_on_the_disk_are_found(tmp_path, monkeypatch):
    """Below the digests: what the drive gives back is not what was written."""
    model = llama(tmp_path)
    optimizer = adamw(model)
    train(model, batches(2), optimizer)
    settle_updates(model)
    flush(model)
    path, offset = place_on_disk(model, "L01")
    with path.open("r+b") as file:
        file.seek(offset + 64)
        byte = file.read(1)
        file.seek(offset + 64)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptionError, match=r"L01\.weight"):
        train(model, batches(2), optimizer)
    abandon(model)


@pytest.mark.parametrize("home", ["disk", None])
def test_a_full_disk_is_named_before_anything_is_trained(home, tmp_path, monkeypatch):
    def full(fd, offset, num_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = llama(tmp_path, home=home, pins=Pins(resident_bytes=0))
    with pytest.raises(StorageFullError, match="the store needs"):
        model(**batches()[0])
    monkeypatch.undo()
    train(model, batches())  # there is room now


def test_a_disk_budget_that_is_too_small_names_one_that_works(tmp_path):
    model = llama(f"{tmp_path}:100KiB")
    with pytest.raises(BudgetError, match=r"may hold 100\.0 KiB") as refusal:
        model(**batches()[0])
    hint = str(refusal.value.hint)
    setting = hint.split('"')[1]
    train(llama(setting), batches(2))


def test_a_missing_folder_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        llama(tmp_path / "absent")


def test_a_folder_in_memory_is_refused(tmp_path):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs here")
    model = llama("/dev/shm")
    with pytest.raises(ConfigError, match="tmpfs"):
        model(**batches()[0])


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **options):
        if str(path).startswith(str(tmp_path)) and flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **options)

    model = llama(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ConfigError, match="not writable"):
            model(**batches()[0])
    train(model, batches(1))


def test_a_disk_home_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="without a folder"):
        outsize.wrap(plain_stack(), home="disk")


def test_two_models_may_share_a_folder(tmp_path):
    first, second, alone = llama(tmp_path), llama(tmp_path), llama(tmp_path)
    optimizers = [adamw(model) for model in (first, second)]
    losses = [
        train(model, batches(2), optimizer)
        for model, optimizer in zip((first, second), optimizers, strict=True)
    ]
    assert losses[0] == losses[1] == train(alone, batches(2))
    assert not list(tmp_path.iterdir())  # a store has no name: it goes with the process, however that ends


# -- the source ------------------------------------------------------------------------------------------------------


def test_a_source_that_vanishes_is_named(tmp_path):
    folder = tmp_path / "model"
    ZOO["llama"].build().save_pretrained(folder)
    scratch = tmp_path / "disk"
    scratch.mkdir()
    model = outsize.load(folder, disk=scratch, home="disk", dtype="float32", pins=Pins(weight_slots=1))
    shutil.rmtree(folder)
    with pytest.raises(OutsizeError, match="model"):
        train(model, batches(2))
    abandon(model)


def test_a_source_is_not_needed_after_every_block_was_updated(tmp_path):
    folder = tmp_path / "model"
    ZOO["llama"].build().save_pretrained(folder)
    scratch = tmp_path / "disk"
    scratch.mkdir()
    model = outsize.load(
        folder, disk=scratch, home="disk", dtype="float32", pins=Pins(weight_slots=1)
    ).train()
    optimizer = adamw(model)
    train(model, batches(1), optimizer)
    settle_updates(model)
    shutil.rmtree(folder)
    train(model, batches()[1:], optimizer)
    plain = ZOO["llama"].build().train()
    train(plain, batches())
    assert_same_weights(model, plain)


# -- memory ----------------------------------------------------------------------------------------------------------


FIT = """
import sys, torch, outsize
from outsize.errors import BudgetError
from tests.zoo import ZOO
name, host, disk, home = sys.argv[1:]
torch.set_num_threads(1)
sizes = {"t5": {"d_ff": 4096, "d_model": 256}, "llama": {"hidden_size": 512, "intermediate_size": 2048}}
plain = ZOO[name].build(**sizes[name]).train()
model = outsize.wrap(plain, host=host, disk=disk or None, home=home or None)
optimizer = outsize.AdamW(model)
try:
    for _ in range(2):
        model(**ZOO[name].batch()).loss.backward()
        optimizer.step()
    print("fits")
except BudgetError as error:
    assert "does not fit into" in error.message
    print(error.hint.split('"')[1])
"""


def fit(*arguments):
    """What a fresh process prints: `fits`, or the memory that its refusal names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("llama", ""),
        ("llama", "host"),
        # shared blocks always stay in memory: a figure that leaves them out is 1 MiB too small
        ("t5", "disk"),
    ],
)
def test_the_least_memory_that_is_named_really_works(name, home, tmp_path):
    least = fit(name, "150MiB", tmp_path, home)
    assert least.endswith("MiB")
    assert fit(name, least, tmp_path, home) == "fits"


def test_a_batch_that_outgrows_the_budget_is_refused_with_a_hint(tmp_path):
    model = llama(tmp_path, pins=Pins(tile_rows=1))
    train(model, batches(1))
    set_room(model, placement_of(model).bytes_in(Home.DEVICE) + 1)
    with pytest.raises(BudgetError, match="of activations") as refusal:
        model(**ZOO["llama"].batch(rows=8, length=60))
    assert "fewer rows" in refusal.value.hint


# -- what the user asks for ------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device"):
        outsize.wrap(plain_stack(), device="20GiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"home": "cloud"}, "home='cloud'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
        ({"host": "much"}, "host: 'much' is not a size"),
        ({"host": 0}, "host: 0 is not positive"),
    ],
)
def test_settings_that_cannot_be_used_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        outsize.wrap(plain_stack(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
    ],
)
def test_optimizer_settings_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        outsize.AdamW(opened(plain_stack()), **options)


# -- numbers and errors of the model ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_goes_the_way_of_torch(tmp_path):
    model = opened(plain_stack(), disk=tmp_path, home="disk")
    optimizer = adamw(model, max_grad_norm=1.0)
    batch = plain_batch()
    loss = model(x=batch["x"] * float("nan"), y=batch["y"])
    assert loss.isnan()
    loss.backward()
    optimizer.zero_grad()  # a caller that looks at the loss loses nothing
    train(model, [batch], optimizer)
    assert all(value.isfinite().all() for value in values_of(model).values())
    model(x=batch["x"] * float("nan"), y=batch["y"]).backward()
    optimizer.step()
    assert optimizer.grad_norm != optimizer.grad_norm
    assert model.outlet.weight.detach().isnan().any()


class Trouble(Exception):
    """An error of the model's own."""


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("block", ["L00", "L01", "L02"])
def test_an_error_inside_a_block_leaves_a_session_that_goes_on(where, block, tmp_path):
    model, plain = llama(tmp_path), ZOO["llama"].build().train()
    layer = model.model.layers[int(block[1:])]
    optimizer = adamw(model)
    train(model, batches(2), optimizer)

    runs = []

    def fail(output):
        runs.append(output)
        if len(runs) == (1 if where == "forward" else 2):
            raise Trouble(block)

    with around_forward(layer.mlp, after=fail), pytest.raises(Trouble):
        train(model, batches(1), optimizer)
    assert block not in gradients_in_slots(model)
    optimizer.zero_grad()
    train(model, batches()[2:], optimizer)
    train(plain, batches())
    assert_same_weights(model, plain)


def test_an_error_between_blocks_leaves_a_session_that_goes_on(tmp_path):
    model, plain = llama(tmp_path), ZOO["llama"].build().train()
    optimizer = adamw(model)
    train(model, batches(2), optimizer)
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            model(input_ids=batches()[0]["input_ids"], attention_mask=torch.ones(7, 7, 7, 7, 7))
    with pytest.raises((UsageError, ValueError)):
        model(**{**batches()[0], "labels": torch.full((3, 5), 4)}).loss.backward()
    optimizer.zero_grad()
    train(model, batches()[2:], optimizer)
    train(plain, batches())
    assert_same_weights(model, plain)


def test_an_error_at_the_very_first_call_leaves_a_model_that_can_be_called(tmp_path):
    model, plain = llama(tmp_path), ZOO["llama"].build().train()
    optimizer = adamw(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(Trouble()))
    with pytest.raises(Trouble):
        model(**batches()[0])
    handle.remove()
    assert not is_in_dry_run(model)
    train(model, batches(), optimizer)
    train(plain, batches())
    assert_same_weights(model, plain)


def test_an_interrupt_is_no_different(tmp_path):
    model, plain = llama(tmp_path), ZOO["llama"].build().train()
    optimizer = adamw(model)
    train(model, batches(2), optimizer)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batches()[2])
    handle.remove()
    train(model, batches()[2:], optimizer)
    train(plain, batches())
    assert_same_weights(model, plain)


@pytest.mark.parametrize("token", [5000, 199, -1])
def test_ids_out_of_the_vocabulary_are_an_error(token, tmp_path):
    model = llama(tmp_path)
    train(model, batches(1))
    batch = batches()[0]
    batch["input_ids"][0, 0] = token
    with pytest.raises((IndexError, OutsizeError)):
        model(**batch)


@pytest.mark.parametrize("token", [5000, 199, -1])
def test_labels_out_of_the_vocabulary_are_an_error(token, tmp_path):
    model = llama(tmp_path)
    batch = batches()[0]
    batch["labels"][0, 3] = token
    with pytest.raises((IndexError, OutsizeError)):
        model(**batch)


def test_closing_is_refused_nothing_and_may_be_repeated(tmp_path):
    model = llama(tmp_path)
    close_unchecked(model)
    train(model, batches(1))
    close(model)
    close_unchecked(model)


def test_a_model_whose_weights_are_gone_says_so(tmp_path):
    model = llama(tmp_path)
    train(model, batches(1))
    close(model)
    with pytest.raises((UsageError, AssertionError), match=r"gone|closed"):
        train(model, batches(1))
