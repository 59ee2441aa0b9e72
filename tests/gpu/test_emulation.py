"""The emulated device: what is wrong on a real one is wrong on it too."""

import sys

import pytest
import torch

emulation = sys.modules.get("tests.emulation")
pytestmark = pytest.mark.skipif(
    emulation is None or emulation.functions is None, reason="the device is not emulated"
)
SIZE = 1 << 16


@pytest.fixture
def late():
    """Zeros on the device, and a late copy of ones into them, on another stream, with the event behind it."""
    stream, target = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    source = torch.ones(SIZE).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    yield target, event
    torch.cuda.synchronize()


def test_a_copy_is_late_until_it_is_followed(late):
    target, event = late
    assert not event.query()
    torch.cuda.current_stream().wait_event(event)
    assert target.sum().item() == SIZE and not emulation.race()


@pytest.mark.parametrize("wait", ["nothing", "event", "device"])
def test_what_nothing_orders_is_an_error(wait, late):
    target, event = late
    if wait == "event":
        event.synchronize()
    elif wait == "device":
        torch.cuda.synchronize()
    if wait == "nothing":
        with pytest.raises(RuntimeError, match="race"):
            target.add_(1)
        assert "a copy" in emulation.race()
    else:
        assert target.sum().item() == SIZE


def test_a_copy_that_does_not_wait_for_computing_is_an_error():
    target, source = torch.zeros(SIZE, device="cuda"), torch.ones(SIZE).pin_memory()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(RuntimeError, match="race"):
        target.copy_(source, non_blocking=True)
    assert emulation.race()


def test_memory_that_a_copy_uses_is_not_given_back():
    target, source = torch.zeros(SIZE, device="cuda"), torch.ones(SIZE).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(source, non_blocking=True)
    del target
    assert "given back" in emulation.race()
    torch.cuda.synchronize()


def test_memory_that_was_computed_with_is_not_filled_before_that_is_over():
    stream, source = torch.cuda.Stream(), torch.ones(SIZE).pin_memory()
    torch.cuda.synchronize()
    freed = torch.zeros(SIZE, device="cuda").add_(1).data_ptr()
    target = torch.empty(SIZE, device="cuda")
    assert target.data_ptr() == freed
    with torch.cuda.stream(stream), pytest.raises(RuntimeError, match="race"):
        target.copy_(source, non_blocking=True)
    assert emulation.race()


def test_a_copy_down_arrives_late():
    target = torch.zeros(1 << 20).pin_memory()
    source = torch.ones(1 << 20, device="cuda")
    emulation.functions.emulated_latest(200_000)
    try:
        seen = []
        for _ in range(5):
            target.zero_()
            target.copy_(source, non_blocking=True)
            seen.append(float(target[0]))
            torch.cuda.synchronize()
            assert target[0] == 1
    finally:
        emulation.functions.emulated_latest(200)
    assert 0 in seen


def test_freed_memory_is_overwritten():
    one = torch.ones(SIZE, device="cuda")
    address = one.data_ptr()
    del one
    other = torch.empty(SIZE, device="cuda")
    assert other.data_ptr() == address and not (other.cpu() == 1).any()


def test_tensors_of_the_host_and_of_the_device_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_limits_and_peaks():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() == before + (1 << 20)
    del held
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + (1 << 20)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 44, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    "wait", [lambda x: x.item(), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: torch.cuda.synchronize()]
)
def test_waits_are_told(wait):
    x = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_device_draws_numbers_of_its_own():
    torch.manual_seed(3)
    first = torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    host = torch.get_rng_state()
    drawn = torch.rand(4, device="cuda")
    assert torch.equal(host, torch.get_rng_state())
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), drawn) and not torch.equal(drawn, first)
