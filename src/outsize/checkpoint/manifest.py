"""What a commit says: where every block lies, and everything else that a run goes on from.

A manifest is one JSON file, of which the last field is a digest of the rest: what is torn or altered is refused. See
`docs/reference/store-format.md`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import xxhash

from outsize.block import ALIGNMENT, Block, Entry, Extent, Piece, Plane, Record
from outsize.checkpoint.base import Base
from outsize.errors import CorruptionError, StorageError
from outsize.tier.digests import Check

FORMAT = "outsize-commit"
VERSION = 3
READ_VERSIONS = (1, 2, VERSION)
"""Version 1 has no `buffers` and no `extra_state`; versions 1 and 2 have `run.source`, with sizes alone, for `base`."""


@dataclass(frozen=True, slots=True)
class StoredCell:
    """A run of a record's bytes, by its offset in the record, and the extent of the store that holds it.

    `checks` are digests of its parts, by offsets of the store; together they cover the extent.
    """

    cell: Extent
    offset: int
    checks: tuple[Check, ...]

    @property
    def extent(self) -> Extent:
        """Where it lies in the store."""
        return Extent(self.offset, self.cell.num_bytes)


@dataclass(frozen=True)
class StoredBlock:
    """A block of a commit. One that is not stored was never updated: its weights are the model's own, its state zero."""

    record: Record
    is_stored: bool
    cells: tuple[StoredCell, ...]

    def has(self, entry: Entry) -> bool:
        """Whether the commit stores this entry of the record, and not the model's own files."""
        return self.is_stored and not self.record.is_in_files(entry)


@dataclass(frozen=True, slots=True)
class StoredBuffers:
    """The safetensors file beside the manifest, by its size and digest."""

    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """One commit. All mappings hold what JSON can: see `docs/reference/store-format.md` for the keys."""

    step: int
    written: str
    compute_type: str
    rule: str
    optimizer: Mapping[str, Any]
    random: Mapping[str, Any] | None
    extra: Mapping[str, Any]
    run: Mapping[str, Any]
    """How it was computed: tiles, threads, backend, versions; what must be kept for the same bits."""
    blocks: tuple[StoredBlock, ...]
    base: Base | None = None
    """Where the weights of blocks are that are not stored; None where the model has no files."""
    buffers: StoredBuffers | None = None
    """None in a commit of version 1, which has none."""
    extra_state: Mapping[str, Any] = field(default_factory=dict)

    def offsets(self) -> list[int]:
        """The extents that the commit holds."""
        return [cell.offset for block in self.blocks for cell in block.cells]

    @property
    def is_whole(self) -> bool:
        """Whether everything is stored, so that the model's own files are not needed."""
        return all(block.has(entry) for block in self.blocks for entry in block.record.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(cell.cell.num_bytes for block in self.blocks for cell in block.cells)

    def dumps(self) -> bytes:
        """The file's content."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "written": self.written,
            "compute_type": self.compute_type,
            "rule": self.rule,
            "optimizer": self.optimizer,
            "random": self.random,
            "extra": self.extra,
            "run": self.run,
            "buffers": None if self.buffers is None else [self.buffers.num_bytes, self.buffers.digest],
            "extra_state": self.extra_state,
            "base": None if self.base is None else self.base.dump(),
            "blocks": [_dump_block(block) for block in self.blocks],
        }
        text = json.dumps(body, separators=(",", ":"))
        digest = xxhash.xxh3_128_hexdigest(text.encode())
        return f'{text[:-1]},"digest":"{digest}"}}\n'.encode()

    @classmethod
    def loads(cls, data: bytes, path: Path) -> Manifest:
        """Read a manifest; `path` is for messages. Raises CorruptionError where it is damaged, StorageError where it is of
        a format that is not known."""
        text, comma, tail = data.decode(errors="replace").rstrip("\n").rpartition(',"digest":"')
        digest = xxhash.xxh3_128_hexdigest(f"{text}}}".encode())
        if not comma or tail != f'{digest}"}}':
            _refuse_other_format(data, path)
            raise CorruptionError(
                f"{path}: the manifest is damaged: its digest does not match what it says",
                hint="an earlier commit may be whole: outsize checkpoint list",
            )
        body = json.loads(f"{text}}}")
        check_format(body, FORMAT, READ_VERSIONS, path)
        try:
            buffers = body.get("buffers")
            return cls(
                step=int(body["step"]),
                written=str(body["written"]),
                compute_type=str(body["compute_type"]),
                rule=str(body["rule"]),
                optimizer=dict(body["optimizer"]),
                random=body["random"],
                extra=dict(body["extra"]),
                run=dict(body["run"]),
                blocks=tuple(_load_block(block) for block in body["blocks"]),
                base=_load_base(body),
                buffers=None if buffers is None else StoredBuffers(int(buffers[0]), str(buffers[1])),
                extra_state=dict(body.get("extra_state", {})),
            )
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise CorruptionError(
                f"{path}: the manifest has no usable field {error}",
                hint="it was written by another program, or altered",
            ) from error


def check_format(body: Mapping[str, Any], name: str, versions: Sequence[int], path: Path) -> None:
    """Raise StorageError where a file is of another format, or of a version that this one cannot read."""
    if body.get("format") != name:
        raise StorageError(
            f"{path}: the format is {body.get('format')!r}, expected {name!r}",
            hint="pass the folder of a checkpoint",
        )
    if body.get("version") not in versions:
        readable = " and ".join(map(str, versions))
        raise StorageError(
            f"{path}: version {body.get('version')!r} of the format, this Outsize reads version {readable}",
            hint="install the version of Outsize that wrote it, or export there and train from the export",
        )


def _refuse_other_format(data: bytes, path: Path) -> None:
    """A whole file of another version may have another digest: say that first."""
    try:
        body = json.loads(data)
    except ValueError:
        return
    if isinstance(body, dict):
        check_format(body, FORMAT, READ_VERSIONS, path)


def _load_base(body: Mapping[str, Any]) -> Base | None:
    if body["version"] < VERSION:
        source = body["run"]["source"]
        return Base.load_sizes(source) if source["folder"] else None
    return None if body["base"] is None else Base.load(body["base"])


def _dump_block(block: StoredBlock) -> dict[str, Any]:
    record = block.record
    entries = {entry.piece: entry for entry in record.entries}
    return {
        "name": record.name,
        "stored": block.is_stored,
        "pieces": [
            {
                "parameter": piece.parameter,
                "shape": list(piece.shape),
                "rows": None if piece.is_whole else [piece.row_start, piece.row_stop],
                "trainable": entries[piece].trainable,
                "in_files": record.is_in_files(entries[piece]),
            }
            for piece in record.block.pieces
        ],
        "state": [str(plane) for plane in record.state],
        "element_bytes": {str(plane): str(size) for plane, size in record.element_bytes.items()},
        "cells": [
            [cell.cell.offset, cell.cell.num_bytes, cell.offset, _dump_checks(cell)] for cell in block.cells
        ],
    }


def _dump_checks(cell: StoredCell) -> list[list[int | str]]:
    return [
        [check.start - cell.offset, check.stop - cell.offset, f"{check.digest:016x}"] for check in cell.checks
    ]


def _load_block(body: Mapping[str, Any]) -> StoredBlock:
    pieces = tuple(
        Piece(piece["parameter"], tuple(piece["shape"]), *(piece["rows"] or (None, None)))
        for piece in body["pieces"]
    )
    sizes: dict[Plane, int | Fraction] = {}
    for plane, size in body["element_bytes"].items():
        fraction = Fraction(size)
        sizes[Plane(plane)] = int(fraction) if fraction.denominator == 1 else fraction
    record = Record.lay_out(
        Block(body["name"], pieces),
        [bool(piece["trainable"]) for piece in body["pieces"]],
        [Plane(plane) for plane in body["state"]],
        sizes,
        {piece for piece, each in zip(pieces, body["pieces"], strict=True) if each.get("in_files")},
    )
    cells = tuple(_load_cell(cell) for cell in body["cells"])
    is_stored = bool(body["stored"])
    wanted = tuple(record.cells()) if is_stored else ()
    if tuple(cell.cell for cell in cells) != wanted:
        raise ValueError(f"cells of block {record.name}")
    return StoredBlock(record, is_stored, cells)


def _load_cell(body: Sequence[Any]) -> StoredCell:
    start, num_bytes, offset, checks = body
    if start % ALIGNMENT or num_bytes % ALIGNMENT or offset % ALIGNMENT or min(start, offset) < 0:
        raise ValueError(f"cells: {body[:3]}")
    read = tuple(Check(offset + begin, offset + end, int(digest, 16)) for begin, end, digest in checks)
    at = offset
    for check in read:
        if check.start != at or check.stop <= at:
            raise ValueError(f"digests of the cell at {offset}")
        at = check.stop
    if at != offset + num_bytes:
        raise ValueError(f"digests of the cell at {offset}")
    return StoredCell(Extent(start, num_bytes), offset, read)
