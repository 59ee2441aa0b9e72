"""The safetensors files of a folder: which tensors they hold, checked, and read in place.

A safetensors file is `u64 header size | JSON header | data`; the header gives type, shape and byte range of
each tensor (https://github.com/huggingface/safetensors). Tensors are read into their destination where the types agree, and
through two small buffers where they do not: nothing is mapped, so memory use is what is asked for.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from outsize.errors import WeightsError
from outsize.model.direct import BUFFERS_BYTES, FileReader, wait_read

_STAGING_BYTES = 2 << 20
READ_BUFFERS_BYTES = BUFFERS_BYTES + 2 * _STAGING_BYTES
"""Memory that reading takes beside the target, and what converts it."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000

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
        for file in _weight_files(folder):
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
            value = torch.empty(target.shape, dtype=stored.dtype)
            self.read_into(key, value, start)
            target.copy_(value)
            return []
        flat = target.detach().view(-1)
        if target.dtype == stored.dtype:
            return self._start(stored, start, flat)
        parts = flat.split(_STAGING_BYTES // stored.dtype.itemsize)
        halves = torch.empty((2, parts[0].numel()), dtype=stored.dtype)
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
        value = torch.empty(stored.shape, dtype=dtype or stored.dtype)
        self.read_into(key, value)
        return value

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


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{folder / _INDEX} is no index of safetensors files: {error}") from error
        files = [folder / name for name in names]
        if outside := [name for name in names if Path(name).name != name]:
            raise WeightsError(f"{folder / _INDEX} names a file outside its folder: {outside[0]}")
        if absent := [file.name for file in files if not file.is_file()]:
            raise WeightsError(
                f"{folder / _INDEX} names {len(files)} files, "
                f"{len(absent)} are absent: {', '.join(absent[:5])}",
                hint="fetch the missing files again",
            )
        return files
    if sorted(folder.glob("*.bin")) or sorted(folder.glob("*.pt")) or sorted(folder.glob("*.pth")):
        raise WeightsError(
            f"{folder} has only pickled weights (.bin), expected safetensors",
            hint="load it with transformers once and save it again: save_pretrained writes safetensors",
        )
    raise WeightsError(f"no {_SINGLE} and no {_INDEX} in {folder}", hint="pass a folder with weights")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise WeightsError(
                f"{file} is no safetensors file, or cut short: "
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
