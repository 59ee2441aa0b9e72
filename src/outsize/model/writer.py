"""Safetensors files whose tensors arrive in any order, a few rows at a time.

Names, shapes and types are known before the data, so the header is written first and every tensor has its
place; the largest types come first in a file, which keeps all of them aligned, as the safetensors library
does.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from outsize.config import format_bytes
from outsize.errors import StorageError, StorageFullError
from outsize.model.weight_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes `planned` tensors into `folder`: one file, or several with an index where `max_shard_bytes` asks
    for it.

    A tensor larger than `max_shard_bytes` gets a file of its own. `finish` makes the files durable; nothing
    else does. Raises StorageFullError or StorageError where the disk fails.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Planned], max_shard_bytes: int) -> None:
        self.folder = folder
        self.planned = dict(planned)
        self._left = {key: entry.num_bytes for key, entry in planned.items()}
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        groups = _split(planned, max_shard_bytes)
        width = len(groups)
        names = ["model.safetensors"]
        if width > 1:
            names = [f"model-{number:05d}-of-{width:05d}.safetensors" for number in range(1, width + 1)]
        try:
            for name, keys in zip(names, groups, strict=True):
                self._begin(folder / name, keys)
        except BaseException:
            self.close()
            raise
        if width > 1:
            weight_map = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
            total = sum(entry.num_bytes for entry in planned.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            with storage_errors(folder):
                (folder / "model.safetensors.index.json").write_text(text)

    def write(self, key: str, value: torch.Tensor, start: int = 0) -> None:
        """Write `value` at element `start` of tensor `key`, cast to its planned type."""
        entry = self.planned[key]
        value = value.detach().to(device="cpu", dtype=entry.dtype).contiguous()
        view = memoryview(value.view(-1).view(torch.uint8).numpy().data)
        descriptor, offset = self._places[key]
        offset += start * entry.dtype.itemsize
        assert start * entry.dtype.itemsize + len(view) <= entry.num_bytes, (key, start, value.shape, entry)
        self._left[key] -= len(view)
        with storage_errors(self.folder):
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count

    def finish(self) -> None:
        """Check that every tensor is complete, and flush the files to disk."""
        incomplete = [key for key, num_bytes in self._left.items() if num_bytes != 0]
        assert not incomplete, incomplete[:5]
        with storage_errors(self.folder):
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        """Close the files, complete or not."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _begin(self, file: Path, keys: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(keys, key=lambda key: -self.planned[key].dtype.itemsize)
        end = 0
        begins = {}
        for key in ordered:
            entry = self.planned[key]
            begins[key] = end
            end += entry.num_bytes
            offsets = [begins[key], end]
            header[key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with storage_errors(self.folder):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._descriptors.append(descriptor)
            head = len(text).to_bytes(8, "little") + text
            while head:
                head = head[os.write(descriptor, head) :]
            os.truncate(descriptor, 8 + len(text) + end)
        for key in keys:
            self._places[key] = descriptor, 8 + len(text) + begins[key]


def _split(planned: Mapping[str, Planned], max_shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for key, entry in planned.items():
        if groups[-1] and size + entry.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += entry.num_bytes
    return groups


def check_room(place: Path, num_bytes: int) -> None:
    """Raise StorageFullError where `num_bytes` are not free beside `place`: before they are computed, not after."""
    with storage_errors(place):
        info = os.statvfs(place.parent)
    free_bytes = info.f_bavail * info.f_frsize
    if info.f_blocks and free_bytes < num_bytes:
        raise StorageFullError(
            f"{place}: {format_bytes(num_bytes)} are to be written, {format_bytes(free_bytes)} are free on its disk",
            hint="free some space, or save to another disk",
        )


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn an OSError into a named error about `place`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"no space left while writing {place}", hint="free some space, or save to another disk"
            ) from error
        raise StorageError(
            f"cannot write {place}: {error.strerror or error}", hint="save to a folder you may write to"
        ) from error
