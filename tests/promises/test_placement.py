"""Placement invariance: where planes live, and how many slots they pass through, never changes a bit.

The reference keeps everything in memory, undisturbed. Against it stand placements drawn at random, on a disk whose
transfers are begun late: a missing wait reads old bytes, and shows.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import outsize
from outsize import Pins
from tests.doubles import SlowTier
from tests.pairs import pairwise
from tests.running import opened, values_of
from tests.seams import close, set_chunk, store_of, wrapped_disk
from tests.zoo import ZOO

STEPS = 5
CHUNK = 2048
"""Elements; small, so that every block here has several chunks."""


@dataclass(frozen=True)
class Run:
    """What decides the numbers; a placement does not belong to it."""

    name: str
    dtype: str
    accumulation: int = 1
    max_grad_norm: float | None = None
    tile_rows: int | None = None
    keeps_gradients: bool = False


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_chunk(monkeypatch, CHUNK)


def trained(run, **options):
    """Losses and weights after five steps with an evaluation among them, and the report."""
    model = opened(ZOO[run.name].build().train(), dtype=run.dtype, **options)
    optimizer = outsize.AdamW(model, lr=3e-3, max_grad_norm=run.max_grad_norm)
    losses = []
    for step in range(STEPS):
        for part in range(run.accumulation):
            loss = model(**ZOO[run.name].batch(rows=4, length=10, seed=10 * step + part)).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if not run.keeps_gradients:
            optimizer.zero_grad()
        if step == 2:
            with torch.no_grad():
                losses.append(model(**ZOO[run.name].batch(seed=99)).loss)
    values = values_of(model)
    report = outsize.report(model)
    close(model)
    return losses, values, report


_references = {}


def reference(run):
    if run not in _references:
        _references[run] = trained(run, home="host", pins=Pins(tile_rows=run.tile_rows))[:2]
    return _references[run]


def assert_same_bits(run, losses, values):
    expected_losses, expected = reference(run)
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected_losses]
    different = [name for name in expected if not torch.equal(values[name], expected[name])]
    assert not different, different


RUNS = st.builds(
    Run,
    name=st.sampled_from(["llama_tied", "mixtral"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    accumulation=st.sampled_from([1, 2]),
    max_grad_norm=st.sampled_from([None, 0.1]),
    tile_rows=st.sampled_from([None, 1]),
    keeps_gradients=st.booleans(),
)
PLACEMENTS = st.fixed_dictionaries(
    {
        "home": st.sampled_from(["disk", None]),
        "weight_slots": st.integers(1, 3),
        "gradient_slots": st.integers(1, 2),
        "resident_bytes": st.sampled_from([0, 50_000, 150_000, 300_000]),
    }
)


@given(RUNS, PLACEMENTS, st.integers(0, 9))
@example(Run("llama_tied", "float32"), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 0)
@example(
    Run("llama_tied", "bfloat16", 2, 0.1, 1), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 1
)
@example(Run("mixtral", "bfloat16"), {"weight_slots": 3, "gradient_slots": 2, "home": "disk"}, 2)
@example(Run("t5", "float32", 2, None, 1, True), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 3)
@example(Run("t5", "bfloat16", 1, 0.1), {"weight_slots": 2, "gradient_slots": 1, "resident_bytes": 90_000}, 4)
@example(Run("albert", "bfloat16"), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 5)
@settings(
    max_examples=100 if os.environ.get("OUTSIZE_SOAK") else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_placement_gives_the_same_bits(monkeypatch, run, placement, seed):
    choices = {**placement}
    home = choices.pop("home", None)
    generator = random.Random(seed)

    def delay(verb, label):
        return generator.choice([0.0, 0.0, 0.001, 0.004])

    with (
        TemporaryDirectory(dir=Path(__file__).parent) as folder,
        wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)) as tiers,
    ):
        pins = Pins(tile_rows=run.tile_rows, **choices)
        losses, values, report = trained(run, disk=folder, home=home, pins=pins)
    assert_same_bits(run, losses, values)
    assert len(tiers) == 1 and report.bytes_written > 0 and report.off_plan == ()


@pairwise(slow=["weight", "state", "gradient"], verb=["read", "write"], dtype=["float32", "bfloat16"])
def test_one_slow_plane_is_waited_for(dtype, slow, verb, tmp_path, monkeypatch):
    """Each kind of transfer alone is late: the others' waits cannot hide that its own is missing."""

    def delay(kind, label):
        return 0.01 if kind == verb and f".{slow}[" in label else 0.0

    run = Run("llama", dtype, accumulation=2)
    pins = Pins(weight_slots=2, gradient_slots=1)
    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)):
        losses, values, _ = trained(run, disk=tmp_path, home="disk", pins=pins)
    assert_same_bits(run, losses, values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_one_block_follow_each_other(dtype, tmp_path, monkeypatch):
    """Several steps on the same gradient: each reads the state that the one before is still writing.

    One block of one chunk trains, so that no other update keeps the lane's buffers busy in between.
    """
    set_chunk(monkeypatch, 1 << 20)

    def delay(verb, label):
        return 0.05 if verb == "write" and ".state" in label else 0.0

    results = []
    for options in ({"home": "host"}, {"home": "disk", "disk": tmp_path, "pins": Pins(weight_slots=3)}):
        plain = ZOO["llama"].build().train()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("layers.1" in name)
        with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)):
            model = opened(plain, dtype=dtype, **options)
            optimizer = outsize.AdamW(model, lr=3e-3)
            model(**ZOO["llama"].batch()).loss.backward()
            for _ in range(4):
                optimizer.step()
            results.append(values_of(model))
            close(model)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_chunks_changes_nothing(dtype, tmp_path, monkeypatch):
    run = Run("qwen3", dtype, max_grad_norm=0.1)
    expected = reference(run)
    set_chunk(monkeypatch, 1 << 20)
    losses, values, _ = trained(run, disk=tmp_path, home="disk")
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected[0]]
    assert all(torch.equal(values[name], expected[1][name]) for name in values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_source_that_is_read_late_gives_the_same_bits(dtype, tmp_path):
    """Weights that stay in their safetensors until their first update, against weights that were taken over."""
    run = Run("llama_tied", dtype)
    ZOO[run.name].build().save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    model = outsize.load(
        tmp_path / "model", disk=tmp_path / "disk", home="disk", dtype=dtype, pins=Pins(weight_slots=1)
    )
    model.train()
    optimizer = outsize.AdamW(model, lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**ZOO[run.name].batch(rows=4, length=10, seed=10 * step)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            with torch.no_grad():
                losses.append(model(**ZOO[run.name].batch(seed=99)).loss)
    assert_same_bits(run, losses, values_of(model))


def test_freezing_part_of_a_block_gives_the_same_bits_everywhere(tmp_path):
    results = []
    for options in ({"home": "host"}, {"home": "disk", "disk": tmp_path, "pins": Pins(weight_slots=1)}):
        plain = ZOO["llama"].build().train()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("down" in name or "norm" in name)
        model = opened(plain, dtype="bfloat16", **options)
        optimizer = outsize.AdamW(model, lr=3e-3)
        for seed in range(STEPS):
            model(**ZOO["llama"].batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(values_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_small_chunks_are_in_force(tmp_path):
    model = opened(ZOO["llama"].build(), disk=tmp_path, home="disk")
    outsize.AdamW(model)
    model(**ZOO["llama"].batch()).loss.backward()
    record = store_of(model)["L00"].record
    assert len(list(record.chunks())) >= 3
