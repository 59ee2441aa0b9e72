"""The model's own files as a part of a commit: they hold the weights of blocks that no update has stored.

A commit names their folder, and what each file holds (`FileDigest`). The folder may be moved or copied: what counts is
what the files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from outsize.errors import FileChangedError, WeightsError
from outsize.model import FileDigest, SafetensorsSource, file_digests


@dataclass(frozen=True, slots=True)
class Base:
    """The folder that a run began with, and what its weight files held; no files where the commit needs none of them."""

    folder: Path
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    @classmethod
    def of(cls, source: SafetensorsSource) -> Base:
        """The files of `source`, which are those that it opened. Raises FileChangedError, StorageError."""
        source.check()
        return cls(source.folder.resolve(), source.digests())

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        files = {name: [each.num_bytes, each.header, each.samples] for name, each in self.files.items()}
        return {"folder": str(self.folder), "files": files}

    @classmethod
    def load(cls, body: Mapping[str, Any]) -> Base:
        """Of JSON. Raises KeyError, TypeError or ValueError where it is of another form."""
        files = {
            name: FileDigest(int(num_bytes), str(header), str(samples))
            for name, (num_bytes, header, samples) in body["files"].items()
        }
        return cls(Path(body["folder"]), files)

    @classmethod
    def load_sizes(cls, body: Mapping[str, Any]) -> Base:
        """Of a commit of version 1 or 2, which names nothing but sizes."""
        files = {name: FileDigest(int(num_bytes), "", "") for name, num_bytes in body["files"].items()}
        return cls(Path(body["folder"]), files)

    def check(self, folder: Path, found: Mapping[str, FileDigest] | None = None) -> None:
        """Check that `folder`, whose files are `found`, holds the same weights. Raises FileChangedError naming a file."""
        found = self._digests(folder) if found is None else found
        for name, wanted in self.files.items():
            if (what := _difference(wanted, found.get(name))) is not None:
                self._refuse(f"{folder / name} {what}")
        for name in found.keys() - self.files.keys():
            self._refuse(f"{folder / name} was not there")

    def open(self, module: nn.Module, folder: Path | None = None) -> SafetensorsSource:
        """The weights for `module`, in `folder` where the files were moved there. Raises FileChangedError, WeightsError."""
        folder = self.folder if folder is None else folder
        self._check_present(folder)
        source = SafetensorsSource(folder, module)
        self.check(folder, source.digests())
        return source

    def _check_present(self, folder: Path) -> None:
        for name in self.files:
            if not (folder / name).is_file():
                self._refuse(f"{folder / name} is missing")

    def _digests(self, folder: Path) -> Mapping[str, FileDigest]:
        self._check_present(folder)
        try:
            return file_digests(folder) if self.files else {}
        except WeightsError as error:
            self._refuse(error.message, error)

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise FileChangedError(
            f"{what}: the commit takes weights from there that were never updated",
            hint=f"put the files back that were in {self.folder}, or name the folder where they are now: open the model "
            "from there, or pass --base",
        ) from cause


def _difference(wanted: FileDigest, found: FileDigest | None) -> str | None:
    """In which way a file is not as a commit says; None where it is."""
    if found is None:
        return "is missing"
    if found.num_bytes != wanted.num_bytes:
        return f"has {found.num_bytes} bytes, and had {wanted.num_bytes}"
    if wanted.header not in ("", found.header):
        return "holds other tensors than it did"
    if wanted.samples not in ("", found.samples):
        return "holds other weights than it did, in tensors of the same shapes"
    return None
