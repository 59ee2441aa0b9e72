"""A workload: what it finds out, and that it leaves nothing behind."""

import gc

import pytest
import torch
from torch import nn

import outsize
from outsize.engine.dry_runner import batch_shape
from outsize.plan import Direction
from outsize.plan.workload import Linear
from tests.running import opened, train
from tests.seams import (
    before_allocating,
    count_dry_passes,
    current_call,
    dry_run,
    dry_runs_alive,
    has_memory,
    is_in_dry_run,
    set_loss_tiles,
    source_of,
    watch_visits,
)
from tests.zoo import ZOO, plain_batch, plain_stack


def workload_of(model, batch):
    model(**batch)
    call = current_call(model)
    assert call is not None
    return call.workload


@pytest.mark.parametrize("name", ["llama_tied", "bloom", "t5", "vit", "albert"])
def test_the_visits_are_those_that_come(name, tmp_path, monkeypatch):
    model = opened(ZOO[name].build().train(), disk=tmp_path, home="disk")
    seen = []
    model(**ZOO[name].batch()).loss.backward()
    watch_visits(monkeypatch, model, seen.append)
    expected = workload_of(model, ZOO[name].batch()).visits
    seen.clear()
    model(**ZOO[name].batch(seed=1)).loss.backward()
    assert tuple(seen) == expected
    assert {visit.direction for visit in seen} == {Direction.FORWARD, Direction.BACKWARD}


def test_alibi_is_a_multiple_of_the_batch_and_mpt_has_none(tmp_path):
    bloom = opened(ZOO["bloom"].build())
    assert workload_of(bloom, ZOO["bloom"].batch(rows=4)).dims["transformer.h.0"].inputs[1] == 0
    mpt = opened(ZOO["mpt"].build())
    dims = workload_of(mpt, ZOO["mpt"].batch(rows=4)).dims["transformer.blocks.0"].inputs
    assert dims[0] == 0 and None in dims


def test_a_rehearsal_leaves_buffers_and_random_numbers_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, y):
            self.calls += 1
            for layer in self.layers:
                x = layer(x)
            return (x[:, :1] - y).square().mean()

    model = outsize.wrap(Counting().train())
    torch.manual_seed(5)
    model(**plain_batch())
    first = torch.rand(())
    assert float(model.calls) == 1
    torch.manual_seed(5)
    model(**plain_batch())  # the same call, this time without a workload
    assert torch.equal(first, torch.rand(()))


def test_a_call_is_rehearsed_once_and_again_when_rows_grow(monkeypatch):
    counts = count_dry_passes(monkeypatch)
    model = opened(ZOO["llama"].build().train())
    for length, expected in ((10, 2), (10, 2), (8, 2), (14, 4), (9, 4)):
        model(**ZOO["llama"].batch(rows=3, length=length))
        assert len(counts) == expected
    model(**ZOO["llama"].batch(rows=9, length=10))
    assert len(counts) == 4
    with torch.no_grad():
        model(**ZOO["llama"].batch(rows=3, length=10))
    assert len(counts) == 6


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_nothing_of_a_rehearsal_is_left_when_memory_is_planned(name, monkeypatch):
    """Its tensors, which are as large as those of a few rows of the call, would be missing in the plan."""
    left = []
    before_allocating(monkeypatch, lambda: left.append(dry_runs_alive()))
    model = opened(ZOO[name].build().train())
    gc.disable()
    try:
        model(**ZOO[name].batch()).loss.backward()
    finally:
        gc.enable()
    assert left == [[]]


def test_boundary_memory_grows_with_rows(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    workload = workload_of(model, ZOO["llama"].batch(rows=4, length=12))
    # inputs of three layers and of the final norm, and what enters the head: [12, 32] floats each, per row
    assert 4 * 12 * 32 * 4 <= workload.boundary_bytes.per_row <= 7 * 12 * 32 * 4
    assert workload.boundary_bytes.at(8) - workload.boundary_bytes.at(4) == int(
        4 * workload.boundary_bytes.per_row
    )


def test_memory_of_the_loss_does_not_grow_beyond_its_largest_tiles(monkeypatch):
    """Rows that are tried have smaller tiles: what they take is no measure of what many of them will."""
    set_loss_tiles(monkeypatch, 1 << 14)
    model = opened(ZOO["llama"].build().train())
    loss = workload_of(model, ZOO["llama"].batch(rows=4, length=12)).loss_memory
    assert loss.tiles.at(2) < loss.most_tile_bytes == 3 * 4 * (1 << 14)
    assert loss.most_tile_bytes < loss.at(1000) < loss.tiles.at(1000) / 2


def test_a_line_through_two_points():
    line = Linear.through({2: 10.0, 3: 14.0})
    assert (line.at(2), line.at(3), line.at(10)) == (10, 14, 42)
    assert Linear.through({4: 8.0}).at(2) == 4
    assert Linear.through({2: 10.0, 3: 4.0}).at(50) >= 10


@pytest.mark.parametrize(
    ("kwargs", "rows", "tokens"),
    [
        ({"input_ids": torch.zeros(4, 9, dtype=torch.long)}, 4, 9),
        ({"input_ids": torch.zeros(4, 9), "position_ids": torch.zeros(1, 9)}, 4, 9),
        ({"input_ids": torch.zeros(4, 9), "images": torch.zeros(5, 3)}, None, 9),
        ({"x": torch.zeros(4, 3, 8, 8)}, 4, 1),
        ({"scale": torch.tensor(2.0), "input_ids": torch.zeros(2, 3)}, 2, 3),
        ({}, None, 1),
    ],
)
def test_the_shape_of_a_batch(kwargs, rows, tokens):
    shape = batch_shape(plain_stack(), (), kwargs)
    assert (shape.rows, shape.row_tokens) == (rows, tokens)


def test_a_rehearsal_reads_no_weights(monkeypatch, tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    model = outsize.load(tmp_path / "model", dtype="float32").train()

    def refuse(*args):
        raise AssertionError("read")

    monkeypatch.setattr(source_of(model), "read", refuse)
    kwargs = ZOO["llama"].batch()
    workload = dry_run(model, kwargs)
    assert len(workload.visits) > 8 and not is_in_dry_run(model) and not has_memory(model)


def test_batch_statistics_are_of_the_whole_batch(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))

        def forward(self, x, y):
            for layer in self.layers:
                x = x + layer(x)
            return (x[:, :1] - y).square().mean()

    torch.manual_seed(0)
    plain = Normed().train()
    model = opened(plain, pins=outsize.Pins(tile_rows=1))
    data = [plain_batch(rows=6, seed=seed) for seed in range(2)]
    assert train(model, data) == pytest.approx(train(plain, data), rel=1e-5)
