"""The folder of a store: what is in it, and how its small files are written so that a kill leaves the old or the new.

store.json           the format, and where extents and data files are
data                 the records: one file, or one on each of several drives
commits/000000000120.json   one manifest per commit
commits/000000000120.safetensors   the model's buffers at that commit
model/               what a Hugging Face folder holds beside weights
lock                 held by the process that writes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outsize.block import ALIGNMENT, Extent
from outsize.checkpoint.manifest import Manifest, check_format
from outsize.errors import CorruptionError, StorageError
from outsize.model.writer import storage_errors
from outsize.tier.versioned import Slab

FORMAT = "outsize-store"
VERSION = 1
HEADER = "store.json"
COMMITS = "commits"
MODEL = "model"
LOCK = "lock"
DATA = "data"


@dataclass(frozen=True, slots=True)
class Header:
    """Where extents are: `slabs` over `data` files, relative to the folder or absolute, `part_bytes` of each used."""

    data: tuple[str, ...]
    slabs: tuple[Slab, ...]

    @property
    def num_bytes(self) -> int:
        """The end of the last slab."""
        return max((slab.stop for slab in self.slabs), default=0)

    def dumps(self) -> bytes:
        """The file's content."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "data": list(self.data),
            "slabs": [asdict(slab) for slab in self.slabs],
        }
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def loads(cls, data: bytes, path: Path) -> Header:
        """Raises CorruptionError and StorageError where it is damaged or of another format."""
        try:
            body = json.loads(data)
            if not isinstance(body, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise CorruptionError(
                f"{path} is damaged: {error}", hint="restore the folder from a copy, or start anew"
            ) from error
        check_format(body, FORMAT, (VERSION,), path)
        try:
            slabs = tuple(Slab(**slab) for slab in body["slabs"])
            names = tuple(str(name) for name in body["data"])
        except (KeyError, TypeError) as error:
            raise CorruptionError(f"{path} has no usable field {error}") from error
        end = 0
        for slab in sorted(slabs, key=lambda slab: slab.offset):
            if (
                slab.offset < end
                or slab.offset % ALIGNMENT
                or slab.extent_bytes % ALIGNMENT
                or slab.count < 1
            ):
                raise CorruptionError(f"{path}: slabs overlap or are not aligned, at byte {slab.offset}")
            end = slab.stop
        if not names:
            raise CorruptionError(f"{path} names no data file")
        return cls(names, slabs)


def read_header(folder: Path) -> Header | None:
    """The header of the store in `folder`; None where there is no store."""
    path = folder / HEADER
    try:
        return Header.loads(_read(path), path)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def commit_paths(folder: Path) -> list[Path]:
    """The manifests in `folder`, the oldest first."""
    found = [path for path in (folder / COMMITS).glob("*.json") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


def commit_path(folder: Path, step: int) -> Path:
    """Where the manifest of `step` is."""
    return folder / COMMITS / f"{step:012}.json"


def buffers_path(folder: Path, step: int) -> Path:
    """Where the buffers of the commit of `step` are."""
    return commit_path(folder, step).with_suffix(".safetensors")


def remove_commit_files(folder: Path, step: int) -> None:
    """Remove a commit: first its manifest, for good, then what nothing names any more."""
    remove_durably(commit_path(folder, step))
    with storage_errors(folder):
        buffers_path(folder, step).unlink(missing_ok=True)


def read_manifest(path: Path, header: Header) -> Manifest:
    """Read one manifest. Raises CorruptionError where it is damaged, or holds extents that `header` does not have."""
    manifest = Manifest.loads(_read(path), path)
    if manifest.step != int(path.stem):
        raise CorruptionError(f"{path}: the manifest is that of step {manifest.step}")
    sizes = {offset: slab.extent_bytes for slab in header.slabs for offset in slab.extents()}
    seen: set[int] = set()
    for block in manifest.blocks:
        for cell in block.cells:
            if sizes.get(cell.offset) != cell.cell.num_bytes or cell.offset in seen:
                raise CorruptionError(
                    f"{path}: {block.record.name} lies in an extent at byte {cell.offset} that the store does "
                    "not have, or has given to another",
                    hint="the files of two stores were mixed, or store.json was altered",
                )
            seen.add(cell.offset)
    return manifest


def data_paths(folder: Path, header: Header) -> list[Path]:
    """The data files: those of a moved store move with it, unless they are on drives of their own."""
    return [folder / name for name in header.data]


def write_durably(path: Path, data: bytes) -> None:
    """Write `path` so that a kill at any instant leaves what was there, or `data`; durable when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
        sync_folder(path.parent)


def remove_durably(path: Path) -> None:
    """Remove `path`; it does not come back after a crash once this returns."""
    with storage_errors(path):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tidy(folder: Path) -> None:
    """Remove what a killed process left half-written, and buffers that no manifest names. Needs the lock."""
    for place in (folder, folder / COMMITS):
        for partial in place.glob(".*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
    for buffers in (folder / COMMITS).glob("*.safetensors"):
        if not buffers.with_suffix(".json").exists():
            buffers.unlink(missing_ok=True)


def plan_slabs(
    slabs: Sequence[Slab], needed: dict[int, int], held: set[int]
) -> tuple[tuple[Slab, ...], list[Extent]]:
    """Slabs that have `needed` extents of each size (bytes: count), and what of the space can be given back.

    Slabs of sizes that are no longer needed go once no commit holds any of their extents.
    """
    stays, freed = [], []
    for slab in slabs:
        if slab.extent_bytes in needed or any(offset in held for offset in slab.extents()):
            stays.append(slab)
        else:
            freed.append(Extent(slab.offset, slab.stop - slab.offset))
    end = max((slab.stop for slab in stays), default=0)
    for size, count in needed.items():
        missing = count - sum(slab.count for slab in stays if slab.extent_bytes == size)
        if missing > 0:
            stays.append(Slab(end, size, missing))
            end += size * missing
    taken = [(slab.offset, slab.stop) for slab in stays]
    gone = [
        extent
        for extent in freed
        if not any(begin < extent.offset + extent.num_bytes and extent.offset < stop for begin, stop in taken)
    ]
    return tuple(stays), gone


def to_jsonable(value: Any, what: str) -> Any:
    """`value` as it will be read back. Raises StorageError naming `what` where JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{what} cannot be kept in a commit: {error}", hint="pass numbers, texts, lists and mappings"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
