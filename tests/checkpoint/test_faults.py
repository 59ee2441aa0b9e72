"""Every call that touches a file fails in turn: an error names what, and the commit before loads.

`OUTSIZE_SOAK=1` fails every call; otherwise some, evenly spread.
"""

import contextlib
import errno
import os
import threading

import pytest
import torch

from outsize.checkpoint.catalogue import contents, verify
from outsize.checkpoint.store import remove_commit
from outsize.errors import CorruptionError, OutsizeError, StorageError, StorageFullError
from tests.checkpoint.runs import Run, batches, check_store, manifests
from tests.seams import abandon

KINDS = {
    "eio": ("pwritev", "preadv", "write", "rename", "unlink", "open"),
    "enospc": ("pwritev", "write", "open"),
    "short": ("pwritev", "preadv"),
    "torn": ("pwritev",),
    "flip": ("pwritev", "preadv"),
    "sync": ("fsync", "fdatasync"),
}
PER_KIND = 3
STEPS = 3
PLACES = {"disk": {"home": "disk"}, "host": {"home": "host"}}


class Faults:
    """The n-th of the calls that `kind` concerns goes wrong, once."""

    def __init__(self, monkeypatch, kind, nth):
        self.kind = kind
        self.nth = nth
        self.count = 0
        self.struck = ""
        self._lock = threading.Lock()
        for name in KINDS[kind]:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, call):
        def wrapped(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **kwargs)
            with self._lock:
                self.count += 1
                if self.count != self.nth:
                    strikes = False
                else:
                    strikes, self.struck = True, name
            return self._fail(name, call, args, kwargs) if strikes else call(*args, **kwargs)

        return wrapped

    def _fail(self, name, call, args, kwargs):
        if self.kind in ("eio", "sync"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fd, (view, *_), offset = args
        half = len(view) // 2 // 4096 * 4096
        if self.kind == "short":
            # The disk gives up half-way, and says so at the next attempt.
            self.nth, self.kind = self.count + 1, "eio"
            return call(fd, [view[:half]], offset) if half else 0
        if self.kind == "torn":
            if half:
                call(fd, [view[:half]], offset)
            return len(view)
        if name == "preadv":
            moved = call(fd, [view], offset)
            view[0] ^= 1
            return moved
        moved = call(fd, [view], offset)
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
        return moved


def quiet(block, done, total):
    pass


@pytest.fixture(scope="module", params=PLACES)
def whole(request, tmp_path_factory):
    """A place; how many calls of each kind a run there makes; and its losses."""
    torch.set_num_threads(1)  # as in the tests
    with pytest.MonkeyPatch.context() as patch:
        faults = {kind: Faults(patch, kind, 0) for kind in KINDS}
        run = Run(tmp_path_factory.mktemp("whole"), keep=2, **PLACES[request.param])
        losses = run.go(batches(STEPS))
        run.finish()
        counts = {kind: each.count for kind, each in faults.items()}
        losses += run.go(batches(1, first=STEPS))
        run.end()
    return request.param, counts, losses


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_fails_is_said_and_the_commit_before_loads(kind, whole, tmp_path, monkeypatch):
    place, counts, expected = whole
    total = counts[kind]
    assert total > PER_KIND
    num_struck = 0
    stride = 1 if os.environ.get("OUTSIZE_SOAK") else max(1, total // PER_KIND)
    for nth in range(1 + stride // 2, total + 1, stride):
        folder = tmp_path / str(nth)
        folder.mkdir()
        with monkeypatch.context() as patch:
            faults = Faults(patch, kind, nth)
            error = None
            run = None
            losses = []
            try:
                run = Run(folder, keep=2, **PLACES[place])
                for batch in batches(STEPS):
                    losses += run.go([batch])
                run.finish()
            except OutsizeError as caught:
                error = caught
            if run is not None:
                with contextlib.suppress(OutsizeError):
                    run.end(finish=False)
        if run is not None:
            abandon(run.model)
        num_struck += bool(faults.struck)
        assert losses == expected[: len(losses)], "wrong bytes were computed with"
        check_error(kind, faults.struck, error, folder)
        go_on(folder, place, expected, kind)
    assert num_struck >= PER_KIND


def check_error(kind, call, error, folder):
    if not call:
        return
    if kind in ("torn", "flip"):
        # What was written wrong may be found when it is read, by `go_on`; what is read wrong is found at once.
        assert isinstance(error, CorruptionError) or (error is None and call == "pwritev"), (call, error)
        if error is not None:
            assert str(folder) in str(error) or "store" in str(error)
        return
    if call in ("unlink", "open", "preadv", "fsync", "rename") and error is None:
        return  # what is removed later, a read that came again, or another's file
    assert isinstance(error, StorageError), (call, error)
    assert str(folder) in str(error)
    if kind == "enospc":
        assert isinstance(error, StorageFullError)
    if call == "pwritev":
        assert any(f".{plane}" in str(error) for plane in ("weight", "state", "moment", "gradient")), error


def go_on(folder, place, expected, kind):
    """Whatever was committed is whole, but for what the disk itself lost; training goes on from it bit by bit."""
    store = folder / "run"
    if not (store / "store.json").exists():
        return
    for found in contents(store).commits:
        assert found.error is None
        try:
            verify(store, found.step, quiet)
        except CorruptionError:
            assert kind in ("torn", "flip"), "a commit that could be made durable is damaged"
            remove_commit(store, found.step)
    check_store(store)
    run = Run(folder, keep=2, **PLACES[place])
    start = run.resumed.step if run.resumed is not None else 0
    # At least one step is made, so that every byte of a commit is computed with.
    assert run.go(batches(len(expected) - start, first=start)) == expected[start:]
    run.finish()
    run.versions.check_books()
    assert manifests(store)[-1].step == len(expected)
    run.end()
