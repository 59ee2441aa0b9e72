"""What was trained is not lost with the last write: room is held before the first step, and there are other places."""

import errno
import io
import os
import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import outsize
from outsize.cli.main import main
from outsize.engine.api import Options
from outsize.errors import StorageError, StorageFullError
from outsize.train import room, saver
from outsize.train.data import DataFile, Dataset
from outsize.train.loop import train
from outsize.train.progress import PlainProgress
from outsize.train.room import Room
from outsize.train.saver import weights_bytes
from outsize.train.settings import Checkpointing, Evaluating, Length
from outsize.train.watch import Watcher
from tests.running import settled  # noqa: F401
from tests.seams import close_all
from tests.train.standin import PlainApi
from tests.train.test_loop import settings_for, weights


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class FullDisk(PlainApi):
    """Cannot save below folders whose names end as given: by our own error, or by one of the system."""

    def __init__(self, *names, error=None):
        super().__init__()
        self.names = names
        self.error = error

    def save(self, model, path, tokenizer_from=None):
        if any(part.endswith(self.names) for part in Path(path).parts):
            raise self.error or StorageFullError(f"no space left while writing {path}", hint="free some")
        super().save(model, path, tokenizer_from)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory and the home folder, where nothing is."""
    for name in ("cwd", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# -- room is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_evaluated", "copies"), [(False, 1), (True, 2)])
def test_a_disk_without_room_for_the_weights_is_refused_before_the_first_step(
    model, data, tmp_path, monkeypatch, is_evaluated, copies
):
    needed = []

    def hold(self, num_bytes):
        needed.append(num_bytes)
        raise StorageFullError("full", hint="free some")

    monkeypatch.setattr(Room, "hold", hold)
    evaluating = Evaluating(fraction=0.2) if is_evaluated else Evaluating()
    api = PlainApi()
    with pytest.raises(
        StorageFullError, match=f"--out {tmp_path / 'out'}: .* are free on its disk"
    ) as caught:
        train(settings_for(model, data, tmp_path / "out", evaluating=evaluating), api=api)
    assert api.loaded and not api.calls and "--out" in caught.value.hint
    assert not (tmp_path / "out.partial").exists()
    size = weights_bytes(AutoModelForCausalLM.from_pretrained(fresh(model, tmp_path)), model)
    assert needed == [copies * size + saver._BESIDE_BYTES]


def fresh(model, tmp_path):
    """A folder with weights of the model in `model`, and its tokenizer."""
    loaded = PlainApi().load(model)
    PlainApi().save(loaded, tmp_path / "fresh", model)
    return tmp_path / "fresh"


def test_what_is_held_is_what_is_written(model, data, tmp_path):
    settings = settings_for(model, data, tmp_path / "out", place=Options(host="2GiB", dtype="float32"))
    train(settings)
    written = size_of(tmp_path / "out")
    held = weights_bytes(outsize.load(model, dtype="float32"), model)
    weights_written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights_written <= held + 4096 and written <= held + saver._BESIDE_BYTES
    assert held < 1.5 * weights_written + size_of(model), "more is asked for than is written"


def test_room_is_taken_from_the_disk_and_given_back(tmp_path):
    own = Room(tmp_path)
    own.hold(8 << 20)
    if own._fd is None:
        pytest.skip("the folder is in memory")
    assert not list(tmp_path.iterdir()), "a process that is killed would leave it"
    info = os.fstat(own._fd)
    if info.st_blocks == 0:
        pytest.skip("the file system cannot reserve space")
    assert info.st_blocks * 512 >= 8 << 20
    descriptor = own._fd
    own.hold(4 << 20)
    own.release()
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_named_with_what_is_free(tmp_path, monkeypatch, number):
    def full(fd, num_bytes):
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageFullError, match=r"1024\.0 PiB|1048576.0 TiB") as caught:
        Room(tmp_path).hold(1 << 60)
    assert str(tmp_path) in caught.value.message and " are free" in caught.value.message
    monkeypatch.setattr(room, "reserve", full)
    monkeypatch.setattr(room, "is_memory_backed", lambda folder: False)
    with pytest.raises(StorageFullError, match="are needed"):
        Room(tmp_path).hold(1 << 20)


def test_room_for_the_last_weights_stays_while_better_ones_are_kept(model, data, tmp_path, monkeypatch):
    """Held at every step: for two copies while there are no best weights, for one once there are; nothing while saving."""
    events = []
    hold, release = Room.hold, Room.release
    monkeypatch.setattr(Room, "hold", lambda self, n: (events.append(n), hold(self, n)))
    monkeypatch.setattr(Room, "release", lambda self: (events.append(0), release(self)))

    class Noted(PlainApi):
        def save(self, model, path, tokenizer_from=None):
            events.append(Path(path).name)
            super().save(model, path, tokenizer_from)

    evaluating = Evaluating(files=(DataFile(data),), every=2)
    train(settings_for(model, data, tmp_path / "out", evaluating=evaluating), api=Noted())
    held = [event for event, after in zip(events, [*events[1:], None], strict=True) if event or after != 0]
    two, one = events[0], (events[0] - saver._BESIDE_BYTES) // 2 + saver._BESIDE_BYTES
    seen = [event for event in held if event]
    assert seen == [two, "best.new", one, "best.new", one, "weights"]
    for name in ("best.new", "weights"):
        assert events[events.index(name) - 1] == 0, "room is held twice"


# -- the last write fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [None, OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied", "x")],
    ids=["full", "broken", "forbidden"],
)
@pytest.mark.parametrize("has_disk", [False, True])
def test_weights_that_out_cannot_hold_are_saved_elsewhere(model, data, tmp_path, home, error, has_disk):
    (tmp_path / "disk").mkdir()
    place = Options(disk=str(tmp_path / "disk")) if has_disk else Options()
    out = tmp_path / "out"
    train(settings_for(model, data, tmp_path / "good", seed=3), api=PlainApi())
    settings = settings_for(model, data, out, seed=3, place=place)
    with pytest.raises(StorageError) as caught:
        train(settings, api=FullDisk("out.partial", error=error))
    saved = tmp_path / ("disk" if has_disk else "cwd") / "out.saved"
    assert (
        "the weights after step 6 are saved in" in caught.value.message and str(saved) in caught.value.message
    )
    assert (str(out) if error is None or error.filename is None else "x") in caught.value.message
    *_, command, source, target = shlex.split(caught.value.hint)
    assert command == "mv"
    shutil.move(source, target)
    got, expected = weights(out), weights(tmp_path / "good")
    assert all(got[name].equal(expected[name]) for name in expected)
    assert (out / "tokenizer.json").is_file()
    assert len((tmp_path / "out.partial" / "metrics.jsonl").read_text().splitlines()) == 6


def test_weights_that_are_saved_elsewhere_replace_nothing(model, data, tmp_path, home):
    for name in ("out.saved", "out.saved.2"):
        (tmp_path / "cwd" / name).mkdir()
    with pytest.raises(StorageError, match=r"out\.saved\.3 instead"):
        train(settings_for(model, data, tmp_path / "out"), api=FullDisk("out.partial"))


def test_places_without_room_are_not_tried_and_said(model, data, tmp_path, home, monkeypatch):
    monkeypatch.setattr(saver, "free_bytes", lambda folder: 0 if folder == home else float("inf"))
    api = FullDisk("out.partial", "out.saved")
    with pytest.raises(StorageError, match="no other place had room for the weights after step 6") as caught:
        train(settings_for(model, data, tmp_path / "out"), api=api)
    assert str(tmp_path / "cwd" / "out.saved") in caught.value.message
    assert str(home) not in caught.value.message
    assert "--checkpoint-every" in caught.value.hint


def test_weights_that_are_committed_are_exported_by_the_command_in_the_hint(
    model, data, tmp_path, monkeypatch
):
    place = Options(disk=str(tmp_path), home="disk", dtype="float32")
    checkpointing = Checkpointing(every=4)
    options = {"place": place, "checkpointing": checkpointing, "length": Length(steps=3)}
    train(settings_for(model, data, tmp_path / "good", **options))
    close_all()
    save = outsize.save

    def full(model, path, **more):
        if "out.partial" in str(path):
            raise StorageFullError(f"no space left while writing {path}", hint="free some")
        save(model, path, **more)

    monkeypatch.setattr(outsize, "save", full, raising=False)
    with pytest.raises(StorageError, match="the weights after step 3 are committed to") as caught:
        train(settings_for(model, data, tmp_path / "out", **options))
    close_all()
    command = shlex.split(caught.value.hint.partition(": ")[2])
    assert command[0] == "outsize" and main(command[1:]) == 0
    got, expected = weights(tmp_path / "out"), weights(tmp_path / "good")
    assert all(got[name].equal(expected[name]) for name in expected)


def test_what_others_put_at_out_meanwhile_is_not_replaced(model, data, tmp_path):
    out = tmp_path / "out"

    def meddle(call, module):
        if call == 2:
            out.mkdir()
            (out / "notes").write_text("mine")

    with pytest.raises(StorageError, match="the weights after step 6 are complete in") as caught:
        train(settings_for(model, data, out), api=PlainApi(meddle))
    assert (out / "notes").read_text() == "mine"
    *_, source, target = shlex.split(caught.value.hint)
    shutil.move(source, target)
    weights(target)


# -- something else fails between two steps ----------------------------------------------------------------------------


class Failing(Watcher):
    def __init__(self, event):
        self.event = event

    def stepped(self, metrics, report, num_steps):
        if self.event == "step" and metrics.step == 4:
            raise RuntimeError("no")

    def ended(self, report, interrupted):
        if self.event == "end":
            raise RuntimeError("no")


@pytest.mark.parametrize(("event", "num_steps"), [("step", 4), ("data", 4), ("end", 6)])
def test_an_error_between_two_steps_does_not_cost_the_weights(
    model, data, tmp_path, monkeypatch, event, num_steps
):
    train(settings_for(model, data, tmp_path / "good", length=Length(steps=num_steps)), api=PlainApi())
    batch, calls = Dataset.batch, []

    def unreadable(self, position, batch_size):
        calls.append(position)
        if event == "data" and len(calls) == 5:
            raise OSError(errno.EIO, "Input/output error", "ids")
        return batch(self, position, batch_size)

    monkeypatch.setattr(Dataset, "batch", unreadable)
    # A schedule whose length is the same up to the step that counts.
    settings = settings_for(
        model, data, tmp_path / "out", length=Length(steps=num_steps if event == "end" else 6)
    )
    with pytest.raises((RuntimeError, OSError)) as caught:
        train(settings, api=PlainApi(), watchers=[Failing(event)])
    assert any(
        f"after step {num_steps} are saved in {tmp_path / 'out'}" in note for note in caught.value.__notes__
    )
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == num_steps
    if event == "end":
        got, expected = weights(tmp_path / "out"), weights(tmp_path / "good")
        assert all(got[name].equal(expected[name]) for name in expected)


def test_an_error_inside_a_step_saves_nothing(model, data, tmp_path):
    def fail(call, module):
        if call == 3:
            raise RuntimeError("in the middle of it")

    api = PlainApi(fail)
    with pytest.raises(RuntimeError):
        train(settings_for(model, data, tmp_path / "out"), api=api)
    assert not api.saved and not (tmp_path / "out").exists()


def test_a_full_disk_is_said_on_the_way(model, data, tmp_path, home):
    console = Console(file=io.StringIO(), width=400)
    with pytest.raises(StorageError):
        train(
            settings_for(model, data, tmp_path / "out"),
            api=FullDisk("out.partial"),
            watchers=[PlainProgress(console)],
        )
    assert f"saving in {tmp_path / 'cwd' / 'out.saved'} instead" in console.file.getvalue()
