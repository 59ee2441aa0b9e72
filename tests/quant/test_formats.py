"""Matrices in few bits: how far codes are from what they stand for, and where they lie."""

import pytest
import torch

from outsize.config import Weights
from outsize.quant import FORMATS
from outsize.quant.formats import GROUP, LINE_ROWS
from outsize.quant.packing import packer
from outsize.quant.product import _torch_lays_out_alike

both = pytest.mark.parametrize("weights", Weights)


def matrix(rows=192, columns=320, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) + 0.01
    return torch.randn(rows, columns, generator=generator) * 0.02 * spread + 0.003


@both
def test_a_weight_is_half_a_step_away_at_most(weights):
    weight, form = matrix(), FORMATS[weights]
    encoded = form.encode(weight)
    assert (tuple(encoded.codes.shape), tuple(encoded.scales.shape)) == form.shapes(*weight.shape)
    error = (form.decode(encoded) - weight).abs()
    if weights is Weights.INT8:
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        groups = weight.view(192, -1, GROUP)
        step = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(GROUP, 1)
        assert error.max() > 0.4 * step.min(), "of four bits something is lost"
    assert (error <= 0.52 * step + 0.01 * weight.abs()).all()


@both
def test_bytes_are_as_few_as_promised(weights):
    encoded = FORMATS[weights].encode(matrix(256, 2048))
    bits = 8 * (encoded.codes.nbytes + encoded.scales.nbytes) / (256 * 2048)
    assert bits == (8 + 16 / 2048 if weights is Weights.INT8 else 4.5)


@both
@pytest.mark.parametrize("value", [0.0, 0.25, -1e-30])
def test_rows_of_one_value_are_kept(weights, value):
    form = FORMATS[weights]
    assert torch.allclose(
        form.decode(form.encode(torch.full((64, 64), value))), torch.tensor(value), rtol=0.004, atol=1e-18
    )


@both
def test_whole_lines_are_encoded_by_themselves(weights):
    weight, form = matrix(), FORMATS[weights]
    whole = form.encode(weight)
    for start, stop in ((0, LINE_ROWS), (LINE_ROWS, 192)):
        part = form.encode(weight[start:stop])
        assert torch.equal(
            part.codes.view(torch.uint8),
            whole.codes[start // form.line_rows : stop // form.line_rows].view(torch.uint8),
        )
        own = slice(form.scales_per_row * start, form.scales_per_row * stop)
        assert torch.equal(part.scales, whole.scales[..., own])


HARD = {
    "ordinary": lambda x: x,
    "around steps": lambda x: (x * 200).round() / 200,
    "subnormal": lambda x: x * 1e-37,
    "huge": lambda x: x.clamp(-1, 1) * 3e38,
    "one sign": lambda x: x.abs() * -1,
    "constant": lambda x: torch.full_like(x, 0.0217),
    "signed zeros": lambda x: x.sign() * 0,
}


@both
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_encoding_has_the_bits_of_torch(weights, kind, dtype):
    if packer() is None:
        pytest.skip("no compiler")
    weight = HARD[kind](matrix(rows=192, columns=640)).to(dtype)
    form = FORMATS[weights]
    for given in (weight, weight[:, :128]):
        compiled, plain = form.encode(given), form.encode_in_torch(given)
        if not given.isfinite().all():  # in fp16
            assert not compiled.scales.isfinite().all() and not plain.scales.isfinite().all()
            continue
        assert torch.equal(compiled.scales.view(torch.int16), plain.scales.view(torch.int16))
        assert torch.equal(compiled.codes.view(torch.int16), plain.codes.view(torch.int16))


@both
def test_a_weight_that_is_not_finite_shows_in_a_scale(weights):
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = matrix()
        weight[70, 3] = value
        assert not FORMATS[weights].encode(weight).scales.isfinite().all()
        assert not FORMATS[weights].encode_in_torch(weight).scales.isfinite().all()


def test_four_bits_lie_as_torch_has_them_on_this_kind_of_machine():
    """On a CPU with AVX-512, and there alone: elsewhere torch's product must not be given these codes."""
    codes = torch.arange(LINE_ROWS * GROUP, dtype=torch.int32).view(LINE_ROWS, GROUP) * 7 % 16
    ours = FORMATS[Weights.INT4].encode(codes.float())
    assert torch.equal(FORMATS[Weights.INT4].decode(ours), codes.float()), "every code is a weight of its own"
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError):
        is_alike = False
    else:
        is_alike = torch.equal(theirs.view(-1), ours.codes.view(torch.uint8).view(-1))
    assert _torch_lays_out_alike() is is_alike
    assert is_alike or torch.backends.cpu.get_cpu_capability() != "AVX512"
