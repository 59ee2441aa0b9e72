"""The weight files of a folder: what is read of them, and what may happen to them while a model has them open."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from outsize.model.direct import FileReader


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that are read from weight files from now on, by key."""
    counts: Counter[str] = Counter()
    original = FileReader.start_read

    def spy(self: FileReader, file: Any, offset: int, buffer: memoryview, label: str) -> Any:
        counts[label] += len(buffer)
        return original(self, file, offset, buffer, label)

    monkeypatch.setattr(FileReader, "start_read", spy)
    return counts


def other_weights(folder: Path) -> Path:
    """The tensors of `folder` with other values, in a file that is as long, with the same header."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -value for name, value in tensors.items()}, folder / "other", metadata={"format": "pt"})
    assert (folder / "other").stat().st_size == (folder / "model.safetensors").stat().st_size
    return folder / "other"


def replace(folder: Path) -> None:
    """Put another file in the place of the weights."""
    other_weights(folder).rename(folder / "model.safetensors")


def rewrite(folder: Path) -> None:
    """Write other weights over those in the file."""
    data = other_weights(folder).read_bytes()
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.write(data)


def truncate(folder: Path) -> None:
    """Cut the file in half."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def unlink(folder: Path) -> None:
    """Remove the file."""
    (folder / "model.safetensors").unlink()


CHANGES: dict[Callable[[Path], None], str] = {
    replace: r"model\.safetensors was replaced by another file",
    rewrite: r"model\.safetensors was written to",
    truncate: r"model\.safetensors was cut short",
    unlink: r"model\.safetensors was removed",
}
"""What may happen, and how the error says it."""
