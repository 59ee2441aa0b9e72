"""The division of memory: room for freed activations, smaller tiles, and memory that is given back in need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import outsize
from outsize import Pins
from outsize.engine.budget import SLACK_BYTES, Budget
from outsize.engine.session import session_of
from outsize.errors import BudgetError
from outsize.plan import Backward, Forward
from tests.running import assert_same_losses, assert_same_weights, executor_of, opened, train
from tests.zoo import ZOO, seeded


def llama(tmp_path, **options):
    with seeded(0):
        plain = ZOO["llama"].build().train()
    return plain, opened(plain, disk=tmp_path, home="disk", **options)


def batches(count, rows=4):
    return [ZOO["llama"].batch(rows=rows, length=12, seed=seed) for seed in range(count)]


def test_under_pressure_every_visit_gives_freed_memory_back_first_and_nothing_changes(tmp_path):
    plain, model = llama(tmp_path)
    losses = train(model, batches(1))
    budget = session_of(model).budget
    assert budget.num_times_given_back == 0
    budget._ceiling.limit_bytes = 0
    losses += train_more(model, batches(3)[1:])
    visits = sum(isinstance(op, Forward | Backward) for op in executor_of(model).executed)
    assert budget.num_times_given_back >= 2 * visits - 2 > 0
    assert_same_losses(losses, train(plain, batches(1)) + train_more(plain, batches(3)[1:]))
    assert_same_weights(model, plain)


def test_a_call_without_a_graph_makes_no_less_room_for_the_backward_of_an_earlier_one(tmp_path, monkeypatch):
    _, model = llama(tmp_path)
    asked = []
    make_room = Budget.make_room

    def note(budget, visit_bytes):
        asked.append(visit_bytes)
        make_room(budget, visit_bytes)

    monkeypatch.setattr(Budget, "make_room", note)
    loss = model(**batches(1, rows=8)[0]).loss
    forward = set(asked)
    with torch.no_grad():
        model(**batches(1, rows=1)[0])
    asked.clear()
    loss.backward()
    assert set(asked) == forward and len(forward) == 1
    if session_of(model).device.is_host:
        assert asked[0] > session_of(model).budget.visit_bytes > 0


def train_more(model, more):
    """Losses without updates: the optimizer of the first steps is gone."""
    losses = []
    for batch in more:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        model.zero_grad()
    return losses


def test_tiles_become_smaller_before_a_batch_is_refused(tmp_path):
    _, model = llama(tmp_path)
    train(model, batches(1, rows=8))
    session = session_of(model)
    budget, call = session.budget, session._call
    sizes = []
    room = budget.room_bytes
    for left in (1 << 40, *range(1 << 20, 0, -(1 << 12))):
        budget.room_bytes = budget.placement.arena_bytes + left
        try:
            sizes.append(budget.begin_call(call.rehearsal, call.shape))
        except BudgetError as error:
            assert "fewer rows" in error.hint
            break
    budget.room_bytes = room
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True)


def test_a_pinned_tile_is_never_made_smaller(tmp_path):
    _, model = llama(tmp_path, pins=Pins(tile_rows=2))
    train(model, batches(1, rows=8))
    session = session_of(model)
    assert session.budget.begin_call(session._call.rehearsal, session._call.shape) == 2
    session.budget.room_bytes = session.budget.placement.arena_bytes + 1
    with pytest.raises(BudgetError, match="of activations"):
        session.budget.begin_call(session._call.rehearsal, session._call.shape)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="oneDNN computes bf16 only where it is native"
)
def test_products_of_many_shapes_do_not_fill_memory():
    code = """
import torch
import outsize
from outsize.engine import memory
from tests.zoo import ZOO

torch.set_num_threads(1)
outsize.wrap(ZOO["llama"].build())
weights = [torch.randn(rows, 256, dtype=torch.bfloat16) for rows in (256, 320, 384, 448)]
torch.nn.functional.linear(torch.randn(3, 256, dtype=torch.bfloat16), weights[0])
before = memory.resident_bytes()
for rows in range(10, 410):
    for weight in weights:
        torch.nn.functional.linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
memory.give_back()
print(memory.resident_bytes() - before)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, check=True
    )
    assert int(done.stdout) < SLACK_BYTES // 2


def test_a_preview_compares_with_the_size_of_the_disk(tmp_path):
    with seeded(0):
        ZOO["llama"].build().save_pretrained(tmp_path / "model")
    for size, fits in (("1GiB", True), ("8KiB", False)):
        summary = outsize.preview(tmp_path / "model", disk=f"{tmp_path}:{size}", home="disk", seq_len=64)
        assert summary.fits is fits, summary
    assert "on disk" in summary.reason and "may hold 8.00 KiB" in summary.reason


@pytest.mark.parametrize(
    ("pins", "named"),
    [
        (Pins(weight_slots=40), "weight_slots=40"),
        (Pins(resident=(40, 40, 40)), "resident=(40, 40, 40)"),
    ],
)
def test_a_pin_that_cannot_be_met_is_named(pins, named, tmp_path):
    config = ZOO["llama"].build().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 4096, 40
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 64
    config.save_pretrained(tmp_path / "wide")
    options = {"disk": tmp_path, "dtype": "float32", "seq_len": 16}
    least = outsize.preview(tmp_path / "wide", home="disk", **options)
    host = f"{(least.host_bytes >> 20) + 200}MiB"
    refused = outsize.preview(tmp_path / "wide", host=host, pins=pins, **options)
    assert not refused.fits and named in refused.reason
    assert outsize.preview(tmp_path / "wide", host=host, **options).fits
