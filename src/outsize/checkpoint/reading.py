"""Reading a commit without a model: values of blocks in fp32 and moments in their natural order, every byte checked."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
import xxhash

from outsize.block import Block, Entry, Piece, Plane
from outsize.checkpoint.files import Header, buffers_path, commit_path, data_paths
from outsize.checkpoint.manifest import Manifest, StoredBlock, StoredCell
from outsize.checkpoint.module_state import ModuleState, digest_of
from outsize.config import ComputeType
from outsize.errors import CorruptionError, OutsizeError, StorageError, WeightsError
from outsize.model import Source
from outsize.optim import CODED_GROUP_BYTES, GROUP, interleave, join
from outsize.tier import DurableTier, StripedTier
from outsize.tier.readonly import ReadOnlyTier
from outsize.tier.striped import part_bytes


class CommitReplaced(StorageError):
    """The commit is gone that was being read: its run has made a newer one. Never raised where it is damaged."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(
            f"{folder}: the commit of step {step} was replaced while it was read",
            hint="read the newest again, or let the run keep more commits: --keep",
        )


def open_data(folder: Path, header: Header) -> DurableTier:
    """The data of a store, to be read only. Raises StorageError where a file is missing or too short."""
    tiers = [ReadOnlyTier(path) for path in data_paths(folder, header)]
    wanted = header.num_bytes if len(tiers) == 1 else part_bytes(header.num_bytes, len(tiers))
    for tier in tiers:
        if tier.num_bytes < wanted:
            raise CorruptionError(
                f"{tier.path} has {tier.num_bytes} bytes, and the store's extents reach to {wanted}",
                hint="the file was cut short; restore it from a copy",
            )
    return tiers[0] if len(tiers) == 1 else StripedTier(tiers, header.num_bytes)


class CommitReader:
    """The blocks of one commit. Everything that is read is checked against the manifest's digests.

    Memory is that of what is asked for, and one cell. Raises CorruptionError naming file, block and plane, and
    CommitReplaced where a process that writes has given the commit's space to another meanwhile.
    """

    def __init__(self, folder: Path, header: Header, manifest: Manifest) -> None:
        self.manifest = manifest
        self.compute_type = ComputeType(manifest.compute_type)
        self._folder = folder
        self._tier = open_data(folder, header)
        self._at = {
            (piece.parameter, piece.row_start): (block, entry)
            for block in manifest.blocks
            for entry in block.record.entries
            for piece in (entry.piece,)
        }
        largest = max((cell.cell.num_bytes for block in manifest.blocks for cell in block.cells), default=1)
        self._scratch = mmap.mmap(-1, largest)

    def close(self) -> None:
        """Close the files."""
        self._tier.close()

    def __enter__(self) -> CommitReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find(self, piece: Piece) -> tuple[StoredBlock, Entry] | None:
        """Where the commit has this piece; None where it was never stored. Raises WeightsError where it has none such."""
        found = self._at.get((piece.parameter, piece.row_start))
        if found is None or found[1].piece != piece:
            raise WeightsError(
                f"the commit of step {self.manifest.step} has no {piece.parameter} of shape {list(piece.shape)}",
                hint="it was made of another model; pass the model that it was made of",
            )
        return found if found[0].has(found[1]) else None

    def master(self, block: StoredBlock, entry: Entry) -> torch.Tensor:
        """The fp32 master weights of an entry, `[num_elements]`."""
        if block.record.compute_type is ComputeType.FLOAT32:
            return self.plane(block, entry, Plane.WEIGHT, torch.float32)
        weight = self.plane(block, entry, Plane.WEIGHT, torch.bfloat16)
        if not entry.trainable or Plane.REMAINDER not in block.record.state:
            return weight.float()
        return join(weight, self.plane(block, entry, Plane.REMAINDER, torch.int16))

    def moment(self, block: StoredBlock, entry: Entry, plane: Plane) -> torch.Tensor:
        """A moment of an entry in natural order: fp32 `[num_elements]`; of codes whole groups, uint8 `[groups, 68]`."""
        record = block.record
        is_split = record.compute_type is not ComputeType.FLOAT32
        num_elements = entry.stop - entry.start
        padded = -(-num_elements // GROUP) * GROUP
        # A slice ends with its entry, and the last group of a plane is as long as the plane.
        stop = min(entry.start + padded, record.num_trainable)
        if record.element_bytes[plane] == 4:
            values = self._range(block, plane, entry.start, stop, torch.float32)
            return (interleave(values) if is_split else values)[:num_elements]
        groups = self._range(block, plane, entry.start, stop, torch.uint8).view(-1, CODED_GROUP_BYTES)
        if is_split:
            codes = interleave(groups[:, :GROUP].reshape(-1)).view(-1, GROUP)
            groups = torch.cat([codes, groups[:, GROUP:]], 1)
        return groups

    def module_state(self) -> ModuleState | None:
        """Buffers and extra state; None for a commit of a version that has none. Raises as all reading does."""
        stored = self.manifest.buffers
        if stored is None:
            return None
        path = buffers_path(self._folder, self.manifest.step)
        try:
            data = path.read_bytes()
        except OSError as error:
            self._check_not_replaced(None)
            raise CorruptionError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != stored.num_bytes or digest_of(data) != stored.digest:
            self._check_not_replaced(None)
            raise CorruptionError(
                f"{path}: the buffers of the commit are not those that were written",
                hint="the drive is failing, or another program wrote to the file; an earlier commit may be whole",
            )
        return ModuleState.loads(data, self.manifest.extra_state, path)

    def verify(self, block: StoredBlock) -> int:
        """Read and check all of a block; returns bytes. Raises CorruptionError, StorageError."""
        for index, cell in enumerate(block.cells):
            self._read_cell(block, index, cell).release()
        return sum(cell.cell.num_bytes for cell in block.cells)

    def plane(self, block: StoredBlock, entry: Entry, plane: Plane, dtype: torch.dtype) -> torch.Tensor:
        """An entry of weights or remainders as they are stored, `[num_elements]`."""
        return self._range(block, plane, entry.start, entry.stop, dtype)

    def _range(
        self, block: StoredBlock, plane: Plane, first: int, last: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Elements `[first, last)` of a plane as it is stored, each cell read once."""
        record = block.record
        size = record.element_bytes[plane]
        values = torch.empty(int((last - first) * size) // dtype.itemsize, dtype=dtype, device="cpu")
        data = memoryview(values.view(torch.uint8).numpy().data)
        starts = [cell.cell.offset for cell in block.cells]
        for start, stop, extent in record.plane_parts(plane):
            begin, end = max(first, start), min(last, stop)
            if begin >= end:
                continue
            index = bisect_right(starts, extent.offset) - 1
            at = extent.offset - starts[index] + int((begin - start) * size)
            with self._read_cell(block, index, block.cells[index]) as cell:
                data[int((begin - first) * size) : int((end - first) * size)] = cell[
                    at : at + int((end - begin) * size)
                ]
        return values

    def _read_cell(self, block: StoredBlock, index: int, cell: StoredCell) -> memoryview:
        """The bytes of a cell, valid until the next is read."""
        record = block.record
        num_weights = len(list(record.chunks(Plane.WEIGHT)))
        what = f"weight[{index}]" if index < num_weights else f"state[{index - num_weights}]"
        label = f"{record.name}.{what}"
        view = memoryview(self._scratch)[: cell.cell.num_bytes]
        try:
            self._tier.start_read(cell.offset, view, label).wait()
        except StorageError as error:
            self._check_not_replaced(error)
            raise
        for check in cell.checks:
            part = view[check.start - cell.offset : check.stop - cell.offset]
            if xxhash.xxh3_64_intdigest(part) != check.digest:
                self._check_not_replaced(None)
                raise CorruptionError(
                    f"{self._folder}: {label} of the commit of step {self.manifest.step}: bytes {check.start} to "
                    f"{check.stop} of the data are not those that were written",
                    hint="the drive is failing, or another program wrote to the file; an earlier commit may be whole",
                )
        return view

    def _check_not_replaced(self, cause: StorageError | None) -> None:
        """Raise CommitReplaced where the manifest is not there any more.

        A commit's name goes before its extents are written over: where these are not as they were and the name is
        there, something else wrote to them.
        """
        path = commit_path(self._folder, self.manifest.step)
        try:
            is_there = Manifest.loads(path.read_bytes(), path) == self.manifest
        except FileNotFoundError:
            is_there = False
        except (OSError, OutsizeError):
            return
        if not is_there:
            raise CommitReplaced(self._folder, self.manifest.step) from cause


class CommitSource:
    """The weights of a commit as a source; what was never updated comes from the model's own files, opened at need."""

    def __init__(self, reader: CommitReader, open_others: Callable[[], Source]) -> None:
        self._reader = reader
        self._open_others = open_others
        self._others: Source | None = None

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Fill one target per piece: bf16 ones with the weights that a run in bf16 computed with, others with masters."""
        for piece, target in zip(block.pieces, targets, strict=True):
            found = self._reader.find(piece)
            if found is None:
                self._rest().read(Block(block.name, (piece,)), [target])
            elif target.dtype is torch.bfloat16 and found[0].record.compute_type is ComputeType.BFLOAT16:
                target.copy_(self._reader.plane(*found, Plane.WEIGHT, torch.bfloat16).view(piece.shape))
            else:
                target.copy_(self._reader.master(*found).view(piece.shape))

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """The type of the block in the commit, in which `read` gives exact weights; else what the other source says."""
        found = self._reader.find(piece)
        if found is None:
            return self._rest().stored_dtype(piece)
        return torch.bfloat16 if found[0].record.compute_type is ComputeType.BFLOAT16 else torch.float32

    def conversion_bytes(self, piece: Piece) -> int:
        """Planes in memory, and the master that is put together of them."""
        return (
            8 * piece.num_elements
            if self._reader.find(piece) is not None
            else self._rest().conversion_bytes(piece)
        )

    def gives_rows(self, parameter: str) -> bool:
        """Never: planes are checked as a whole."""
        return False

    def check(self) -> None:
        """The model's own files; of the commit, every read is checked."""
        if self._others is not None:
            self._others.check()

    @property
    def bytes_read(self) -> int:
        """From the model's own files."""
        return self._others.bytes_read if self._others is not None else 0

    def _rest(self) -> Source:
        self._others = self._others or self._open_others()
        return self._others

    def close(self) -> None:
        """Close the commit; the other source is closed by whoever opens it."""
        self._reader.close()
