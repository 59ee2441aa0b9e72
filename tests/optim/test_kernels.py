from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outsize.config import ComputeType
from outsize.optim import ADAMW, Backend, Kernel, deinterleave, interleave, join, split
from tests.hypers import hyper

HYPER = hyper(lr=1e-2, weight_decay=0.1, step=3, gradient_scale=0.3)


def make_planes(compute_type, num_elements, seed=0, offset=0):
    """Weight, state and gradient with a past, each starting `offset` elements into its storage."""
    generator = torch.Generator().manual_seed(seed)
    master, moment1, gradient = (torch.randn(num_elements, generator=generator) for _ in range(3))
    moment2 = torch.rand(num_elements, generator=generator)
    gradient = gradient.bfloat16().to(torch.float32)
    if compute_type is ComputeType.FLOAT32:
        planes = [master, moment1, moment2, gradient]
    else:
        weight, remainder = split(master)
        planes = [weight, deinterleave(moment1), deinterleave(moment2), remainder, gradient.bfloat16()]
    return [torch.cat([plane.new_zeros(offset), plane])[offset:] for plane in planes]


def run(kernel, planes, numbers=HYPER, start=0, stop=None):
    weight, *state, gradient = (plane[start:stop] for plane in planes)
    kernel(weight, state, gradient, numbers)


def assert_same_bits(planes, others):
    for plane, other in zip(planes, others, strict=True):
        assert torch.equal(plane, other)


def natural(compute_type, planes):
    """Master, first and second moment in natural order."""
    if compute_type is ComputeType.FLOAT32:
        return planes[:3]
    return [join(planes[0], planes[3]), interleave(planes[1]), interleave(planes[2])]


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (1.0, {"lr": 1e-3, "weight_decay": 0.0}),
        (0.37, {"lr": 1e-2, "weight_decay": 0.1}),
        (1.0, {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4}),
    ],
    ids=["plain", "decay and scale", "betas"],
)
def test_adamw_is_torch_adamw(kernel, scale, options):
    num_elements, compute_type = 1003, kernel.compute_type
    planes = make_planes(compute_type, num_elements)
    for plane in planes[1:3]:
        plane.zero_()
    parameter = torch.nn.Parameter(natural(compute_type, planes)[0].clone())
    theirs = torch.optim.AdamW([parameter], **options, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 9):
        gradient = torch.randn(num_elements, generator=generator).bfloat16()
        planes[-1].copy_(gradient)
        parameter.grad = gradient.to(torch.float32) * scale
        theirs.step()
        run(kernel, planes, hyper(step=step, gradient_scale=scale, **options))
        assert_same_bits(planes[-1:], [gradient.to(planes[-1].dtype)])
    expected = [parameter.data, theirs.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg_sq"]]
    for ours, value in zip(natural(compute_type, planes), expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("num_elements", [*range(1, 18), 63, 64, 65, 127, 4096, 70_001])
def test_split_rule_has_the_bits_of_the_fp32_rule(kernels, backend, num_elements):
    if (ComputeType.BFLOAT16, backend) not in kernels:
        pytest.skip("no C++ compiler here")
    results = []
    for compute_type in ComputeType:
        planes = make_planes(compute_type, num_elements)
        for step in range(1, 4):
            run(kernels[compute_type, backend], planes, hyper(lr=1e-2, step=step, gradient_scale=0.7))
        results.append(natural(compute_type, planes))
    assert_same_bits(*results)


def test_split_rule_keeps_every_master(kernel):
    """With a learning rate of zero nothing changes, whatever the lower half: carries, signs, denormals."""
    if kernel.compute_type is ComputeType.FLOAT32:
        pytest.skip("no remainder")
    for upper in (0x0000, 0x007F, 0x3F7F, 0x3FFF, 0x7F7E, 0x8000, 0x807F, 0xBF7F, 0xFF7E):
        bits = torch.arange(1 << 16, dtype=torch.int64) + (upper << 16)
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
        planes = make_planes(kernel.compute_type, 1 << 16)
        planes[0], planes[3] = split(bits.view(torch.float32))
        run(kernel, planes, hyper(lr=0.0))
        # As numbers: a master of -0.0 may become 0.0.
        assert torch.equal(join(planes[0], planes[3]), bits.view(torch.float32))


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_do_not_change_the_bits(kernel, data):
    unit = 1 if kernel.compute_type is ComputeType.FLOAT32 else 64
    num_elements = data.draw(st.integers(1, 3000))
    cuts = data.draw(st.sets(st.integers(0, num_elements // unit), max_size=6))
    bounds = sorted({0, num_elements, *(cut * unit for cut in cuts)})
    offset = data.draw(st.integers(0, 9)) * (1 if unit == 1 else 2)
    whole = make_planes(kernel.compute_type, num_elements)
    pieces = make_planes(kernel.compute_type, num_elements, offset=offset)
    run(kernel, whole)
    for start, stop in pairwise(bounds):
        run(kernel, pieces, start=start, stop=stop)
    assert_same_bits(whole, pieces)


@pytest.mark.parametrize("length", range(1, 18))
def test_short_calls_have_the_bits_of_a_long_one(kernel, length):
    unit = 1 if kernel.compute_type is ComputeType.FLOAT32 else 64
    whole, pieces = (make_planes(kernel.compute_type, 20 * unit + length) for _ in range(2))
    run(kernel, whole)
    for start in range(0, 20 * unit, unit):
        run(kernel, pieces, start=start, stop=start + unit)
    run(kernel, pieces, start=20 * unit)
    assert_same_bits(whole, pieces)


def test_the_number_of_threads_does_not_change_the_bits(kernel):
    one, many = (make_planes(kernel.compute_type, 300_000) for _ in range(2))
    num_threads = torch.get_num_threads()
    run(kernel, many)
    torch.set_num_threads(1)
    try:
        run(kernel, one)
    finally:
        torch.set_num_threads(num_threads)
    assert_same_bits(one, many)


def test_threads_may_share_a_kernel(kernel):
    num_jobs = 16
    expected = [make_planes(kernel.compute_type, 1 << 16, seed) for seed in range(num_jobs)]
    planes = [make_planes(kernel.compute_type, 1 << 16, seed) for seed in range(num_jobs)]
    hypers = [hyper(lr=1e-3 * (job + 1), step=job + 1) for job in range(num_jobs)]
    for job in range(num_jobs):
        run(kernel, expected[job], hypers[job])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(kernel, planes[job], hypers[job]), range(num_jobs)))
    for job in range(num_jobs):
        assert_same_bits(expected[job], planes[job])


def test_padding_stays_zero(kernel):
    planes = [plane.zero_() for plane in make_planes(kernel.compute_type, 128)]
    run(kernel, planes)
    assert not any(plane.count_nonzero() for plane in planes)


def test_wrong_planes_are_refused(kernel):
    weight, *state, gradient = make_planes(kernel.compute_type, 128)
    for wrong in (gradient.double(), gradient[:64], gradient.view(2, 64)):
        with pytest.raises(AssertionError):
            kernel(weight, state, wrong, HYPER)


@pytest.mark.parametrize(
    ("backend", "sizes"), [(Backend.EAGER, [1 << 16, 1 << 16, 64]), (Backend.COMPILED, None)]
)
def test_only_an_eager_kernel_takes_a_slice_in_pieces(backend, sizes):
    """An eager one makes temporaries, which stay in the cache; a compiled one makes none, and calls cost time."""
    num_elements, found = (2 << 16) + 64, []
    weight, *state, gradient = make_planes(ComputeType.BFLOAT16, num_elements)
    kernel = Kernel(ADAMW, ComputeType.BFLOAT16, backend, lambda planes, _: found.append(planes[0].numel()))
    kernel(weight, state, gradient, HYPER)
    assert found == (sizes or [num_elements])
