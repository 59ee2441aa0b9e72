"""Commits as `torch.distributed.checkpoint` folders, and back: for those who come from FSDP2, or go there.

The folder holds what `get_state_dict` gives there: `model.<name>`, `optim.state.<name>.exp_avg` and its like, and
`optim.param_groups`, all in fp32. Tensors are written piece by piece, as shards, and read one at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from outsize.block import Block, Entry, Extent, Piece, Plane, Record
from outsize.checkpoint.convert import convert
from outsize.checkpoint.export import model_folder, read_commit, weights_of
from outsize.checkpoint.files import MODEL
from outsize.checkpoint.manifest import Manifest, StoredBlock
from outsize.checkpoint.module_state import ModuleState
from outsize.checkpoint.reading import CommitReader, CommitSource
from outsize.checkpoint.store import Store
from outsize.config import ComputeType
from outsize.errors import ConfigError, OutsizeError
from outsize.model import cut, open_skeleton, write_companions
from outsize.model.names import persistent_buffers
from outsize.model.writer import check_room, storage_errors
from outsize.optim import RULES
from outsize.store import memory
from outsize.store.commit_store import Layout
from outsize.store.snapshots import Snapshot, SnapshotBlock

NAMES = {Plane.MOMENT1: "exp_avg", Plane.MOMENT2: "exp_avg_sq"}
"""What torch's AdamW calls its moments; of other rules' optimizers torch has none, or one of other numerics."""


def export_dcp(
    folder: Path,
    out: Path,
    *,
    step: int | None = None,
    overwrite: bool = False,
    base: Path | None = None,
) -> Manifest:
    """Write the commit as the DCP folder `out`; `base` is where the model's own files are, where they were moved.

    Raises ConfigError where its optimizer has no counterpart in torch, StorageFullError, before anything is written, where
    the disk has no room for it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ConfigError(f"{out} is not empty", hint="pass another folder, or --overwrite")
    return read_commit(folder, step, lambda reader: _export(reader, folder, out, base))


def _export(reader: CommitReader, folder: Path, out: Path, base: Path | None) -> Manifest:
    if reader.manifest.rule != "adamw":
        raise ConfigError(
            f"the commit was made with {reader.manifest.optimizer['kind']}, which torch does not have",
            hint="export a Hugging Face folder: leave --dcp out",
        )
    module = open_skeleton(model_folder(folder), torch.float32)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with weights_of(reader, module, base) as weights, storage_errors(out), _own_errors():
            values = _Values(reader, module, weights)
            state_dict = values.state_dict()
            check_room(out, _num_bytes(state_dict))
            save(
                state_dict,
                # One item after the other: none is asked for before the one before it is written.
                storage_writer=FileSystemWriter(partial, thread_count=1, per_thread_copy_ahead=0),
                planner=_Streaming(values),
                no_dist=True,
            )
            if out.exists():
                shutil.rmtree(out)
            os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return reader.manifest


def _num_bytes(state: Mapping[str, Any]) -> int:
    """The bytes of all tensors in nested dictionaries."""
    found = 0
    for value in state.values():
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif isinstance(value, Mapping):
            found += _num_bytes(value)
    return found


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what went wrong, which torch wraps in an exception of its own."""
    try:
        yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError | OutsizeError):
                raise cause from None
        raise


class _Values:
    """What the folder will hold: meta tensors by key, and each tensor's value when it is asked for."""

    def __init__(self, reader: CommitReader, module: nn.Module, weights: CommitSource) -> None:
        self._reader = reader
        self._module = module
        self._weights = weights
        self._pieces: dict[str, list[Piece]] = {}
        for block in cut(self._module).blocks:
            for piece in block.pieces:
                self._pieces.setdefault(piece.parameter, []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.row_start or 0)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._module.named_parameters()}
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        everywhere = self._module.named_parameters(remove_duplicate=False)
        # Tied weights are there under all of their names, as a state_dict has them.
        self._first = {name: names[id(parameter)] for name, parameter in everywhere}

    def state_dict(self) -> dict[str, Any]:
        """Of meta tensors, numbers and texts."""
        steps = self._reader.manifest.optimizer["books"]["num_steps"]
        state: dict[str, Any] = {}
        for name, shape in self._shapes.items():
            if name in steps:
                moments = {torch_name: _meta(shape) for torch_name in NAMES.values()}
                state[name] = {
                    "step": torch.tensor(float(steps[name]), dtype=torch.float32, device="cpu"),
                    **moments,
                }
        # Every setting that torch's own optimizer has, since its users load all of them.
        defaults = torch.optim.AdamW(
            [nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))], lr=0.0
        ).param_groups[0]
        groups = [{**defaults, **group} for group in self._reader.manifest.optimizer["groups"] or ()]
        model: dict[str, torch.Tensor] = {
            name: _meta(self._shapes[first]) for name, first in self._first.items()
        }
        model |= persistent_buffers(self._module)
        return {"model": model, "optim": {"state": state, "param_groups": groups}}

    def pieces(self, key: str) -> Sequence[Piece]:
        """What the tensor of a flat key is read in, from the first row to the last; nothing where it is not one of ours."""
        parameter, _ = self._parameter(key)
        return self._pieces[parameter] if parameter is not None else ()

    def value(self, key: str, piece: Piece) -> torch.Tensor:
        """A piece of a parameter's masters, or of one of its moments, which is zero where it does not train."""
        _, plane = self._parameter(key)
        value = torch.zeros(piece.shape, dtype=torch.float32, device="cpu")
        if plane is None:
            self._weights.read(Block("", (piece,)), [value])
        elif (found := self._reader.find(piece)) is not None and found[1].trainable:
            value.copy_(self._reader.moment(*found, plane).view(piece.shape))
        return value

    def _parameter(self, key: str) -> tuple[str | None, Plane | None]:
        if key.startswith("model."):
            return self._first.get(key.removeprefix("model.")), None
        for plane, name in NAMES.items():
            if key.startswith("optim.state.") and key.endswith(f".{name}"):
                return key.removeprefix("optim.state.").removesuffix(f".{name}"), plane
        return None, None


def _meta(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), device="meta", dtype=torch.float32)


class _Streaming(DefaultSavePlanner):
    """Writes each tensor piece by piece, as a run over several ranks would, and reads a piece when it is written."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self._values = values
        self._last = torch.empty(0, dtype=torch.float32, device="cpu")

    def create_local_plan(self) -> SavePlan:
        """The plan of one rank."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The value of one item."""
        index = write_item.index
        first_row = index.offset[0] if index.offset else 0
        for piece in self._values.pieces(index.fqn):
            if first_row == (piece.row_start or 0):
                # The writer holds what it has written until the file is closed (torch 2.13): its memory is taken back.
                self._last.untyped_storage().resize_(0)
                memory.give_back()
                self._last = self._values.value(index.fqn, piece)
                return self._last
        return super().resolve_data(write_item)

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        pieces = self._values.pieces(item.index.fqn)
        if len(pieces) < 2:
            return [item]
        assert item.tensor_data is not None
        parts = []
        for piece in pieces:
            offsets = torch.Size([piece.row_start or 0] + [0] * (len(piece.shape) - 1))
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.shape))
            parts.append(
                WriteItem(
                    index=MetadataIndex(item.index.fqn, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=replace(item.tensor_data, chunk=chunk),
                )
            )
        return parts


def import_dcp(dcp_folder: Path, folder: Path, *, model: Path, dtype: str = "float32") -> int:
    """Make the store `folder` with one commit of what the DCP folder holds; `model` is its model's Hugging Face folder.

    Parameters that have moments there train; learning rate and the like stay those of the optimizer that resumes. The
    index of a DCP folder is a pickle, which is torch's choice: import folders that you trust. Returns the step. Raises
    ConfigError where the folder is none, or of another model.
    """
    module = open_skeleton(model, torch.float32)
    reader = _DcpReader(dcp_folder, module)
    records = _lay_out(reader, module, ComputeType(dtype))
    step = max(reader.steps.values(), default=0)
    store = Store.claim(folder, 1)
    try:
        if store.resume() is not None:
            raise ConfigError(f"{folder} holds commits already", hint="pass a new folder")
        layout = Layout.of(records)
        tier = store.open(records, layout, verify=True).tier
        try:
            convert(reader, records, layout.bases, tier)
            write_companions(module, store.folder / MODEL)

            def begin(complete: Callable[[Snapshot], None]) -> None:
                snapshot = Snapshot(layout.bases, complete)
                for record in records:
                    base = layout.bases[record.name]
                    cells = tier.capture(Extent(base, record.kept_bytes))
                    snapshot.add(SnapshotBlock(record.name, base, cells, is_stored=True))

            store.commit(_draft(reader, step, ComputeType(dtype)), ModuleState.of(module), begin)
            store.wait()
        finally:
            tier.close()
    finally:
        store.close()
    return step


def _lay_out(reader: _DcpReader, module: nn.Module, compute_type: ComputeType) -> list[Record]:
    """Records of all blocks, as a run with AdamW would have them; `reader` learns where their pieces are."""
    rule, own = RULES["adamw"], cut(module)
    kinds = {
        block: ComputeType.FLOAT32 if block.name in own.full_precision else compute_type
        for block in own.blocks
    }
    records = [
        Record.lay_out(
            block,
            [piece.parameter in reader.steps for piece in block.pieces],
            rule.state(kind),
            rule.element_bytes(kind),
        )
        for block, kind in kinds.items()
    ]
    reader.blocks = {
        entry.piece: (StoredBlock(record, True, ()), entry) for record in records for entry in record.entries
    }
    return records


def _draft(reader: _DcpReader, step: int, compute_type: ComputeType) -> Manifest:
    """What a commit says beside its blocks, as far as a DCP folder knows it."""
    return Manifest(
        step=step,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        compute_type=compute_type,
        rule="adamw",
        optimizer={
            "kind": "AdamW",
            "groups": None,
            "books": {"num_steps": reader.steps},
            "num_updates": step,
        },
        random=None,
        extra={},
        run={"tile_rows": None, "libraries": {}},
        blocks=(),
    )


class _DcpReader:
    """A DCP folder, read as `convert` reads a commit: a tensor at a time, of which the last is kept.

    The persistent buffers of `module` are filled at once.
    """

    def __init__(self, folder: Path, module: nn.Module) -> None:
        try:
            self._reader = FileSystemReader(folder)
            metadata = self._reader.read_metadata().state_dict_metadata
        except OSError as error:
            raise ConfigError(
                f"{folder} is no folder of torch.distributed.checkpoint: {error.strerror}",
                hint="pass the folder that dcp.save wrote",
            ) from error
        self._sizes = {
            key: tuple(entry.size)
            for key, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        for name, buffer in persistent_buffers(module).items():
            if self._sizes.get(f"model.{name}") != tuple(buffer.shape):
                raise ConfigError(
                    f"{folder} has no buffer model.{name} of shape {tuple(buffer.shape)}",
                    hint="save {'model': ..., 'optim': ...} as get_state_dict gives them, and pass the same model",
                )
            load({f"model.{name}": buffer}, storage_reader=self._reader, no_dist=True)
        self._last: tuple[str, torch.Tensor] | None = None
        self.blocks: dict[Piece, tuple[StoredBlock, Entry]] = {}
        for name, parameter in module.named_parameters():
            found = self._sizes.get(f"model.{name}")
            if found != tuple(parameter.shape):
                raise ConfigError(
                    f"{folder} has model.{name} of shape {found}, expected {tuple(parameter.shape)}",
                    hint="save {'model': ..., 'optim': ...} as get_state_dict gives them, and pass the same model",
                )
        self.steps = {
            name: int(self._tensor(f"optim.state.{name}.step").item())
            for name, _ in module.named_parameters()
            if f"optim.state.{name}.exp_avg" in self._sizes
        }

    def find(self, piece: Piece) -> tuple[StoredBlock, Entry]:
        """Where a piece is."""
        return self.blocks[piece]

    def master(self, block: StoredBlock, entry: Entry) -> torch.Tensor:
        """The fp32 weights of an entry."""
        return self._rows(f"model.{entry.piece.parameter}", entry.piece)

    def moment(self, block: StoredBlock, entry: Entry, plane: Plane) -> torch.Tensor:
        """A moment of an entry."""
        return self._rows(f"optim.state.{entry.piece.parameter}.{NAMES[plane]}", entry.piece)

    def _rows(self, key: str, piece: Piece) -> torch.Tensor:
        value = self._tensor(key)
        part = value if piece.is_whole else value[piece.row_start : piece.row_stop]
        return part.reshape(-1)

    def _tensor(self, key: str) -> torch.Tensor:
        if self._last is None or self._last[0] != key:
            self._last = None
            value = torch.empty(self._sizes[key], dtype=torch.float32, device="cpu")
            load({key: value}, storage_reader=self._reader, no_dist=True)
            self._last = key, value
        return self._last[1]
