"""What stands on the engine, on a CUDA device: commits, the machine's profile, predictions."""

import sys
from itertools import combinations

import pytest
import torch

import outsize
from outsize.config import ComputeType, Home
from outsize.hardware import device, host, measure
from outsize.plan.ledger import ACTIVATIONS
from outsize.plan.profile import Profile, Resource
from tests.checkpoint.runs import Run, batches
from tests.checkpoint.test_resume import assert_goes_on
from tests.engine.test_ledger import PLANES, assert_is_allocated
from tests.running import (
    adamw,
    settled,  # noqa: F401
    train,
    values_of,
)
from tests.seams import budget_of, flush, move_small_inputs
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
measure_module = sys.modules["outsize.hardware.measure"]  # the function hides it


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("home", ["device", "host", "disk", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(home, dtype, tmp_path):
    def uninterrupted(**options):
        """In the same place: bits depend on which blocks are updated on the device."""
        pins = outsize.Pins(resident_bytes=300_000) if home is None else outsize.Pins()
        run = Run(tmp_path, "reference", home=home, pins=pins, **options)
        found = run.go(batches(6), every=0), values_of(run.model)
        run.end(finish=False)
        return found

    assert_goes_on(tmp_path, home, dtype, uninterrupted)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_a_run_takes_what_its_ledger_says(home, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    pins = outsize.Pins(inputs="host")
    model = outsize.wrap(ZOO["llama"].build().train(), home=home, disk=tmp_path, dtype="bfloat16", pins=pins)
    train(model, [ZOO["llama"].batch()], adamw(model))
    moved = {"slots", "buffers"} if home == "disk" else {"slots"}
    assert_is_allocated(model, purposes={*PLANES, *moved, "inputs of blocks"})
    ledger, taken = budget_of(model).ledger, torch.cuda.max_memory_allocated()
    assert ledger.total(Home.DEVICE) - ledger.total(Home.DEVICE, *ACTIVATIONS) <= taken


def test_numbers_that_the_device_draws_go_on_where_they_were(tmp_path):
    """Dropout draws on the device; a commit holds its generator's state beside the host's."""

    def losses(folder, cuts):
        torch.manual_seed(1)
        found = []
        for start, stop in cuts:
            model = outsize.wrap(ZOO["gpt2"].build(resid_pdrop=0.3).train(), home="disk", disk=tmp_path)
            optimizer = outsize.AdamW(model, lr=1e-3)
            outsize.checkpoint.resume(model, optimizer, folder)
            for batch in batches(stop - start, "gpt2", first=start):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
                outsize.checkpoint.commit(model, optimizer, folder)
            outsize.checkpoint.finish(model)
            outsize.checkpoint.close(model)
            torch.rand(3, device="cuda")  # what another program draws in between
        return found

    whole = losses(tmp_path / "whole", [(0, 6)])
    assert losses(tmp_path / "parts", [(0, 2), (2, 6)]) == whole
    assert len(set(whole)) == 6


@pytest.fixture
def in_small(monkeypatch):
    """One round of small work."""
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    monkeypatch.setattr(measure_module, "ROUNDS", 1)
    monkeypatch.setattr(measure_module, "_MOST_CHUNKS", 4)
    monkeypatch.setattr(host, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(device, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(device, "ROWS", 64)
    monkeypatch.setattr(device, "WIDTHS", ((64, 128), (128, 64)))


@pytest.fixture
def profile(tmp_path, in_small):
    return measure(tmp_path, seconds=0.01, say=lambda line: None)


def test_a_profile_knows_the_device_and_its_link(profile):
    assert Profile.from_json(profile.to_json(), "again") == profile
    assert profile.has_device and set(profile.matmul) == set(ComputeType)
    assert min(profile.up, profile.down, profile.device_update, profile.device_memory) > 0
    busy = [each for each in Resource if each in profile.contention]
    assert {Resource.UP, Resource.DOWN, Resource.COMPUTE, Resource.UPDATE} <= set(busy)
    for one, other in combinations(busy, 2):
        assert 0 < profile.contention[one][other] <= 1 and 0 < profile.contention[other][one] <= 1


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_what_is_predicted_to_move_is_what_moves(home, profile, tmp_path):
    """Over the link, to the byte; times are another matter."""
    ZOO["llama"].build().config.save_pretrained(tmp_path / "model")
    options = {"device": 1 << 30, "disk": tmp_path, "home": home, "dtype": "bfloat16"}
    model = outsize.load(tmp_path / "model", from_scratch=True, **options).train()
    optimizer = outsize.AdamW(model)
    ids = torch.randint(4, 190, (4, 16), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        if step == 3:
            flush(model)  # what the step before moves still
            before = outsize.report(model)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    flush(model)
    after, moved = outsize.report(model), outsize.predict(model, profile).simulation.bytes_moved
    for resource, count in (
        (Resource.UP, after.bytes_up - before.bytes_up),
        (Resource.DOWN, after.bytes_down - before.bytes_down),
    ):
        assert moved.get(resource, 0) == count, resource
