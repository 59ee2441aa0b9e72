"""The power fails: whatever a disk may have lost by then, every commit that can be read is whole.

The system calls of a run are recorded. After each of them the disk is made again as a power failure could leave it: with
all bytes that were written or only those that were synced, with all names or only those that were. A kill (`test_kill.py`)
does not show this, because the kernel still writes what the process has given it.
"""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from outsize.checkpoint.catalogue import contents, verify
from outsize.checkpoint.files import COMMITS, DATA, HEADER, Header
from tests.checkpoint.runs import Run, batches


@dataclass
class File:
    """Bytes that were written, and those of them that outlast a power failure."""

    written: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    num_synced: int = 0

    def write(self, offset, data):
        self.writes.append((offset, data))
        put(self.written, offset, data)

    def sync(self, count):
        """Make the first `count` writes durable."""
        for offset, data in self.writes[self.num_synced : count]:
            put(self.synced, offset, data)
        self.num_synced = max(self.num_synced, count)


def put(content, offset, data):
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


class Disk:
    """Files and names as the calls of this process change them; `look(disk)` is called after each that matters."""

    def __init__(self, monkeypatch, root, look):
        self.root, self.look = root, look
        self.files: dict[tuple[int, int], File] = {}
        self.names: dict[Path, File] = {}
        self.synced_names: dict[Path, File] = {}
        self._lock = threading.Lock()
        for name in ("write", "pwritev", "fsync", "fdatasync", "rename", "replace", "unlink"):
            monkeypatch.setattr(os, name, self._watch(getattr(os, name), getattr(self, f"_{name}")))

    def _watch(self, call, note):
        def watched(*args, **kwargs):
            with self._lock:
                after = note(*args, **kwargs)
            result = call(*args, **kwargs)
            if after is not None:
                with self._lock:
                    after(result)
            return result

        return watched

    def _file(self, fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self.root not in path.parents:
            return None
        status = os.fstat(fd)
        file = self.files.setdefault((status.st_dev, status.st_ino), File())
        self.names.setdefault(path, file)
        return file

    def _write(self, fd, data):
        file, copy = self._file(fd), bytes(data)
        if file is None:
            return None
        return lambda count: file.write(len(file.written), copy[:count])

    def _pwritev(self, fd, views, offset):
        file, copy = self._file(fd), b"".join(views)
        return lambda count: file.write(offset, copy[:count])

    def _fsync(self, fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_dir():
            return lambda _: self._sync_names(path)
        return self._sync_file(fd)

    _fdatasync = _fsync

    def _sync_file(self, fd):
        file = self._file(fd)
        if file is None:
            return None
        count = len(file.writes)  # writes that end later need another sync

        def after(_):
            file.sync(count)
            self.look(self)

        return after

    def _sync_names(self, folder):
        kept = {path: file for path, file in self.synced_names.items() if path.parent != folder}
        self.synced_names = kept | {path: file for path, file in self.names.items() if path.parent == folder}
        self.look(self)

    def _rename(self, source, target):
        if Path(source) not in self.names:
            return None  # a folder: what lies beside weights

        def after(_):
            self.names[Path(target)] = self.names.pop(Path(source))
            self._forget()

        return after

    _replace = _rename

    def _unlink(self, path, **_):
        def after(_):
            self.names.pop(Path(path), None)
            self._forget()

        return after

    def _forget(self):
        """Files without a name are gone: another may get the same number."""
        self.files = {
            key: file for key, file in self.files.items() if any(file is n for n in self.names.values())
        }
        self.look(self)


class PowerFailures:
    """Makes what a disk may hold after a power failure, and checks every commit in it."""

    def __init__(self, store, folder):
        self.store, self.folder = store, folder
        self.num_images = self.num_commits = 0
        self.error = None

    def __call__(self, disk):
        """Raises nothing, for it runs inside system calls of the run."""
        try:
            self._look(disk)
        except Exception as error:
            self.error = self.error or error

    def _look(self, disk):
        for names in (disk.names, disk.synced_names):
            commits = {path: file for path, file in names.items() if path.parent.name == COMMITS}
            header = names.get(self.store / HEADER)
            if not any(path.suffix == ".json" for path in commits):
                continue
            assert header is not None, "commits without a header"
            for kind in ("written", "synced"):
                small = {path: bytes(getattr(file, kind)) for path, file in commits.items()}
                self._check(small, bytes(getattr(header, kind)), names, disk, kind)

    def _check(self, commits, header, names, disk, kind):
        image = self.folder / str(self.num_images)
        (image / COMMITS).mkdir(parents=True)
        paths = Header.loads(header, self.store).data
        own = [DATA if len(paths) == 1 else f"{DATA}{index}" for index in range(len(paths))]
        (image / HEADER).write_bytes(Header(tuple(own), Header.loads(header, self.store).slabs).dumps())
        for name, path in zip(own, paths, strict=True):
            # Data files are made once, before any commit; their names and lengths are durable with the first sync.
            content = getattr(disk.names[self.store / path], kind)
            (image / name).write_bytes(content)
            os.truncate(image / name, os.stat(self.store / path).st_size)
        for path, content in commits.items():
            (image / COMMITS / path.name).write_bytes(content)
        self.num_images += 1
        for found in contents(image).commits:
            assert found.error is None, found.error
            verify(image, found.step, lambda *_: None)
            self.num_commits += 1


def record(tmp_path, monkeypatch, **options):
    store, images = tmp_path / "run", tmp_path / "images"
    failures = PowerFailures(store, images)
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path, failures)
        run = Run(tmp_path, keep=1, **options)
        for step in range(3):
            run.go(batches(1, first=step))
            if step > 0:  # the first commit is still under way when the second step begins
                assert run.finish().path in disk.synced_names
    run.end()
    if failures.error is not None:
        raise failures.error
    return failures


@pytest.mark.parametrize("place", ["disk", "host", "two disks"])
def test_every_commit_that_can_be_read_is_whole(place, tmp_path, monkeypatch):
    options = {"home": place if place != "two disks" else "disk"}
    if place == "two disks":
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        options["disk"] = folders
    failures = record(tmp_path, monkeypatch, **options)
    assert failures.num_images > 10 and failures.num_commits > 10
