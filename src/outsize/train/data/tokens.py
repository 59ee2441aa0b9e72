"""Tokens of a file, kept: tokenised once, read back by any later run with the same file and tokenizer.

    $OUTSIZE_CACHE/tokens/KEY/    (default ~/.cache/outsize)
        ids        uint32 per token
        learned    one byte per token; missing where all are learned
        starts     uint64 per example, where it begins, and the end of the last
        numbers    uint64 per example, its line or row
        meta.json  written last
        digest     of all of them, once something asked for it

The key holds the file's path, size and time of change, and the tokenizer's own files. What was not used for 30 days
is removed when something is added. Arrays are read by range and never mapped: pages of a mapping would count as this
process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from outsize.config import cache_folder
from outsize.errors import DataError, StorageError
from outsize.train.data.examples import Example, Ids, Mask

KEEP_DAYS = 30
_VERSION = 3
_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """All examples of one file, end to end.

    `starts [N + 1]`, `numbers [N]`; `may_be_cut` as in `Example`.
    """

    folder: Path
    source: Path
    starts: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    num_learned: int
    may_be_cut: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.starts[-1])

    @property
    def num_examples(self) -> int:
        """Documents or conversations."""
        return len(self.numbers)

    def read(self, start: int, stop: int) -> tuple[Ids, Mask]:
        """Tokens `[start, stop)` and which of them are learned, each `[stop - start]`."""
        count = stop - start
        ids = np.fromfile(self.folder / "ids", dtype=np.uint32, count=count, offset=4 * start)
        if not (self.folder / "learned").exists():
            return ids, np.ones(count, dtype=np.bool_)
        return ids, np.fromfile(self.folder / "learned", dtype=np.bool_, count=count, offset=start)

    def digest(self) -> str:
        """What tells these tokens from others, wherever their file lies. Computed once: it reads all of them."""
        known = self.folder / "digest"
        with suppress(OSError):
            return known.read_text()
        digest = xxhash.xxh3_128(str(self.may_be_cut).encode())
        for name in ("ids", "learned", "starts"):
            path = self.folder / name
            if path.exists():
                digest.update(f"{name} {path.stat().st_size}".encode())
                with path.open("rb") as file:
                    while part := file.read(_DIGEST_BYTES):
                        digest.update(part)
        found = digest.hexdigest()
        with suppress(OSError):
            partial = self.folder / f"digest.{uuid.uuid4().hex[:8]}.partial"
            partial.write_text(found)
            partial.rename(known)
        return found

    def place(self, example: int) -> str:
        """Where example `example` stands in its file, for messages."""
        return f"{self.source}:{self.numbers[example]}"


def cached_tokens(source: Path, key: str, make: Callable[[], Iterable[Example]]) -> Tokens:
    """The tokens of `source` from the cache, or from `make`, then kept under `key` (see `cache_key`).

    Raises what `make` raises, DataError where there is no example, and StorageError where the cache cannot be
    written; nothing is left behind.
    """
    cache = cache_folder() / "tokens"
    folder = cache / key
    if not (folder / "meta.json").is_file():
        partial = cache / f"{key}.{uuid.uuid4().hex[:8]}.partial"
        try:
            partial.mkdir(parents=True)
            _write(partial, source, make())
            _forget_old(cache)
            with suppress(OSError):  # another run was faster: its folder is as good
                partial.rename(folder)
        except OSError as error:
            raise StorageError(
                f"{cache}: {error.strerror or error}",
                hint="set OUTSIZE_CACHE to a folder with room for the tokens",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    os.utime(folder)
    return _open(folder, source)


def cache_key(source: Path, model: Path, vocab_size: int) -> str:
    """What the tokens of `source` under the tokenizer in folder `model` depend on."""
    digest = hashlib.sha256(f"{_VERSION}\0{vocab_size}\0{source.resolve()}\0".encode())
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    for file in sorted(model.iterdir()):
        is_small = file.is_file() and file.suffix not in {".safetensors", ".bin", ".gguf", ".pt"}
        if is_small and file.name != "config.json":
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


def _write(folder: Path, source: Path, examples: Iterable[Example]) -> None:
    starts, numbers = [0], []
    num_tokens = num_learned = 0
    may_be_cut = True
    has_masks = False
    with ExitStack() as stack:
        ids_file = stack.enter_context((folder / "ids").open("wb"))
        learned_file = stack.enter_context((folder / "learned").open("wb"))
        begins = True
        for example in examples:
            if begins:
                numbers.append(example.record.number)
            begins = not example.record.continues
            example.ids.tofile(ids_file)
            if example.learned is not None:
                has_masks = True
                example.learned.tofile(learned_file)
            num_tokens += len(example.ids)
            num_learned += len(example.ids) if example.learned is None else int(example.learned.sum())
            may_be_cut = may_be_cut and example.may_be_cut
            if begins:
                starts.append(num_tokens)
    if not numbers:
        raise DataError(f"{source} holds no text", hint='each line is a JSON object such as {"text": "..."}')
    np.array(starts, dtype=np.uint64).tofile(folder / "starts")
    np.array(numbers, dtype=np.uint64).tofile(folder / "numbers")
    if not has_masks:
        (folder / "learned").unlink()
    (folder / "meta.json").write_text(
        json.dumps({"source": str(source), "num_learned": num_learned, "may_be_cut": may_be_cut})
    )


def _open(folder: Path, source: Path) -> Tokens:
    meta = json.loads((folder / "meta.json").read_text())
    return Tokens(
        folder=folder,
        source=source,
        starts=np.fromfile(folder / "starts", dtype=np.uint64).astype(np.int64),
        numbers=np.fromfile(folder / "numbers", dtype=np.uint64).astype(np.int64),
        num_learned=meta["num_learned"],
        may_be_cut=meta["may_be_cut"],
    )


def _forget_old(cache: Path) -> None:
    oldest = time.time() - KEEP_DAYS * 86400
    for folder in cache.iterdir():
        with suppress(OSError):
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder)
