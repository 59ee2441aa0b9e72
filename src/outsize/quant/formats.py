"""Matrices in few bits: how they are encoded, and what they stand for.

Codes and scales are kept in tensors of bfloat16, whatever their bytes mean: a record has one type, and moves bytes.

int8: a code for each weight, one scale for each row: `weight = code * scale`.
int4: groups of GROUP columns of a row share a scale and a zero: `weight = (code - 8) * scale + zero`. Codes lie as torch's
product of four bits wants them on a CPU with AVX-512, on any machine: lines of 64 rows, column by column, a byte for rows
`i` and `i + 32` of the line, the lower in the lower half. Rounding to the nearest of evenly spaced values between the
least and the largest weight of a group is that of Dettmers and Zettlemoyer, "The case for 4-bit precision" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from outsize.config import Weights
from outsize.quant.packing import packer

LINE_ROWS = 64
GROUP = 64
"""Columns of a row that share a scale in four bits."""

_LEAST_SCALE = 1e-20


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some rows of a matrix: their codes, as bfloat16 `[lines, ...]`, and their scales `[..., rows * scales_per_row]`."""

    codes: torch.Tensor
    scales: torch.Tensor


class Format(Protocol):
    """One way of encoding a matrix `[N, K]`."""

    line_rows: int
    """Rows that lie together: codes are cut here, and nowhere else."""
    scales_per_row: int

    def fits(self, num_rows: int, num_columns: int) -> bool:
        """Whether a matrix of this shape can be encoded."""

    def shapes(self, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the codes and of the scales."""

    def encode(self, weight_NK: torch.Tensor) -> Encoded:
        """The nearest codes; of NaN or infinite weights, nothing that means anything."""

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """What is meant: `[N, K]` in fp32."""


def _compiled(form: Format, weight_NK: torch.Tensor) -> Encoded | None:
    """The codes of `weight_NK` by the compiled library; None where there is none, or the matrix is not on the host."""
    if weight_NK.device.type != "cpu" or (pack := packer()) is None:
        return None
    if weight_NK.dtype is not torch.bfloat16:
        weight_NK = weight_NK.float()
    codes, scales = (
        torch.empty(shape, dtype=torch.bfloat16, device="cpu") for shape in form.shapes(*weight_NK.shape)
    )
    pack(weight_NK.contiguous(), codes, scales, form.line_rows == LINE_ROWS)
    return Encoded(codes, scales)


class Int8:
    """A code of eight bits for each weight, and a scale for each row."""

    line_rows = 1
    scales_per_row = 1

    def fits(self, num_rows: int, num_columns: int) -> bool:
        """Rows of whole vectors."""
        return num_rows % 16 == 0 and num_columns % 64 == 0

    def shapes(self, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the codes and of the scales."""
        return (num_rows, num_columns // 2), (num_rows,)

    def encode(self, weight_NK: torch.Tensor) -> Encoded:
        """The nearest codes."""
        return _compiled(self, weight_NK) or self.encode_in_torch(weight_NK)

    def encode_in_torch(self, weight_NK: torch.Tensor) -> Encoded:
        """The same bits without the compiled library."""
        weight_NK = weight_NK.float()
        scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(_LEAST_SCALE).bfloat16()
        codes_NK = (weight_NK / scale_N.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return Encoded(codes_NK.view(torch.bfloat16), scale_N)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """What is meant: `[N, K]` in fp32."""
        return encoded.codes.view(torch.int8).float() * encoded.scales.float()[:, None]


class Int4:
    """A code of four bits for each weight, and a scale and a zero for GROUP of them."""

    line_rows = LINE_ROWS
    scales_per_row = 2

    def fits(self, num_rows: int, num_columns: int) -> bool:
        """Whole lines, and whole groups."""
        return num_rows % LINE_ROWS == 0 and num_columns % GROUP == 0

    def shapes(self, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the codes and of the scales."""
        return (num_rows // LINE_ROWS, num_columns * LINE_ROWS // 4), (num_columns // GROUP, num_rows * 2)

    def encode(self, weight_NK: torch.Tensor) -> Encoded:
        """The nearest codes."""
        return _compiled(self, weight_NK) or self.encode_in_torch(weight_NK)

    def encode_in_torch(self, weight_NK: torch.Tensor) -> Encoded:
        """The same bits without the compiled library."""
        num_rows, num_columns = weight_NK.shape
        groups_NGC = weight_NK.float().view(num_rows, -1, GROUP)
        least_NG, most_NG = groups_NGC.aminmax(dim=2)
        scale_NG = ((most_NG - least_NG) / 15).clamp_min(_LEAST_SCALE).bfloat16()
        zero_NG = (least_NG + 8 * scale_NG.float()).bfloat16()
        codes_NGC = (groups_NGC - zero_NG.float()[..., None]).div_(scale_NG.float()[..., None])
        codes_NK = codes_NGC.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(num_rows, num_columns)
        low_LKR, high_LKR = codes_NK.view(-1, 2, LINE_ROWS // 2, num_columns).transpose(2, 3).unbind(1)
        packed = (high_LKR << 4).bitwise_or_(low_LKR).contiguous().view(num_rows // LINE_ROWS, -1)
        scales = torch.stack((scale_NG, zero_NG), dim=2).transpose(0, 1).reshape(-1, 2 * num_rows)
        return Encoded(packed.view(torch.bfloat16), scales)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """What is meant: `[N, K]` in fp32."""
        num_rows = encoded.scales.shape[1] // 2
        packed_LKR = encoded.codes.view(torch.uint8).view(num_rows // LINE_ROWS, -1, LINE_ROWS // 2)
        codes_LKN = torch.cat((packed_LKR & 15, packed_LKR >> 4), dim=2)
        codes_NGC = codes_LKN.transpose(1, 2).reshape(num_rows, -1, GROUP).float()
        scale_NG, zero_NG = encoded.scales.view(-1, num_rows, 2).float().permute(2, 1, 0)
        weight_NGC: torch.Tensor = (codes_NGC - 8) * scale_NG[..., None] + zero_NG[..., None]
        return weight_NGC.view(num_rows, -1)


FORMATS: dict[Weights, Format] = {Weights.INT8: Int8(), Weights.INT4: Int4()}
