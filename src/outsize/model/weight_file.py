"""One safetensors file: open, its header checked, its bytes known again.

A safetensors file is `u64 header size | JSON header | data`; the header gives type, shape and byte range of each tensor
(https://github.com/huggingface/safetensors). The descriptor is held from before the header is read, so that header and
data are always those of one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, final

import torch
import xxhash

from outsize.errors import FileChangedError, StorageError, WeightsError
from outsize.files import OpenFile

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

_LENGTH_BYTES = 8
"""Of the size of the header, with which a file begins."""
_MAX_HEADER_BYTES = 100_000_000
_LFS = b"version https://git-lfs"
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `offset` is the byte at which its data begins."""

    key: str
    file: OpenFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a weight file holds, wherever it lies: its size, the XXH3-128 of its header, and that of samples of its data.

    The samples are up to 4 KiB from the middle of each tensor. Other weights of the same shapes differ there.
    """

    num_bytes: int
    header: str
    samples: str


@final
class WeightFile:
    """A safetensors file; make one with `open`."""

    def __init__(self, file: OpenFile, tensors: Mapping[str, StoredTensor], header: bytes) -> None:
        self.tensors = tensors
        self._file = file
        self._header_bytes = len(header)
        self._header_digest = xxhash.xxh3_128_hexdigest(header)

    @classmethod
    def open(cls, path: Path) -> WeightFile:
        """Open the file at `path`. Raises WeightsError where it is no safetensors file, or cut short; StorageError."""
        try:
            file = OpenFile.open(path)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror}") from error
        header = _read_header(file)
        return cls(file, _parse_header(file, header), header)

    @property
    def name(self) -> str:
        """The name of the file in its folder."""
        return self._file.path.name

    @property
    def times(self) -> tuple[int, int]:
        """When the file was last written to, and when it last changed, in nanoseconds."""
        return self._file.times

    def check(self) -> None:
        """Raise FileChangedError where the file is not the one that was opened, StorageError where it cannot be read."""
        self._file.check()
        if xxhash.xxh3_128_hexdigest(_read(self._file, 0, self._header_bytes)) != self._header_digest:
            raise FileChangedError(
                f"{self._file.path} holds other tensors than when it was opened",
                hint="restore the file, and open the model again",
            )

    def digest(self) -> FileDigest:
        """The digest of the file; samples are read at the first call. Raises StorageError."""
        return FileDigest(self._file.num_bytes, self._header_digest, self._samples)

    @cached_property
    def _samples(self) -> str:
        digest = xxhash.xxh3_128()
        for key, stored in sorted(self.tensors.items()):
            digest.update(key.encode())
            middle = stored.num_bytes // 2
            num_bytes = min(_SAMPLE_BYTES, stored.num_bytes - middle)
            digest.update(_read(self._file, stored.offset + middle, num_bytes))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read(file: OpenFile, offset: int, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    if num_bytes:
        file.read_once(offset, memoryview(data), "header" if offset == 0 else "a sample")
    return data


def _read_header(file: OpenFile) -> bytes:
    """The header with its length. Raises WeightsError."""
    start = _read(file, 0, min(file.num_bytes, len(_LFS)))
    if start == _LFS:
        raise WeightsError(
            f"{file.path} is a pointer of Git LFS, not the file itself", hint="run git lfs pull in its folder"
        )
    num_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if file.num_bytes < _LENGTH_BYTES or num_bytes > min(file.num_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise WeightsError(
            f"{file.path} is not a safetensors file, or cut short: "
            f"{file.num_bytes} bytes with a header of {num_bytes} bytes",
            hint="fetch the file again",
        )
    return bytes(_read(file, 0, _LENGTH_BYTES + num_bytes))


def _parse_header(file: OpenFile, header: bytes) -> dict[str, StoredTensor]:
    """The tensors that `header` describes. Raises WeightsError where it is malformed, or the file too short for them."""
    try:
        entries = json.loads(header[_LENGTH_BYTES:])
        entries.pop("__metadata__", None)
        tensors = {key: _parse_entry(file, len(header), key, entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file.path}: the header is malformed: {error}", hint="fetch the file again"
        ) from error
    end = max((stored.offset + stored.num_bytes for stored in tensors.values()), default=len(header))
    if file.num_bytes < end:
        raise WeightsError(
            f"{file.path} is cut short: {file.num_bytes} bytes, expected {end}", hint="fetch the file again"
        )
    return tensors


def _parse_entry(file: OpenFile, data_offset: int, key: str, entry: Any) -> StoredTensor:
    begin, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise WeightsError(f"{file.path}: tensor {key} has type {entry['dtype']}, which is not supported")
    stored = StoredTensor(key, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), data_offset + begin)
    if stop - begin != stored.num_bytes or begin < 0:
        raise WeightsError(
            f"{file.path}: tensor {key} has {stop - begin} bytes, which is not {stored.shape} {stored.dtype}"
        )
    return stored
