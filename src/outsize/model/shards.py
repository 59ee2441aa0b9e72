"""The safetensors files of a folder: which tensors they hold, checked, and read in place.

A safetensors file is `u64 header size | JSON header | data`; the header gives type, shape and byte range of
each tensor (https://github.com/huggingface/safetensors). Tensors are read into their destination where the types agree, and
through two small buffers where they do not: nothing is mapped, so memory use is what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import Future
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from outsize.errors import StorageError, WeightsError
from outsize.model.direct import BUFFERS_BYTES, FileReader, wait_read

_STAGING_BYTES = 2 << 20
READ_BUFFERS_BYTES = BUFFERS_BYTES + 2 * _STAGING_BYTES
"""Memory that reading takes beside the target, and what converts it."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_PARTIAL = ("*.part", "*.partial", "*.incomplete", "*.crdownload", "*.download", "*.aria2", "*.tmp")
"""What tools name a file that they have not downloaded to its end."""
_NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}
"""What a Trainer leaves beside weights."""
_NAMED = 5
"""Files that a message names."""
_LFS = b"version https://git-lfs"
_SAMPLE_BYTES = 4096

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of types."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `offset` is the byte at which its data begins."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


class Shards:
    """All tensors of a folder's safetensors files, by key. Reading is safe from several threads.

    Raises WeightsError where there are no such files, the index names files that are absent, or a file is cut
    short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in find_weights(folder):
            self.tensors.update(_read_header(file))
        self._reader = FileReader()

    def read_into(self, key: str, target: torch.Tensor, start: int = 0) -> None:
        """Fill `target` with the elements of `key` from the flat index `start` on, cast to its type."""
        wait_read(self.start_read(key, target, start))

    def start_read(self, key: str, target: torch.Tensor, start: int = 0) -> list[Future[None]]:
        """Start the same, for `wait_read`; what has to be cast, or goes to a device, is read now."""
        stored = self.tensors[key]
        assert start + target.numel() <= stored.num_elements, (key, start, target.shape, stored.shape)
        if target.device.type != "cpu" or not target.is_contiguous():
            value = torch.empty(target.shape, dtype=stored.dtype, device="cpu")
            self.read_into(key, value, start)
            target.copy_(value)
            return []
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

    def fingerprint(self) -> str:
        """A digest that changes where the files do. Raises StorageError.

        It covers sizes, times of change, headers, and a page of each tensor: some images of file systems have no times.
        """
        digest = hashlib.sha256()
        by_file: dict[Path, dict[str, StoredTensor]] = {}
        for key, stored in sorted(self.tensors.items()):
            by_file.setdefault(stored.file, {})[key] = stored
        for file, tensors in sorted(by_file.items()):
            try:
                with file.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                    status = os.fstat(stream.fileno())
                    digest.update(
                        f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
                    )
                    for key, stored in tensors.items():
                        digest.update(f"{key} {stored.dtype} {stored.shape} {stored.offset}".encode())
                        middle = stored.offset + stored.num_elements * stored.dtype.itemsize // 2
                        digest.update(os.pread(stream.fileno(), _SAMPLE_BYTES, middle))
            except OSError as error:
                raise StorageError(f"cannot read {file}: {error.strerror}") from error
        return digest.hexdigest()

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return self._reader.bytes_read

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._reader.close()

    def _start(self, stored: StoredTensor, start: int, target: torch.Tensor) -> list[Future[None]]:
        """Start filling `target`, 1-D and of the same type, with elements from the flat index `start` on."""
        buffer = memoryview(target.view(torch.uint8).numpy().data)
        return self._reader.start_read(stored.file, stored.offset + start * stored.dtype.itemsize, buffer)


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


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS))
        if start == _LFS:
            raise WeightsError(
                f"{file} is a pointer of Git LFS, not the file itself", hint="run git lfs pull in its folder"
            )
        stream.seek(8)
        header_size = int.from_bytes(start[:8], "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise WeightsError(
                f"{file} is not a safetensors file, or cut short: "
                f"{size} bytes with a header of {header_size} bytes",
                hint="fetch the file again",
            )
        try:
            header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            tensors = {}
            end = 0
            for key, entry in header.items():
                begin, stop = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise WeightsError(
                        f"{file}: tensor {key} has type {entry['dtype']}, which is not supported"
                    )
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                if stop - begin != prod(shape) * dtype.itemsize or begin < 0:
                    raise WeightsError(
                        f"{file}: tensor {key} has {stop - begin} bytes, which is not {shape} {dtype}"
                    )
                tensors[key] = StoredTensor(file, dtype, shape, 8 + header_size + begin)
                end = max(end, stop)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{file}: the header is malformed: {error}", hint="fetch the file again"
            ) from error
    if size < 8 + header_size + end:
        raise WeightsError(
            f"{file} is cut short: {size} bytes, expected {8 + header_size + end}",
            hint="fetch the file again",
        )
    return tensors
