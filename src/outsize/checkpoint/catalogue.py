"""What is in a store: its commits, one of them in detail, and whether every byte is as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outsize.block import Plane
from outsize.checkpoint.export import ATTEMPTS, read_commit
from outsize.checkpoint.files import Header, commit_paths, data_paths, read_header, read_manifest
from outsize.checkpoint.manifest import Manifest
from outsize.checkpoint.reading import CommitReader
from outsize.errors import ConfigError, OutsizeError


@dataclass(frozen=True, slots=True)
class Found:
    """A commit, or why it cannot be read."""

    step: int
    path: Path
    manifest: Manifest | None
    error: OutsizeError | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """A store: its commits, the oldest first, and the bytes that its data files take."""

    folder: Path
    commits: tuple[Found, ...]
    num_bytes: int


def contents(folder: Path) -> Contents:
    """What the store at `folder` holds. Raises ConfigError where it is none."""
    for _ in range(ATTEMPTS):
        header, commits, is_all = _found(folder)
        if is_all:
            break
    taken = sum(path.stat().st_blocks * 512 for path in data_paths(folder, header) if path.exists())
    return Contents(folder, tuple(commits), taken)


def _found(folder: Path) -> tuple[Header, list[Found], bool]:
    """The header, the commits, and whether none was replaced meanwhile: such a one is left out."""
    # In this order: a header has the extents of all manifests that were there before it was read, and still are.
    paths = commit_paths(folder)
    header = read_header(folder)
    if header is None:
        raise ConfigError(f"{folder} is no checkpoint", hint="pass a folder such as tuned.checkpoint")
    commits = []
    for path in paths:
        try:
            commits.append(Found(int(path.stem), path, read_manifest(path, header)))
        except OutsizeError as error:
            if path.exists():
                commits.append(Found(int(path.stem), path, None, error))
    return header, commits, len(commits) == len(paths)


def verify(
    folder: Path, step: int | None, tell: Callable[[str, int, int], None], *, base: Path | None = None
) -> Manifest:
    """Read and check all of a commit; `tell(block, bytes so far, bytes of all)` follows each block.

    Where it does not store all blocks, the model's own files must hold what they held: their sizes, headers and samples
    of their weights are checked. `base` is where they are, where they were moved. Where no `step` is given and a run
    replaces the commit meanwhile, the newest is begun with. Raises CorruptionError naming file, block and plane,
    FileChangedError, StorageError.
    """

    def check(reader: CommitReader) -> Manifest:
        done = 0
        for block in reader.manifest.blocks:
            done += reader.verify(block)
            tell(block.record.name, done, reader.manifest.num_bytes)
        reader.module_state()
        manifest = reader.manifest
        if manifest.base is not None and not manifest.is_whole:
            manifest.base.check(base or manifest.base.folder)
        return manifest

    return read_commit(folder, step, check)


def describe(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """A commit as names and words."""
    from outsize.config import format_bytes

    blocks = manifest.blocks
    stored = [block for block in blocks if block.is_stored]
    num_elements = sum(block.record.block.num_elements for block in blocks)
    trainable = sum(
        entry.piece.num_elements for block in blocks for entry in block.record.entries if entry.trainable
    )
    planes = {str(plane) for block in blocks for plane in block.record.state}
    yield "step", str(manifest.step)
    yield "written", manifest.written
    yield "parameters", f"{num_elements:,}, {trainable:,} of them train"
    yield "computed in", manifest.compute_type
    yield "optimizer", f"{manifest.optimizer['kind']}: {', '.join(sorted(planes)) or 'no state'}"
    groups = manifest.optimizer["groups"]
    if groups is not None:  # what was imported has none
        yield "learning rate", ", ".join(f"{group['lr']:.3g}" for group in groups)
    yield "blocks", f"{len(blocks)}, {len(stored)} stored, {format_bytes(manifest.num_bytes)}"
    if manifest.base is not None and not manifest.is_whole:
        yield "other weights", f"in the files of {manifest.base.folder}"
    weights = sum(
        extent.num_bytes for block in stored for _, _, extent in block.record.plane_parts(Plane.WEIGHT)
    )
    yield "of that weights", format_bytes(weights)
    if manifest.buffers is not None:
        yield "buffers", format_bytes(manifest.buffers.num_bytes)
    if manifest.run["tile_rows"] is not None:
        run = manifest.run
        yield (
            "computed by",
            f"tiles of {run['tile_rows']} rows, {run['threads']} threads, {run['backend']} updates",
        )
    if libraries := manifest.run["libraries"]:
        yield "versions", ", ".join(f"{name} {number}" for name, number in libraries.items())
