"""Matrices encoded in few bits as they are read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from outsize.block import Block, Piece
from outsize.config import Weights
from outsize.errors import ModelError, WeightsError
from outsize.model.quantized import put_in
from outsize.model.source import Source
from outsize.quant import FORMATS, LINE_ROWS, Format, Matrix

_READ_ELEMENTS = 1 << 22
"""Of a matrix, read at once: pieces enough for all threads that read."""

_ENCODED_ELEMENTS = 1 << 20
"""Of them, encoded at once: what comes between stays near the processor."""

_ENCODING_BYTES = 24
"""For each of the latter: in fp32, its codes, and what comes between."""


def encoded(module: nn.Module, source: Source, weights: Weights) -> Source:
    """Put matrices in few bits into `module`, in place, and give a source that encodes what `source` reads.

    Raises ModelError where it has no matrix that can be encoded.
    """
    matrices = put_in(module, weights, frozenset())
    if not matrices:
        raise ModelError(
            f"{type(module).__name__} has no matrix that can be kept in {weights}",
            hint="its layers have none, or of other widths than multiples of 64: leave weights= out",
        )
    return EncodingSource(source, matrices)


class EncodingSource:
    """What `source` holds, with `matrices` encoded as they are read, some rows at a time.

    A read gives the same bits each time, and takes as long as encoding does. Raises WeightsError where a weight is not
    finite.
    """

    def __init__(self, source: Source, matrices: Mapping[str, Matrix]) -> None:
        self.source = source
        self._matrices = {
            name: matrix for matrix in matrices.values() for name in (matrix.name, matrix.scale_name)
        }

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
        for matrix in {self._matrices[name].name: self._matrices[name] for name in coded}.values():
            self._encode(matrix, coded.get(matrix.name), coded.get(matrix.scale_name))

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """Codes and scales are bfloat16 to whoever moves them."""
        return torch.bfloat16 if piece.parameter in self._matrices else self.source.stored_dtype(piece)

    def conversion_bytes(self, piece: Piece) -> int:
        """Of a matrix, what encoding a part of it takes."""
        matrix = self._matrices.get(piece.parameter)
        if matrix is None:
            return self.source.conversion_bytes(piece)
        whole = Piece(matrix.name, matrix.shape)
        converting = self.source.conversion_bytes(whole)
        encoding = _ENCODING_BYTES * max(_ENCODED_ELEMENTS, LINE_ROWS * matrix.shape[-1])
        is_whole = converting or len(matrix.shape) > 2
        num_read = whole.num_elements if is_whole else min(whole.num_elements, _READ_ELEMENTS)
        transposed = 4 * matrix.shape[-1] * matrix.shape[-2] if matrix.is_transposed else 0
        return converting + 4 * num_read + transposed + encoding

    def gives_rows(self, parameter: str) -> bool:
        """Of what is not encoded, as the source does."""
        return parameter not in self._matrices and self.source.gives_rows(parameter)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self.source.bytes_read

    def close(self) -> None:
        """Let go of the files."""
        self.source.close()

    def _encode(self, matrix: Matrix, codes: torch.Tensor | None, scales: torch.Tensor | None) -> None:
        """Into what is given of both, part by part; what the source converts comes as a whole."""
        whole = Piece(matrix.name, matrix.shape)
        dtype = self.source.stored_dtype(whole) or torch.float32
        if len(matrix.shape) == 2 and not self.source.conversion_bytes(whole):
            form = FORMATS[matrix.weights]
            step = _whole_lines(form, _READ_ELEMENTS // matrix.shape[1])
            for start in range(0, matrix.shape[0], step):
                stop = min(start + step, matrix.shape[0])
                piece = Piece(matrix.name, (stop - start, matrix.shape[1]), start, stop)
                self._encode_rows(matrix, self._read(piece, dtype), start, codes, scales)
            return
        value = self._read(whole, dtype)
        for index, part in enumerate(value if value.dim() == 3 else value[None]):
            self._encode_rows(
                matrix,
                part.t().contiguous() if matrix.is_transposed else part,
                0,
                codes if codes is None or value.dim() == 2 else codes[index],
                scales if scales is None or value.dim() == 2 else scales[index],
            )

    def _read(self, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        value = torch.empty(piece.shape, dtype=dtype)
        self.source.read(Block(piece.parameter, (piece,)), [value])
        return value

    def _encode_rows(
        self,
        matrix: Matrix,
        rows_NK: torch.Tensor,
        start: int,
        codes: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
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
            if codes is not None:
                codes[start // form.line_rows : stop // form.line_rows] = made.codes
            if scales is not None:
                scales[..., form.scales_per_row * start : form.scales_per_row * stop] = made.scales
            start = stop


def _whole_lines(form: Format, num_rows: int) -> int:
    return max(1, num_rows // form.line_rows) * form.line_rows
