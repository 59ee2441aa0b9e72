"""A commit as an ordinary Hugging Face folder, without the run that made it. Memory is about two blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from outsize.block import Block
from outsize.checkpoint.files import MODEL, commit_paths, read_header, read_manifest
from outsize.checkpoint.manifest import Manifest
from outsize.checkpoint.reading import CommitReader, CommitReplaced, CommitSource
from outsize.config import ComputeType
from outsize.errors import ConfigError, StorageError, WeightsError
from outsize.model import Existing, SafetensorsSource, cut, open_skeleton, write_folder
from outsize.model.names import persistent_buffers
from outsize.store import memory

ATTEMPTS = 5
"""At reading the newest commit, where a run replaces it each time."""

T = TypeVar("T")

_DTYPES = {ComputeType.FLOAT32: torch.float32, ComputeType.BFLOAT16: torch.bfloat16}


def open_commit(folder: Path, step: int | None = None) -> CommitReader:
    """The commit after `step` in the store at `folder`, or the newest.

    Raises ConfigError where there is none, CommitReplaced where it vanishes meanwhile.
    """
    # In this order: a header has the extents of all manifests that were there before it was read, and still are.
    paths = commit_paths(folder)
    header = read_header(folder)
    if header is None:
        raise ConfigError(f"{folder} is no checkpoint", hint="pass a folder such as tuned.checkpoint")
    if step is not None:
        steps = ", ".join(str(int(path.stem)) for path in paths) or "none"
        paths = [path for path in paths if int(path.stem) == step]
        if not paths:
            raise ConfigError(f"{folder} has no commit of step {step}", hint=f"it has {steps}")
    if not paths:
        raise ConfigError(f"{folder} holds no commit yet")
    try:
        manifest = read_manifest(paths[-1], header)
    except StorageError as error:
        if paths[-1].exists():
            raise
        raise CommitReplaced(folder, int(paths[-1].stem)) from error
    return CommitReader(folder, header, manifest)


def read_commit(folder: Path, step: int | None, use: Callable[[CommitReader], T]) -> T:
    """What `use` makes of the commit. Where no step is given and a run replaces the newest meanwhile, the newest again.

    Raises as `open_commit` and `use`; CommitReplaced where the run is faster each time.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with open_commit(folder, step) as reader:
                return use(reader)
        except CommitReplaced:
            if step is not None or attempt == ATTEMPTS:
                raise
    raise AssertionError(folder)


def export(
    folder: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    base: Path | None = None,
) -> Manifest:
    """Write the commit as the Hugging Face folder `out`: weights, config, tokenizer.

    Weights are written in the type that blocks computed in, or as `dtype`; "float32" gives the exact masters. `base` is
    where the model's own files are, where they were moved. Raises ConfigError, StorageError, FileChangedError where the
    commit needs the model's own files and they hold other weights; `out` is there completely or not at all.
    """
    return read_commit(folder, step, lambda reader: _export(reader, folder, out, dtype, overwrite, base))


def _export(
    reader: CommitReader, folder: Path, out: Path, dtype: str | None, overwrite: bool, base: Path | None
) -> Manifest:
    torch_dtype = _DTYPES[ComputeType(dtype) if dtype is not None else reader.compute_type]
    module = open_skeleton(model_folder(folder), torch_dtype)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    with weights_of(reader, module, base) as source:

        def fetch(block: Block) -> list[torch.Tensor]:
            memory.give_back()  # what other blocks have freed may fit into nothing of this one
            values = [
                torch.empty(piece.shape, dtype=dtypes[piece.parameter], device="cpu")
                for piece in block.pieces
            ]
            source.read(block, values)
            return values

        write_folder(
            module,
            cut(module).blocks,
            fetch,
            out,
            tokenizer_from=model_folder(folder),
            dtype=torch_dtype,
            existing=Existing.REPLACE if overwrite else Existing.REFUSE,
        )
    return reader.manifest


@contextmanager
def weights_of(reader: CommitReader, module: nn.Module, base: Path | None) -> Iterator[CommitSource]:
    """All weights of a commit; those that were never updated come from the files that the run took them from, or `base`.

    `module`, a skeleton of the model, gets the commit's buffers.
    """
    with ExitStack() as stack:

        def open_files() -> SafetensorsSource:
            if reader.manifest.base is None:
                raise StorageError(f"the commit of step {reader.manifest.step} names no files of a model")
            opened = reader.manifest.base.open(module, base)
            stack.callback(opened.close)
            return opened

        # Opening the files fills the module's buffers, so those of the commit come after.
        files = None if reader.manifest.is_whole else open_files()
        state = reader.module_state()
        if state is not None:
            state.check(module, f"the commit of step {reader.manifest.step}")
            state.restore(module)
        elif files is None and persistent_buffers(module):
            _take_buffers(reader.manifest, open_files)
        yield CommitSource(reader, open_files if files is None else lambda: files)


def _take_buffers(manifest: Manifest, open_files: Callable[[], SafetensorsSource]) -> None:
    """Buffers for a commit that has none: those of the folder that the run began with."""
    try:
        open_files()
    except (StorageError, WeightsError) as error:
        warnings.warn(
            f"the commit of step {manifest.step} has no buffers, and those of the model it began with cannot be read "
            f"({error.message}): they are as the model's constructor makes them",
            RuntimeWarning,
            stacklevel=5,
        )


def model_folder(folder: Path) -> Path:
    """What lies beside weights. Raises StorageError where the model is no Hugging Face model."""
    if not (folder / MODEL / "config.json").is_file():
        raise StorageError(
            f"{folder} holds no config of a Hugging Face model: only its own code can open it",
            hint="wrap the model, outsize.checkpoint.resume, and outsize.save it",
        )
    return folder / MODEL
