"""The division of memory: room for freed activations, smaller tiles, and memory that is given back in need."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import outsize
from outsize import Pins
from outsize.cli.options import pins_of
from outsize.config import Home, parse_bytes
from outsize.engine.budget import Budget
from outsize.engine.predict import pins_text
from outsize.errors import BudgetError
from outsize.hardware import machine
from outsize.plan import Backward, Forward
from outsize.plan.limits import SLACK_BYTES
from outsize.plan.planner import Planner
from outsize.plan.workload import Call
from outsize.store import memory
from tests.plan.test_simulate import HOST
from tests.running import assert_same_losses, assert_same_weights, opened, train
from tests.seams import (
    budget_of,
    computes_on_host,
    current_call,
    plan_executed,
    set_process_memory,
    set_room,
    settle_for,
)
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
    budget = budget_of(model)
    assert budget._ceiling.num_times == 0
    budget._ceiling.limit_bytes = 0
    losses += train_more(model, batches(3)[1:])
    visits = sum(isinstance(op, Forward | Backward) for op in plan_executed(model))
    assert budget._ceiling.num_times >= 2 * visits - 2 > 0
    assert_same_losses(losses, train(plain, batches(1)) + train_more(plain, batches(3)[1:]))
    assert_same_weights(model, plain)


def test_a_call_that_is_refused_keeps_nothing_of_its_arguments(tmp_path):
    """They may be what took the memory, and the next attempt is made at once: not when the collector has come by."""

    class Pages:
        """Stands for what a call hands down to attention."""

    _, model = llama(tmp_path, host=memory.resident_bytes() + (1 << 20))
    arguments = {"input_ids": torch.ones(2, 9, dtype=torch.long), "pages": Pages()}
    kept, is_refused = weakref.ref(arguments["pages"]), False
    gc.disable()
    try:
        try:
            settle_for(model, arguments)
        except BudgetError:
            is_refused = True
        arguments.clear()
        assert is_refused and kept() is None
    finally:
        gc.enable()


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
    if computes_on_host(model):
        assert asked[0] > budget_of(model).visit_bytes > 0


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
    budget, call = budget_of(model), current_call(model)
    sizes = []
    room = budget.limits.room_bytes(Home.HOST)
    for left in (1 << 40, *range(1 << 20, 0, -(1 << 12))):
        set_room(model, budget.placement.bytes_in(Home.DEVICE) + left)
        try:
            sizes.append(budget.begin_call(Call(call.workload, call.shape)))
        except BudgetError as error:
            assert "fewer rows" in error.hint
            break
    set_room(model, room)
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True)


def test_a_pinned_tile_is_never_made_smaller(tmp_path):
    _, model = llama(tmp_path, pins=Pins(tile_rows=2))
    train(model, batches(1, rows=8))
    budget, call = budget_of(model), current_call(model)
    assert budget.begin_call(Call(call.workload, call.shape)) == 2
    set_room(model, budget.placement.bytes_in(Home.DEVICE) + 1)
    with pytest.raises(BudgetError, match="of activations"):
        budget.begin_call(Call(call.workload, call.shape))


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="oneDNN computes bf16 only where it is native"
)
def test_products_of_many_shapes_do_not_fill_memory():
    code = """
import torch
import outsize
from outsize.store import memory
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
    host = f"{(least.host_bytes >> 20) + 80}MiB"
    refused = outsize.preview(tmp_path / "wide", host=host, pins=pins, **options)
    assert not refused.fits and named in refused.reason
    larger = re.search(r'host="(\d+MiB)" works', refused.reason)[1]
    assert outsize.preview(tmp_path / "wide", host=larger, pins=pins, **options).fits
    assert outsize.preview(tmp_path / "wide", host=host, **options).fits


def wide(tmp_path, layers=12):
    config = ZOO["llama"].build().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 4096, layers
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 64
    config.max_position_embeddings = 4096
    config.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


ELSEWHERE = dataclasses.replace(HOST, host_bytes=8 << 30)
DEVICE = dataclasses.replace(ELSEWHERE, up=20e9, down=20e9, device_bytes=1 << 30, device_memory=1e12)


def test_a_host_smaller_than_the_process_is_refused_where_all_is_on_the_device(tmp_path):
    options = {"hardware": machine("h200"), "seq_len": 16}
    refused = outsize.preview(wide(tmp_path), host="100MiB", **options)
    assert not refused.fits and "100.0 MiB of the host" in refused.reason
    host = re.search(r'host="(\d+MiB)" works', refused.reason)[1]
    least = outsize.preview(tmp_path / "wide", host=host, **options)
    assert least.fits and least.host_bytes <= least.host_budget_bytes


@pytest.mark.parametrize("profile", [ELSEWHERE, DEVICE], ids=["host", "device"])
def test_what_a_hint_names_fits_the_disk_too(profile, tmp_path):
    options = {"hardware": profile, "seq_len": 64, "batch_size": 4, "dtype": "float32"}
    device = {"device": "100MiB"} if profile.has_device else {}
    refused = outsize.preview(wide(tmp_path), host="450MiB", disk=f"{tmp_path}:20MiB", **device, **options)
    assert not refused.fits
    named = dict(re.findall(r'(device|host|disk)="([^"]+)"', refused.reason))
    assert named["disk"] != f"{tmp_path}:20MiB"
    assert outsize.preview(tmp_path / "wide", **named, **options).fits


def test_a_plan_that_takes_too_much_of_the_disk_gives_way_to_one_that_does_not(tmp_path):
    """A record lies whole on the disk as soon as a part of it does: with little disk, whole blocks stay in memory."""
    folder = wide(tmp_path)
    options = {"seq_len": 16, "dtype": "float32", "hardware": ELSEWHERE}
    whole = outsize.preview(folder, home="host", **options)
    least = outsize.preview(folder, home="disk", disk=tmp_path, **options)
    host = f"{(whole.host_bytes + least.host_bytes >> 21) + 160}MiB"
    free = outsize.preview(folder, host=host, disk=tmp_path, **options)
    limit = f"{(free.disk_bytes >> 20) * 3 // 4}MiB"
    tight = outsize.preview(folder, host=host, disk=f"{tmp_path}:{limit}", **options)
    assert tight.fits and 0 < tight.disk_bytes <= parse_bytes(limit) < free.disk_bytes
    assert tight.prediction.step_s >= free.prediction.step_s
    refused = outsize.preview(folder, host=host, disk=f"{tmp_path}:1MiB", **options)
    assert not refused.fits and "may hold 1.00 MiB" in refused.reason


REPLANNED = {
    "whole": (ELSEWHERE, {}),
    "some in memory": (ELSEWHERE, {"host": "800MiB"}),
    "least": (ELSEWHERE, {"home": "disk"}),
    "generate": (ELSEWHERE, {"host": "700MiB", "train": False}),
    "inputs on disk": (ELSEWHERE, {"host": "1150MiB", "batch_size": 32, "seq_len": 1024}),
    "device": (DEVICE, {}),
    "small device": (DEVICE, {"device": "500MiB", "host": "800MiB", "batch_size": 16, "seq_len": 256}),
    "hosted": (DEVICE, {"device": "600MiB", "home": "host"}),
    "generate on a device": (DEVICE, {"device": "300MiB", "train": False}),
}


@pytest.mark.parametrize("case", REPLANNED)
def test_the_pins_that_are_printed_lead_to_the_plan_they_are_printed_for(case, tmp_path, monkeypatch):
    profile, options = REPLANNED[case]
    options = {"disk": tmp_path, "batch_size": 4, "seq_len": 64, "dtype": "float32"} | options
    seen = []
    place = Budget.place
    monkeypatch.setattr(Budget, "place", lambda self, *args: seen.append(self) or place(self, *args))

    def planned(**more):
        set_process_memory(monkeypatch, 350 << 20)
        summary = outsize.preview(wide(tmp_path), hardware=profile, **options, **more)
        assert summary.fits, summary
        return summary, seen[-1]

    summary, budget = planned()
    told = [summary.pins, *(each.pins for each in summary.alternatives)]
    for text in told:
        choice = next(each for each in budget.choices if pins_text(each) == text)
        again, other = planned(pins=pins_of(text.replace("--pin ", "").split()))
        assert other.placement == choice.placement and again.pins == text
        assert again.prediction.step_s == pytest.approx(choice.step_s)


def test_generating_is_compared_by_the_token_and_fits_by_the_prompt(tmp_path):
    folder = wide(tmp_path)
    options = {"hardware": ELSEWHERE, "disk": tmp_path, "batch_size": 8, "dtype": "float32", "train": False}
    least = outsize.preview(folder, seq_len=2048, home="disk", **options)
    host = f"{(least.host_bytes >> 20) + 80}MiB"
    summary = outsize.preview(folder, host=host, seq_len=2048, **options)
    assert summary.prediction.num_tokens == 8 and summary.alternatives
    for each in summary.alternatives:
        assert summary.prediction.step_s < each.step_s < 20 * summary.prediction.step_s
    assert not outsize.preview(
        folder, host=f"{(least.host_bytes >> 20) - 60}MiB", seq_len=2048, **options
    ).fits


def test_on_a_device_plans_that_keep_inputs_there_are_compared_with_those_that_do_not(tmp_path, monkeypatch):
    compared = []
    fastest = Planner.fastest

    def spied(self, fits, *args):
        compared.extend(fits)
        return fastest(self, fits, *args)

    monkeypatch.setattr(Planner, "fastest", spied)
    options = {"hardware": dataclasses.replace(DEVICE, up=1e8, down=1e8), "batch_size": 16, "seq_len": 256}
    for device in range(240, 700, 20):
        compared.clear()
        summary = outsize.preview(
            wide(tmp_path), device=f"{device}MiB", home="host", dtype="float32", **options
        )
        if summary.fits and compared[0].inputs is Home.HOST:
            cramped = [fit for fit in compared[1:] if fit.tile_rows == compared[0].tile_rows]
            if any(fit.inputs is Home.DEVICE for fit in cramped):
                return
    raise AssertionError("what has few slots and no traffic of inputs was not compared")
