"""Products with codes are those with what codes stand for, by whatever kernel."""

import sys

import pytest
import torch

from outsize.config import Weights
from outsize.quant import FORMATS, product
from outsize.quant.formats import LINE_ROWS
from outsize.serve.fixed import FixedTiles

room = sys.modules["outsize.quant.product"]


def operands(num_rows, weights, shape=(256, 192)):
    generator = torch.Generator().manual_seed(num_rows)
    encoded = FORMATS[weights].encode(torch.randn(shape, generator=generator) * 0.05)
    return torch.randn(num_rows, shape[1], generator=generator).bfloat16(), encoded


@pytest.fixture(params=["compiled", "torch"])
def widened_by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(room, "_widen", lambda: None)
    elif room._widen() is None:
        pytest.skip("no compiler here")


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("num_rows", [1, 3, 24, 25, 48, 49, 130])
@pytest.mark.parametrize("part_bytes", [1, 1 << 22])
def test_it_is_the_product(weights, num_rows, part_bytes, widened_by, monkeypatch):
    monkeypatch.setattr(room, "PART_BYTES", part_bytes)
    rows, encoded = operands(num_rows, weights)
    expected = rows.float() @ FORMATS[weights].decode(encoded).T
    found = product(rows, encoded.codes, encoded.scales, weights)
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).norm() < 0.004 * expected.norm()
    meta = product(rows.to("meta"), encoded.codes.to("meta"), encoded.scales.to("meta"), weights)
    assert meta.shape == found.shape and meta.dtype is found.dtype


def test_no_rows():
    for weights in Weights:
        rows, encoded = operands(0, weights)
        assert product(rows, encoded.codes, encoded.scales, weights).shape == (0, 256)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_compiled_widening_is_that_of_torch(threads):
    widen = room._widen()
    if widen is None:
        pytest.skip("no compiler here")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, encoded = operands(1, Weights.INT4)
        packed = encoded.codes.view(torch.uint8).view(4, -1, LINE_ROWS // 2)
        for start, stop in ((0, 4), (1, 3)):
            part = torch.full((192, (stop - start) * LINE_ROWS), float("nan"), dtype=torch.bfloat16)
            widen(packed, encoded.scales, start, stop, part)
            expected = FORMATS[Weights.INT4].decode(encoded)[start * LINE_ROWS : stop * LINE_ROWS].T
            assert torch.allclose(part.float(), expected, rtol=2**-8, atol=1e-7)
            assert (part == expected.bfloat16()).float().mean() > 0.99
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weights", Weights)
def test_in_tiles_a_row_depends_on_nothing_else(weights):
    rows, encoded = operands(100, weights)
    with FixedTiles():
        whole = product(rows, encoded.codes, encoded.scales, weights)
        for start, stop in ((0, 1), (31, 90), (99, 100)):
            assert torch.equal(
                product(rows[start:stop], encoded.codes, encoded.scales, weights), whole[start:stop]
            )
