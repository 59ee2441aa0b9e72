"""The safetensors files of a folder, held open from the moment they are found, and read in place.

Tensors are read into their destination where the types agree, and through two small buffers where they do not: nothing is
mapped, so memory use is what is asked for.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import torch
import xxhash

from outsize.errors import WeightsError
from outsize.model.direct import BUFFERS_BYTES, FileReader, wait_read
from outsize.model.weight_file import FileDigest, StoredTensor, WeightFile

_STAGING_BYTES = 2 << 20
_COMPARE_ELEMENTS = 1 << 20
READ_BUFFERS_BYTES = BUFFERS_BYTES + 2 * _STAGING_BYTES
"""Memory that reading takes beside the target, and what converts it."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PARTIAL = ("*.part", "*.partial", "*.incomplete", "*.crdownload", "*.download", "*.aria2", "*.tmp")
"""What tools name a file that they have not downloaded to its end."""
_NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}
"""What a Trainer leaves beside weights."""
_NAMED = 5
"""Files that a message names."""


class Shards:
    """All tensors of a folder's safetensors files, by key. Reading is safe from several threads.

    Raises WeightsError where there are no such files, the index names files that are absent, or a file is cut
    short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [WeightFile.open(path) for path in find_weights(folder)]
        self.tensors = {key: stored for file in self._files for key, stored in file.tensors.items()}
        self._reader = FileReader()

    def read_into(self, key: str, target: torch.Tensor, start: int = 0) -> None:
        """Fill `target` with the elements of `key` from the flat index `start` on, cast to its type."""
        wait_read(self.start_read(key, target, start))

    def start_read(self, key: str, target: torch.Tensor, start: int = 0) -> list[Future[None]]:
        """Start the same, for `wait_read`, into contiguous host memory; what has to be cast is read now."""
        stored = self.tensors[key]
        assert start + target.numel() <= stored.num_elements, (key, start, target.shape, stored.shape)
        assert target.device.type == "cpu" and target.is_contiguous(), (key, target.device, target.stride())
        flat = target.detach().view(-1)
        if target.dtype == stored.dtype:
            return self._start(stored, start, flat)
        parts = flat.split(_STAGING_BYTES // stored.dtype.itemsize)
        halves = torch.empty((2, parts[0].numel()), dtype=stored.dtype, device="cpu")
        staged = [halves[index % 2][: part.numel()] for index, part in enumerate(parts)]
        reading = self._start(stored, start, staged[0])
        for part, here, after in zip(parts, staged, [*staged[1:], None], strict=True):
            wait_read(reading)
            start += part.numel()
            reading = [] if after is None else self._start(stored, start, after)
            part.copy_(here)
        return []

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `key`, in its stored type or in `dtype`."""
        stored = self.tensors[key]
        value = torch.empty(stored.shape, dtype=dtype or stored.dtype, device="cpu")
        self.read_into(key, value)
        return value

    def holds_the_same(self, one: str, other: str) -> bool:
        """Whether two stored tensors have the same shape, type and values, which are compared a piece at a time."""
        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        for start in range(0, first.num_elements, _COMPARE_ELEMENTS):
            count = min(_COMPARE_ELEMENTS, first.num_elements - start)
            parts = [torch.empty(count, dtype=first.dtype, device="cpu") for _ in range(2)]
            for key, part in zip((one, other), parts, strict=True):
                self.read_into(key, part, start)
            if not torch.equal(*parts):
                return False
        return True

    def check(self) -> None:
        """Raise FileChangedError where a file is not the one that was opened."""
        for file in self._files:
            file.check()

    def digests(self) -> dict[str, FileDigest]:
        """The digest of each file that holds a tensor, by its name. Raises StorageError."""
        return {file.name: file.digest() for file in self._files if file.tensors}

    def fingerprint(self) -> str:
        """A digest that changes where the files do, or are written again. Raises StorageError."""
        facts = [f"{file.name} {file.times} {file.digest()}" for file in self._files]
        return xxhash.xxh3_128_hexdigest("\n".join(sorted(facts)).encode())

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return self._reader.bytes_read

    def close(self) -> None:
        """Close the files, which cannot be read any more."""
        self._reader.close()
        for file in self._files:
            file.close()

    def _start(self, stored: StoredTensor, start: int, target: torch.Tensor) -> list[Future[None]]:
        """Start filling `target`, 1-D and of the same type, with elements from the flat index `start` on."""
        buffer = memoryview(target.view(torch.uint8).numpy().data)
        offset = stored.offset + start * stored.dtype.itemsize
        return self._reader.start_read(stored.file, offset, buffer, stored.key)


def file_digests(folder: Path) -> dict[str, FileDigest]:
    """The digests of the weight files in `folder`, by name. Raises WeightsError, StorageError."""
    shards = Shards(folder)
    try:
        return shards.digests()
    finally:
        shards.close()


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder; of these only the index is read.

    Raises WeightsError where the folder has none that can be opened: it names the files that look like weights, and says
    how to turn them into safetensors.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    raise _unusable(folder) or WeightsError(
        f"{folder} has a config.json and no weights",
        hint=f"fetch {_SINGLE} into it; to train from random weights: outsize.load(..., from_scratch=True), "
        "or outsize train --from-scratch",
    )


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weights; False where nothing in it looks like any.

    Raises WeightsError as `find_weights` does, for files that look like weights and cannot be opened.
    """
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return bool(find_weights(folder))
    if (error := _unusable(folder)) is not None:
        raise error
    return False


def _indexed_files(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{folder / _INDEX} is not an index of safetensors files: {error}") from error
    files = [folder / name for name in names]
    if outside := [name for name in names if Path(name).name != name]:
        raise WeightsError(f"{folder / _INDEX} names a file outside its folder: {outside[0]}")
    if absent := [file.name for file in files if not file.is_file()]:
        raise WeightsError(
            f"{folder / _INDEX} names {len(files)} files, "
            f"{len(absent)} are absent: {', '.join(absent[:_NAMED])}{_leftovers(folder)}",
            hint="fetch the missing files again",
        )
    return files


_CONVERT = "load it with transformers once and save it again: save_pretrained writes safetensors"
_UNUSABLE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        _PARTIAL,
        "an unfinished download",
        "finish the download, then try again; a file that is complete must be renamed to its final name",
    ),
    (
        ("model-*-of-*.safetensors",),
        f"shards without {_INDEX}",
        f"fetch {_INDEX}, and every file that it names",
    ),
    (
        ("adapter_config.json", "adapter_model.*"),
        "a peft adapter, which holds no weights of its base model",
        "pass the folder of the base model; to use the adapter, merge it with peft first",
    ),
    (
        ("consolidated*.safetensors",),
        "weights under names that transformers does not use",
        f"fetch the {_SINGLE} of the same model, or convert it with the script that transformers has for it",
    ),
    (("*.safetensors",), f"safetensors under another name than {_SINGLE}", f"rename it to {_SINGLE}"),
    (
        ("consolidated*.pth",),
        "pickled weights under names that transformers does not use",
        f"fetch the {_SINGLE} of the same model, or convert it with the script that transformers has for it",
    ),
    (("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), "pickled weights, expected safetensors", _CONVERT),
    (
        ("*.gguf",),
        "GGUF weights, expected safetensors",
        "load it with transformers once, from_pretrained(FOLDER, gguf_file=NAME), and save_pretrained it",
    ),
    (
        ("*.h5", "*.msgpack", "*.onnx", "*.npz", "*.nemo", "*.ot"),
        "weights of another framework",
        _CONVERT,
    ),
)
"""What a folder may hold in the place of safetensors: patterns, what the files are, and a hint. The first that matches."""


def _unusable(folder: Path) -> WeightsError | None:
    """What `folder` has in the place of weights that can be opened, as an error; None where it has nothing."""
    if dangling := [name for name in (_SINGLE, _INDEX) if (folder / name).is_symlink()]:
        return WeightsError(
            f"{folder / dangling[0]} is a link to a file that does not exist", hint="fetch the file again"
        )
    for patterns, what, hint in _UNUSABLE:
        if found := _matching(folder, patterns):
            return WeightsError(f"{folder} has no {_SINGLE}, but {what}: {_listed(found)}", hint=hint)
    patterns = ("*.safetensors", *(pattern for group, _, _ in _UNUSABLE for pattern in group))
    for inner in sorted(child for child in folder.iterdir() if child.is_dir()):
        if found := _matching(inner, patterns):
            is_model = (inner / "config.json").is_file()
            return WeightsError(
                f"{folder} has no {_SINGLE}; its folder {inner.name} has {_listed(found)}",
                hint=f"pass {inner}" if is_model else f"move the weights from {inner} to {folder}",
            )
    return None


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({file.name for pattern in patterns for file in folder.glob(pattern)} - _NOT_WEIGHTS)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _leftovers(folder: Path) -> str:
    found = _matching(folder, _PARTIAL)
    return f"; unfinished downloads: {_listed(found)}" if found else ""
