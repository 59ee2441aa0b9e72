"""Putting a folder of files in place: written beside it, flushed, then renamed.

A reader never sees half a file. A new folder, or one that replaces another, appears at once; a folder that is updated
receives its files one by one, weights first, so that files of others in it stay.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from outsize.errors import UsageError
from outsize.model.writer import storage_errors


class Existing(StrEnum):
    """What to do with a folder that already holds something."""

    REFUSE = "refuse"
    REPLACE = "replace"
    """Remove all of it once the new folder is complete."""
    UPDATE = "update"
    """Replace files of the same names, and weights of an earlier model; leave everything else."""


_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


@contextmanager
def written_folder(path: Path, existing: Existing) -> Iterator[Path]:
    """A temporary folder that takes its place at `path` when the context ends without an error.

    Raises UsageError where `path` is a file, or holds something and `existing` refuses that; StorageError and
    StorageFullError where the disk fails, and then `path` is as it was.
    """
    check_free(path, existing)
    updates = existing is Existing.UPDATE and path.is_dir()
    beside = path if updates else path.parent
    with storage_errors(path):
        beside.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=beside))
        temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        with storage_errors(path):
            flush(temporary)
            if updates:
                _move_into(temporary, path)
            else:
                _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path, existing: Existing) -> None:
    """Raise UsageError where nothing may be written to the folder `path`."""
    if path.is_dir():
        if existing is Existing.REFUSE and any(path.iterdir()):
            raise UsageError(f"{path} is not empty", hint="choose another folder, or pass overwrite=True")
    elif path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists and is not a folder", hint="choose another folder")


def flush(folder: Path) -> None:
    """Make the files of `folder`, and their names, durable."""
    for entry in [*sorted(folder.rglob("*")), folder]:
        _fsync(entry)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename; what was at `path` is removed afterwards, never before."""
    old = None
    if path.is_dir() and any(path.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _move_into(temporary: Path, path: Path) -> None:
    """Move files into `path`: weights, then what refers to them; weights of an earlier model go last."""
    names = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: (name.suffix != ".safetensors", str(name))):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, path / name)
    _fsync(path)
    written = {str(name) for name in names}
    if any(name.endswith(".safetensors") for name in written):
        for file in sorted(path.iterdir()):
            is_weights = any(fnmatch.fnmatch(file.name, pattern) for pattern in _WEIGHTS)
            if is_weights and file.name not in written:
                file.unlink()


def _fsync(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
