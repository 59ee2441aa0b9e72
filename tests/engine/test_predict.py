"""Predictions: what computing costs, and that a plan's simulation follows the machine and the batch.

Costs are counted here instead of measured, so that they are the same on every machine.
"""

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import outsize
from outsize import Pins
from outsize.config import ComputeType
from outsize.engine import timing
from outsize.engine.counting import estimated_s
from outsize.engine.predict import pins_text
from outsize.plan import Direction
from outsize.plan.profile import Resource
from tests.plan.test_simulate import HOST
from tests.seams import budget_of, move_small_inputs
from tests.zoo import ZOO

SLOW = dataclasses.replace(HOST, name="a slow disk", disk_read=2e6, disk_write=2e6)


@pytest.fixture(autouse=True)
def counted_costs(monkeypatch):
    """What `_times` would measure is counted by operation."""
    times = timing._times
    monkeypatch.setattr(timing, "_times", lambda _, run: [estimated_s(HOST, ComputeType.FLOAT32, run)])
    return times


def test_costs_are_the_fastest_of_runs_after_one_that_is_not_counted(counted_costs, monkeypatch):
    now_s, runs = 0.0, []

    def run():
        nonlocal now_s
        now_s += (1.0, 7.0, 5.0)[len(runs)]
        runs.append(now_s)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(timing, "_times", counted_costs)
    stopwatch = timing._Stopwatch(torch.device("cpu"))
    assert stopwatch(run) == 5.0 and len(runs) == 3
    assert stopwatch.spread == pytest.approx(0.4)


def test_the_range_of_a_prediction_is_that_of_what_was_measured(tmp_path, monkeypatch):
    """On a busy machine measurements lie far apart: of computing while planning, of the disk in the profile."""
    quiet = predicted(tmp_path)
    assert quiet.least_s == pytest.approx(0.9 * quiet.step_s) and quiet.most_s == pytest.approx(
        1.1 * quiet.step_s
    )
    once = timing._times
    monkeypatch.setattr(timing, "_times", lambda device, run: [time := once(device, run)[0], 5 * time])
    busy = predicted(tmp_path, home="host")
    assert busy.costs.spread == pytest.approx(4)
    assert busy.least_s < busy.step_s / 2 and busy.most_s > 2 * busy.step_s
    monkeypatch.setattr(timing, "_times", once)
    unsteady = dataclasses.replace(SLOW, spread={"disk_read": 1.0, "disk_write": 1.0})
    slow, busy = predicted(tmp_path, profile=SLOW), predicted(tmp_path, profile=unsteady)
    assert busy.step_s == slow.step_s
    assert busy.least_s < 0.7 * slow.step_s and busy.most_s > 1.6 * slow.step_s
    assert f"({busy.least_s:.2f} to {busy.most_s:.2f})" in str(busy)


def predicted(tmp_path, name="llama", profile=HOST, **options):
    folder = tmp_path / name
    if not folder.exists():
        ZOO[name].build().config.save_pretrained(folder)
    options = {"batch_size": 4, "seq_len": 16, "disk": tmp_path, "home": "disk", "dtype": "float32"} | options
    return outsize.preview(folder, profile=profile, **options).prediction


def wide(tmp_path):
    """The folder of a model whose planes are large beside what else a process takes."""
    config = ZOO["llama"].build().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 4096, 8
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 64
    config.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "gpt2"])
def test_every_layer_and_the_head_have_a_cost(name, tmp_path):
    prediction = predicted(tmp_path, name)
    layers = [block for block in prediction.costs.forward_s if block.startswith("L")]
    assert len(layers) >= 2
    for block in layers:
        assert prediction.costs.backward_s[block] > prediction.costs.forward_s[block] > 0
    assert any(not block.startswith("L") and cost > 0 for block, cost in prediction.costs.forward_s.items())
    assert prediction.step_s >= sum(prediction.costs.backward_s.values())
    assert prediction.num_tokens == 64


def test_a_slow_disk_is_the_bottleneck_and_is_said(tmp_path):
    fast, slow = predicted(tmp_path), predicted(tmp_path, profile=SLOW)
    assert slow.simulation.bottleneck in (Resource.READ, Resource.WRITE)
    moved = fast.simulation.bytes_moved
    assert slow.simulation.bytes_moved[Resource.WRITE] == pytest.approx(moved[Resource.WRITE], rel=0.1)
    assert slow.step_s > max(moved[Resource.READ], moved[Resource.WRITE]) / 2e6 * 0.9
    assert "mostly for" in str(slow) and "disk" in str(slow)
    assert "written to the disk" in str(slow)


def test_what_stays_in_memory_is_not_moved(tmp_path):
    prediction = predicted(tmp_path, home="host", profile=dataclasses.replace(HOST, update=1e15))
    assert not prediction.simulation.bytes_moved.get(Resource.READ)
    assert "waits for nothing" in str(prediction)


def test_tiles_are_counted(tmp_path):
    """A call of four tiles computes four times as long as one of the same tile."""
    one = predicted(tmp_path, batch_size=1, pins=Pins(tile_rows=1)).costs
    four = predicted(tmp_path, batch_size=4, pins=Pins(tile_rows=1)).costs
    assert set(one.forward_s) == set(four.forward_s)
    layers = [block for block in one.forward_s if block.startswith("L")]
    for own, other in ((one.forward_s, four.forward_s), (one.backward_s, four.backward_s)):
        assert {block: 4 * own[block] for block in layers} == pytest.approx({b: other[b] for b in layers})


def test_inference_is_predicted_without_backward(tmp_path):
    prediction = predicted(tmp_path, train=False)
    assert not any(prediction.costs.backward_s[b] for b in prediction.costs.backward_s if b.startswith("L"))
    events = prediction.simulation.events
    assert not any(event.task.label.startswith(str(Direction.BACKWARD)) for event in events)


@pytest.mark.parametrize("kept_blocks", [0, 3])
def test_inputs_on_disk_move_as_many_bytes_as_predicted(kept_blocks, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    pins = Pins(inputs="disk", kept_blocks=kept_blocks)
    model = outsize.load(
        wide(tmp_path), from_scratch=True, disk=tmp_path, dtype="float32", home="host", pins=pins
    ).train()
    ids = torch.zeros(4, 64, dtype=torch.long)
    for _ in range(2):
        before = outsize.report(model)
        model(input_ids=ids, labels=ids).loss.backward()
    after, prediction = outsize.report(model), outsize.predict(model, HOST)
    each = 4 * 64 * 256 * 4
    assert prediction.bytes_written == after.bytes_written - before.bytes_written
    assert prediction.bytes_written == (9 - kept_blocks) * each  # the last norm is a visit too
    assert prediction.bytes_read == after.bytes_read - before.bytes_read
    profile = dataclasses.replace(HOST, disk_endurance_bytes=1e15)
    assert outsize.predict(model, profile).endurance_steps == 1e15 / prediction.bytes_written


@pytest.mark.parametrize(
    ("home", "pins"), [("host", Pins()), ("disk", Pins()), (None, Pins(resident=(4, 0, 6)))]
)
def test_a_commit_copies_as_many_bytes_as_predicted(home, pins, tmp_path):
    """What lives in memory is copied for each commit, what lives on disk is not."""
    model = outsize.load(
        wide(tmp_path), from_scratch=True, disk=tmp_path, dtype="float32", home=home, pins=pins
    ).train()
    optimizer = outsize.AdamW(model, lr=1e-3)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    ids = torch.zeros(2, 8, dtype=torch.long)
    written = []
    for step in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
            outsize.checkpoint.finish(model)
        written.append(outsize.report(model).bytes_written)
    slow = dataclasses.replace(HOST, disk_write=1e7)
    every, rarely, never = (outsize.predict(model, slow, commit_every=every) for every in (1, 10, 0))
    measured = [b - a for a, b in pairwise(written)]
    assert measured[-1] == pytest.approx(every.bytes_written, rel=0.02)
    assert every.bytes_written - rarely.bytes_written == pytest.approx(every.commit_bytes, rel=0.02, abs=1)
    assert rarely.bytes_written == never.bytes_written and never.commit_bytes == never.commit_s == 0
    assert every.step_s == pytest.approx(rarely.step_s + rarely.commit_s)
    if home == "disk":
        assert every.commit_bytes == 0 and "copies nothing" in str(every)
    else:
        assert every.commit_s > 0 and every.step_s > every.bytes_written / 1e7 * 0.9
        assert "a commit, every 10 steps, copies" in str(rarely) and "a commit, each step" in str(every)
    assert "a commit" not in str(never)


def test_the_life_of_a_drive_is_said_in_steps(tmp_path):
    profile = dataclasses.replace(HOST, disk_endurance_bytes=1.2e15)
    assert "the drive's life is" in str(predicted(tmp_path, profile=profile))


def test_what_would_help_follows_what_limits(tmp_path):
    slow = predicted(tmp_path, profile=SLOW)
    assert slow.remedies[0].what == "a second disk" and slow.remedies[0].speedup == pytest.approx(
        2.0, rel=0.1
    )
    assert "what would help: a second disk" in str(slow)
    resident = predicted(tmp_path, home="host")
    assert [remedy.what for remedy in resident.remedies] == ["a processor twice as fast"]


def test_more_memory_helps_where_the_disk_limits(tmp_path):
    """A budget that holds a part of the model: with a quarter more, the rest stays as well."""
    folder = wide(tmp_path)
    options = {"batch_size": 1, "seq_len": 16, "disk": tmp_path, "dtype": "float32"}
    least = outsize.preview(folder, home="disk", **options)
    host = f"{(least.host_bytes >> 20) + 150}MiB"
    prediction = outsize.preview(folder, host=host, profile=SLOW, **options).prediction
    assert "more memory" in {remedy.what[-11:] for remedy in prediction.remedies}


def trained_with_choices(tmp_path):
    """A model that was opened with a profile, one step, and what could have been chosen."""
    folder = wide(tmp_path)
    host = f"{(outsize.preview(folder, disk=tmp_path, home='disk', dtype='float32', seq_len=16).host_bytes >> 20) + 200}MiB"
    model = outsize.load(
        folder, from_scratch=True, disk=tmp_path, dtype="float32", host=host, profile=SLOW
    ).train()
    outsize.AdamW(model)
    ids = torch.zeros(1, 16, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    return model, budget_of(model)


def test_a_model_opened_with_a_profile_runs_the_fastest_plan(tmp_path):
    _, budget = trained_with_choices(tmp_path)
    assert len(budget.choices) > 3
    assert budget.placement == budget.choices[0].placement
    assert budget.choices[0].step_s == min(choice.step_s for choice in budget.choices)


def test_a_faster_plan_is_named_when_what_was_measured_shows_one(tmp_path):
    model, budget = trained_with_choices(tmp_path)
    best = budget.choices[0]
    stalled_s = best.step_s - best.simulation.busy_s[Resource.COMPUTE]
    assert outsize.advise(model, SLOW, best.step_s, stalled_s) is None
    budget.choices.reverse()
    slow = budget.choices[0]
    stalled_s = slow.step_s - slow.simulation.busy_s[Resource.COMPUTE]
    advice = outsize.advise(model, SLOW, slow.step_s, stalled_s)
    assert advice.pins in {pins_text(c) for c in budget.choices[1:]}
    assert advice.other_step_s < slow.step_s / 1.1 and advice.pins in str(advice)


def test_no_plan_is_named_where_none_were_compared(tmp_path):
    model = outsize.load(
        wide(tmp_path), from_scratch=True, disk=tmp_path, dtype="float32", home="disk"
    ).train()
    outsize.AdamW(model)
    ids = torch.zeros(1, 16, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    assert outsize.advise(model, SLOW, 1.0, 0.5) is None


def test_where_memory_allows_activations_are_kept_instead_of_computed_again(tmp_path):
    folder, options = wide(tmp_path), {"disk": tmp_path, "dtype": "float32", "batch_size": 4, "seq_len": 64}
    free = outsize.preview(folder, profile=HOST, **options)
    assert "kept_blocks=8" in free.pins
    none = outsize.preview(folder, profile=HOST, pins=Pins(kept_blocks=0), **options)
    assert free.prediction.step_s < 0.9 * none.prediction.step_s
    assert free.host_bytes > none.host_bytes
    tight = f"{(outsize.preview(folder, home='disk', **options).host_bytes >> 20) + 2}MiB"
    assert "kept_blocks=8" not in outsize.preview(folder, host=tight, profile=HOST, **options).pins
