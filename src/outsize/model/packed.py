"""A cache of packed weights: what `EncodingSource` made of a model's matrices, written once, read by later passes and runs.

An entry is a folder of safetensors files with codes and scales under the names of the model's parameters, and
`digests.json` with the XXH3 digest of each tensor, which every read checks. It is written beside its place, under a lock,
and renamed: it is there completely or not at all. Its name holds a digest of everything that the codes depend on, so a
changed model has another entry. Deleting entries at any time is safe: they are made again.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from outsize.config import DiskBudget, format_bytes
from outsize.errors import CorruptionError, FileChangedError, StorageError, StorageFullError, WeightsError
from outsize.model.direct import wait_read
from outsize.model.folder import Existing, written_folder
from outsize.model.shards import Shards
from outsize.model.writer import Planned, SafetensorsWriter, storage_errors

_SHARD_BYTES = 4 << 30
_DIGESTS = "digests.json"
_FREE_BYTES = 1 << 30
"""Left free on the disk of a cache."""
_NAME_LENGTH = 60


class PackedWeights:
    """An entry that is open. Raises StorageError where it does not hold `planned`, completely."""

    def __init__(self, folder: Path, planned: Mapping[str, Planned]) -> None:
        self.folder = folder
        try:
            self._shards = Shards(folder)
            self._digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text())
        except (OSError, ValueError, WeightsError) as error:
            raise StorageError(f"{folder} cannot be read: {error}") from error
        found = {name: Planned(each.shape, each.dtype) for name, each in self._shards.tensors.items()}
        if found != planned or not isinstance(self._digests, dict) or self._digests.keys() != planned.keys():
            raise StorageError(f"{folder} does not hold the weights that its name stands for")

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill whole tensors by name. Raises CorruptionError where one is not as it was written, or StorageError."""
        raw = {
            name: target
            if target.dtype is torch.bfloat16 and target.device.type == "cpu" and target.is_contiguous()
            else torch.empty(target.shape, dtype=torch.bfloat16, device="cpu")
            for name, target in targets.items()
        }
        reading: list[Future[None]] = []
        try:
            for name, value in raw.items():
                reading += self._shards.start_read(name, value)
        finally:
            wait_read(reading)  # the caller encodes into the same tensors where a file is gone
        for name, value in raw.items():
            if xxhash.xxh3_64(_bytes(value)).hexdigest() != self._digests[name]:
                raise CorruptionError(f"{self.folder}: {name} is not as it was written")
            if value is not targets[name]:
                targets[name].copy_(value)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return self._shards.bytes_read

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._shards.close()


class PackedWriter:
    """Writes an entry. Each tensor's elements come in order; `finish` checks that all came."""

    def __init__(self, folder: Path, planned: Mapping[str, Planned]) -> None:
        self.planned = planned
        self._folder = folder
        self._files = SafetensorsWriter(folder, planned, _SHARD_BYTES)
        self._digests = {name: xxhash.xxh3_64() for name in planned}
        self._written = dict.fromkeys(planned, 0)

    def write(self, name: str, values: torch.Tensor) -> None:
        """The next elements of tensor `name`, contiguous. Raises StorageError."""
        self._files.write(name, values, self._written[name])
        self._written[name] += values.numel()
        self._digests[name].update(_bytes(values))

    def finish(self) -> None:
        """Make the files durable, and leave none of them in memory. Raises StorageError."""
        self._files.finish()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        with storage_errors(self._folder):
            (self._folder / _DIGESTS).write_text(json.dumps(digests))
            for file in self._folder.iterdir():
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files, complete or not."""
        self._files.close()


@dataclass(frozen=True, slots=True)
class PackedCache:
    """Where the packed weights of one model are looked for, and written to: folders, each with the most that it may hold.

    `owner` names the model and the format `kind`, `key` is a digest of what the codes depend on, `planned` are the tensors.
    """

    places: Sequence[DiskBudget]
    kind: str
    owner: str
    key: str
    planned: Mapping[str, Planned]

    @classmethod
    def of(
        cls,
        places: Sequence[DiskBudget],
        folder: Path,
        kind: str,
        depends_on: str,
        planned: Mapping[str, Planned],
    ) -> PackedCache:
        """The cache for the model in `folder`, packed as `kind`. Its codes depend on `depends_on` and `planned`."""
        folder = folder.resolve()
        path = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        key = hashlib.sha256(f"{depends_on}\0{sorted(planned.items(), key=lambda item: item[0])}".encode())
        owner = f"{folder.name[:_NAME_LENGTH]}-{kind}-{path}"
        return cls(places, kind, owner, key.hexdigest()[:16], planned)

    def open(self) -> PackedWeights | None:
        """The entry, where there is a complete one; it counts as used now."""
        for place in self.places:
            if (found := self._open_in(place.folder)) is not None:
                return found
        return None

    def make(self, fill: Callable[[PackedWriter], None], say: Callable[[str], None]) -> PackedWeights:
        """The entry, written by `fill` where there is none, in the first place that has room for it.

        Of several processes one writes, the others wait. `say` receives messages for people. Raises StorageError where no
        place takes the entry, and what `fill` raises.
        """
        failure = StorageError("no folder is given for a cache")
        for place in self.places:
            try:
                return self._make_in(place, fill, say)
            except FileChangedError:
                raise
            except StorageError as error:
                failure = error
        raise failure

    def remove(self) -> None:
        """Delete the entry, wherever it is."""
        for place in self.places:
            _remove(self._entry(place.folder))

    def _entry(self, folder: Path) -> Path:
        return folder / f"{self.owner}-{self.key}"

    def _open_in(self, folder: Path) -> PackedWeights | None:
        entry = self._entry(folder)
        if not entry.is_dir():
            return None
        try:
            found = PackedWeights(entry, self.planned)
        except StorageError:
            return None  # damaged, or removed right now: it is made again
        with suppress(OSError):
            os.utime(entry)
        return found

    def _make_in(
        self, place: DiskBudget, fill: Callable[[PackedWriter], None], say: Callable[[str], None]
    ) -> PackedWeights:
        entry = self._entry(place.folder)
        with storage_errors(place.folder):
            place.folder.mkdir(parents=True, exist_ok=True)
        with _locked(place.folder / f".{self.owner}.lock", say):
            found = self._open_in(place.folder)
            if found is not None:
                return found
            with storage_errors(place.folder):
                for prefix in ("", "."):
                    # Of the model as it was, damaged, or left by a process that was killed.
                    for old in place.folder.glob(f"{prefix}{glob.escape(self.owner)}-*"):
                        _remove(old)
                _make_room(place, sum(each.num_bytes for each in self.planned.values()))
            say(f"packing weights into {self.kind} (once; cached in {entry})")
            with written_folder(entry, Existing.REPLACE) as temporary:
                writer = PackedWriter(temporary, self.planned)
                try:
                    fill(writer)
                    writer.finish()
                finally:
                    writer.close()
        return PackedWeights(entry, self.planned)


def _bytes(value: torch.Tensor) -> memoryview:
    return memoryview(value.detach().view(-1).view(torch.uint8).numpy().data)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the file `path`; on a file system without locks, go on: two writers do each other no harm."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another process, which packs the same weights")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_room(place: DiskBudget, num_bytes: int) -> None:
    """Delete the entries of `place` that were not used for longest, until `num_bytes` fit. Raises StorageFullError, having
    deleted nothing, where they would not fit even then, or OSError."""
    used = {entry: _use(entry) for entry in place.folder.iterdir() if entry.is_dir()}
    total = sum(size for _, size in used.values())
    room = shutil.disk_usage(place.folder).free - _FREE_BYTES
    if place.num_bytes is not None:
        room = min(room, place.num_bytes - total)
    if room + total < num_bytes:
        raise StorageFullError(
            f"packed weights take {format_bytes(num_bytes)}, and {place.folder} has room for "
            f"{format_bytes(max(0, room + total))}"
        )
    for entry, (_, size) in sorted(used.items(), key=lambda item: item[1]):
        if room >= num_bytes:
            return
        _remove(entry)
        room += size


def _use(entry: Path) -> tuple[float, int]:
    """When an entry was last used or written to, and how large it is; nothing of one that is removed right now."""
    try:
        found = [file.stat() for file in (entry, *entry.iterdir())]
    except OSError:
        return 0.0, 0
    return max(each.st_mtime for each in found), sum(each.st_size for each in found[1:])


def _remove(entry: Path) -> None:
    """Delete an entry; nobody finds half of it. One that is in use stays readable for its users."""
    hidden = entry.with_name(f".removed-{os.getpid()}-{entry.name}")
    with suppress(OSError):
        entry.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
