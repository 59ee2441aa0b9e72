"""Matrices encoded in few bits as they are read from a checkpoint, or once, into a cache."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import transformers
from torch import nn

from outsize.block import Block, Piece
from outsize.config import DiskBudget, Weights
from outsize.errors import FileChangedError, ModelError, StorageError, WeightsError
from outsize.model.packed import PackedCache, PackedWriter
from outsize.model.quantized import put_in
from outsize.model.source import SafetensorsSource, Source
from outsize.model.writer import Planned
from outsize.quant import FORMATS, LINE_ROWS, Encoded, Format, Matrix

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of the codes: a change makes all caches stale."""

_SAY_EVERY_S = 10.0

_READ_ELEMENTS = 1 << 22
"""Of a matrix, read at once: pieces enough for all threads that read."""

_ENCODED_ELEMENTS = 1 << 20
"""Of them, encoded at once: what comes between stays near the processor."""

_ENCODING_BYTES = 24
"""For each of the latter: in fp32, its codes, and what comes between."""


def encoded(
    module: nn.Module, source: Source, weights: Weights, places: Sequence[DiskBudget] = ()
) -> EncodingSource:
    """Put matrices in few bits into `module`, in place, and give a source that encodes what `source` reads.

    `places` are folders for a cache, which `EncodingSource.pack` writes. Raises ModelError where `module` has no matrix to
    encode.
    """
    matrices = put_in(module, weights, frozenset())
    if not matrices:
        raise ModelError(
            f"{type(module).__name__} has no matrix that can be kept in {weights}",
            hint="its layers have none, or of other widths than multiples of 64: leave weights= out",
        )
    cache = None
    if isinstance(source, SafetensorsSource):
        depends_on = f"{_VERSION} {transformers.__version__} {source.fingerprint()} {sorted(matrices.values(), key=str)}"
        planned = {
            name: Planned(tuple(module.get_parameter(name).shape), torch.bfloat16)
            for matrix in matrices.values()
            for name in (matrix.name, matrix.scale_name)
        }
        cache = PackedCache.of(places, source.folder, weights, depends_on, planned)
    return EncodingSource(source, matrices, cache)


class EncodingSource:
    """What `source` holds, with `matrices` encoded: as they are read, some rows at a time, or once, by `pack`.

    A read gives the same bits each time. Raises WeightsError where a weight is not finite.
    """

    def __init__(
        self, source: Source, matrices: Mapping[str, Matrix], cache: PackedCache | None = None
    ) -> None:
        self.source = source
        self._matrices = {
            name: matrix for matrix in matrices.values() for name in (matrix.name, matrix.scale_name)
        }
        self._cache = cache
        self._packed = cache.open() if cache is not None else None
        self._lock = threading.RLock()
        self._bytes_read = 0
        """From caches that were damaged."""

    def encodes(self, block: Block) -> bool:
        """Whether `block` has a matrix that is encoded."""
        return any(piece.parameter in self._matrices for piece in block.pieces)

    def pack(self) -> None:
        """Write all matrices to the cache, unless it has them: no read encodes any more.

        Where the disk does not take them, that is logged once, and reads go on encoding. Takes the memory of a read. Raises
        WeightsError where a weight is not finite, FileChangedError where the model's files change meanwhile.
        """
        with self._lock:
            if self._packed is not None:
                return
            try:
                if self._cache is None:
                    raise StorageError("the model has no files")
                self._packed = self._cache.make(self._write, _log.warning)
            except FileChangedError:
                raise
            except StorageError as error:
                self._go_without(error)

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Fill one tensor per piece of `block`."""
        plain: list[tuple[Piece, torch.Tensor]] = []
        coded: dict[str, torch.Tensor] = {}
        for piece, target in zip(block.pieces, targets, strict=True):
            if piece.parameter in self._matrices:
                assert piece.is_whole, piece
                coded[piece.parameter] = target
            else:
                plain.append((piece, target))
        if plain:
            self.source.read(
                Block(block.name, tuple(piece for piece, _ in plain)), [target for _, target in plain]
            )
        if not coded or self._read_packed(coded):
            return
        for matrix in {self._matrices[name].name: self._matrices[name] for name in coded}.values():
            self._encode(matrix, coded.get(matrix.name), coded.get(matrix.scale_name))

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """Codes and scales are bfloat16 to whoever moves them."""
        return torch.bfloat16 if piece.parameter in self._matrices else self.source.stored_dtype(piece)

    def conversion_bytes(self, piece: Piece) -> int:
        """Of a matrix, what encoding a part of it takes, and its scales, which `pack` collects."""
        matrix = self._matrices.get(piece.parameter)
        if matrix is None:
            return self.source.conversion_bytes(piece)
        pieces = self._pieces(matrix)
        converting = self.source.conversion_bytes(pieces[0])
        encoding = _ENCODING_BYTES * max(_ENCODED_ELEMENTS, LINE_ROWS * matrix.shape[-1])
        transposed = 4 * matrix.shape[-1] * matrix.shape[-2] if matrix.is_transposed else 0
        scales = prod(matrix.shape) // 16
        dtype = self.source.stored_dtype(pieces[0]) or torch.float32
        reading = dtype.itemsize * pieces[0].num_elements * min(2, len(pieces))  # one is read ahead
        return converting + reading + transposed + encoding + scales

    def gives_rows(self, parameter: str) -> bool:
        """Of what is not encoded, as the source does."""
        return parameter not in self._matrices and self.source.gives_rows(parameter)

    def check(self) -> None:
        """Raise FileChangedError where a file of the model is not the one that was opened; reads check the cache."""
        self.source.check()

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far, those of the cache included."""
        own = self._bytes_read + (self._packed.bytes_read if self._packed is not None else 0)
        return self.source.bytes_read + own

    def close(self) -> None:
        """Let go of the files."""
        self.source.close()
        if self._packed is not None:
            self._packed.close()

    def _read_packed(self, coded: Mapping[str, torch.Tensor]) -> bool:
        """Fill `coded` from the cache, which is made again where it is damaged; false where there is none."""
        with self._lock:
            for is_again in (False, True):
                if self._packed is None:
                    return False
                try:
                    self._packed.read(coded)
                    return True
                except StorageError as error:
                    self._drop_packed()
                    if is_again:
                        self._go_without(error)
                    else:
                        _log.warning("the cache of packed weights is damaged: %s", error.message)
                        self.pack()
            return False

    def _drop_packed(self) -> None:
        """Delete the cache that is in use."""
        assert self._packed is not None and self._cache is not None
        self._bytes_read += self._packed.bytes_read
        self._packed.close()
        self._packed = None
        self._cache.remove()

    def _go_without(self, error: StorageError) -> None:
        self._cache = None
        _log.warning(
            "weights are encoded again each time they are read, and not cached: %s; "
            "`outsize quantize` writes them once",
            error.message,
        )

    def _write(self, writer: PackedWriter) -> None:
        """Encode all matrices into `writer`, in its order."""
        matrices = {self._matrices[name].name: self._matrices[name] for name in writer.planned}
        said_at = time.monotonic()
        for number, matrix in enumerate(matrices.values()):
            if time.monotonic() > said_at + _SAY_EVERY_S:
                said_at = time.monotonic()
                _log.warning("packing weights: %d of %d matrices", number, len(matrices))
            scales = torch.empty(writer.planned[matrix.scale_name].shape, dtype=torch.bfloat16, device="cpu")
            for part in self._parts(matrix):
                part.put_scales(scales)
                writer.write(matrix.name, part.encoded.codes)
            writer.write(matrix.scale_name, scales)
        self.source.check()

    def _encode(self, matrix: Matrix, codes: torch.Tensor | None, scales: torch.Tensor | None) -> None:
        """Into what is given of both."""
        for part in self._parts(matrix):
            if codes is not None:
                part.put_codes(codes)
            if scales is not None:
                part.put_scales(scales)

    def _parts(self, matrix: Matrix) -> Iterator[_Part]:
        """The whole matrix, encoded part by part in the order of its codes; one read is ahead of encoding."""
        pieces = self._pieces(matrix)
        dtype = self.source.stored_dtype(pieces[0]) or torch.float32
        with ThreadPoolExecutor(1, thread_name_prefix="outsize-ahead") as ahead:
            reading = ahead.submit(self._read, pieces[0], dtype)
            for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
                value = reading.result()
                if following is not None:
                    reading = ahead.submit(self._read, following, dtype)
                start = piece.row_start or 0
                if value.dim() == 2:
                    yield from _encoded_rows(matrix, value, start, None)
                    continue
                for expert, rows in enumerate(value, start):
                    rows_NK = rows.t().contiguous() if matrix.is_transposed else rows
                    yield from _encoded_rows(matrix, rows_NK, 0, expert)

    def _pieces(self, matrix: Matrix) -> list[Piece]:
        """What is read of a matrix at once: some rows, or one expert; all of it where the source gives no rows."""
        if not self.source.gives_rows(matrix.name):
            return [Piece(matrix.name, matrix.shape)]
        step = 1
        if len(matrix.shape) == 2:
            step = _whole_lines(FORMATS[matrix.weights], _READ_ELEMENTS // matrix.shape[1])
        stops = [*range(step, matrix.shape[0], step), matrix.shape[0]]
        return [
            Piece(matrix.name, (stop - start, *matrix.shape[1:]), start, stop)
            for start, stop in pairwise([0, *stops])
        ]

    def _read(self, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        value = torch.empty(piece.shape, dtype=dtype, device="cpu")
        self.source.read(Block(piece.parameter, (piece,)), [value])
        return value


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows `[start, stop)` of a matrix, or of that of an expert, encoded."""

    form: Format
    expert: int | None
    start: int
    stop: int
    encoded: Encoded

    def put_codes(self, codes: torch.Tensor) -> None:
        """Into their place in those of the whole matrix."""
        own = codes if self.expert is None else codes[self.expert]
        own[self.start // self.form.line_rows : self.stop // self.form.line_rows] = self.encoded.codes

    def put_scales(self, scales: torch.Tensor) -> None:
        """Into their place in those of the whole matrix."""
        own = scales if self.expert is None else scales[self.expert]
        width = self.form.scales_per_row
        own[..., width * self.start : width * self.stop] = self.encoded.scales


def _encoded_rows(matrix: Matrix, rows_NK: torch.Tensor, start: int, expert: int | None) -> Iterator[_Part]:
    """Rows of one matrix from `start` on, which is where a line begins."""
    form = FORMATS[matrix.weights]
    for part_NK in rows_NK.split(_whole_lines(form, _ENCODED_ELEMENTS // rows_NK.shape[1])):
        made = form.encode(part_NK)
        stop = start + part_NK.shape[0]
        if not bool(made.scales.isfinite().all()):
            raise WeightsError(
                f"{matrix.name} has weights that are not finite, between rows {start} and {stop}",
                hint="open it without weights=, and look at where it came from",
            )
        yield _Part(form, expert, start, stop, made)
        start = stop


def _whole_lines(form: Format, num_rows: int) -> int:
    return max(1, num_rows // form.line_rows) * form.line_rows
