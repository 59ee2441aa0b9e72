"""A device with memory of its own: placements, copies and updates there change no bit either.

The device is a twin of the host: a second memory, reached by copies on threads that begin late. What is read too early,
or sent before it is computed, shows.
"""

import gc
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import outsize
from outsize import Pins
from outsize.block import Group
from outsize.config import Home
from outsize.engine import api
from outsize.errors import BudgetError, DeviceError, UsageError, WeightsError
from outsize.store import finalizers
from outsize.tier import Way
from outsize.tier.transfer import DoneTransfer
from tests.doubles import SlowTier, TwinDevice
from tests.pairs import pairwise
from tests.promises.test_placement import RUNS, Run, assert_same_bits, small_chunks, trained
from tests.running import around_forward, opened
from tests.seams import (
    abandon,
    activation_offload,
    around_placing,
    close,
    compute_on,
    device_of,
    gradients_on_their_way,
    has_memory,
    move_small_inputs,
    placement_of,
    plan_executed,
    set_activations,
    set_device_slack,
    slots_of,
    source_of,
    watch_slots_of_visits,
    with_twin,
    wrapped_disk,
)
from tests.zoo import ZOO

__all__ = ["small_chunks"]  # a fixture for all tests here


LIMIT = 50_000_000
"""Bytes of a device."""

PLACEMENTS = st.fixed_dictionaries(
    {
        "home": st.sampled_from(["device", "host", "disk", None]),
        "weight_slots": st.integers(1, 3),
        "gradient_slots": st.integers(1, 2),
        "resident_bytes": st.sampled_from([0, 100_000, 300_000]),
        "host_bytes": st.sampled_from([400_000, 700_000, None]),
    }
)


@given(RUNS, PLACEMENTS, st.integers(0, 9))
@example(Run("llama_tied", "float32"), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 0)
@example(
    Run("llama_tied", "bfloat16", 2, 0.1, 1), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 1
)
@example(
    Run("llama_tied", "bfloat16", 2, 0.1, 1), {"weight_slots": 1, "gradient_slots": 1, "home": "host"}, 2
)
@example(Run("mixtral", "bfloat16"), {"weight_slots": 3, "gradient_slots": 2, "home": "host"}, 3)
@example(Run("mixtral", "bfloat16"), {"home": "device"}, 4)
@example(Run("t5", "float32", 2, None, 1, True), {"weight_slots": 1, "gradient_slots": 1, "home": "disk"}, 5)
@example(Run("t5", "bfloat16", 1, 0.1), {"weight_slots": 2, "gradient_slots": 1, "resident_bytes": 90_000}, 6)
@example(Run("albert", "bfloat16"), {"weight_slots": 1, "gradient_slots": 1, "home": "host"}, 7)
@settings(
    max_examples=100 if os.environ.get("OUTSIZE_SOAK") else 2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_placement_gives_the_same_bits(monkeypatch, run, placement, seed):
    choices = {**placement}
    home, host_bytes = choices.pop("home", None), choices.pop("host_bytes", None)
    generator = random.Random(seed)

    def delay(kind, label):
        return generator.choice([0.0, 0.0, 0.001, 0.004])

    with (
        monkeypatch.context() as patch,
        TemporaryDirectory(dir=Path(__file__).parent) as folder,
        wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)),
    ):
        twins = with_twin(patch, delay, host_bytes=host_bytes if home is None else None)
        pins = Pins(tile_rows=run.tile_rows, **choices)
        losses, values, report = trained(run, disk=folder, home=home, pins=pins)
    assert_same_bits(run, losses, values)
    assert len(twins) == 1 and report.off_plan == ()
    moved = twins[0].links()
    assert (moved.bytes_up > 0 and moved.bytes_down > 0) or home == "device"
    assert not twins[0].pinned


@pairwise(way=list(Way), plane=["weight", "gradient"], home=["host", "disk"], dtype=["float32", "bfloat16"])
def test_one_slow_plane_is_waited_for(dtype, home, plane, way, tmp_path, monkeypatch):
    """Each kind of copy alone is late: the others' waits cannot hide that its own is missing."""

    def delay(kind, label):
        return 0.02 if kind is way and f".{plane}" in label else 0.0

    with_twin(monkeypatch, delay)
    run = Run("llama", dtype, accumulation=2)
    pins = Pins(weight_slots=2, gradient_slots=1)
    losses, values, _ = trained(run, disk=tmp_path, home=home, pins=pins)
    assert_same_bits(run, losses, values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_weights_that_stay_in_their_files_until_their_first_update(dtype, home, tmp_path, monkeypatch):
    with_twin(monkeypatch, lambda way, label: 0.002)
    run = Run("llama_tied", dtype)
    ZOO[run.name].build().save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    model = outsize.load(
        tmp_path / "model", disk=tmp_path / "disk", home=home, dtype=dtype, pins=Pins(weight_slots=1)
    )
    model.train()
    with torch.no_grad():
        first = model(**ZOO[run.name].batch(seed=5)).loss
    optimizer = outsize.AdamW(model, lr=3e-3)
    losses = []
    for step in range(5):
        loss = model(**ZOO[run.name].batch(rows=4, length=10, seed=10 * step)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            with torch.no_grad():
                losses.append(model(**ZOO[run.name].batch(seed=99)).loss)
    assert_same_bits(run, losses, {name: value.detach() for name, value in model.named_parameters()})
    assert torch.isfinite(first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_and_blocks_in_which_nothing_trains(dtype, tmp_path, monkeypatch):
    """On a device, weights of frozen parameters pass through the update as well; they have no state."""
    results = []
    for home in ("host", "disk", "device"):
        with_twin(monkeypatch)
        plain = ZOO["llama"].build().train()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("down" in name and "layers.0" not in name)
        model = opened(plain, disk=tmp_path, home=home, dtype=dtype, pins=Pins(weight_slots=1))
        optimizer = outsize.AdamW(model, lr=3e-3)
        for seed in range(3):
            model(**ZOO["llama"].batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: value.detach().clone() for name, value in model.named_parameters()})
        close(model)
    for result in results[1:]:
        assert all(torch.equal(results[0][name], result[name]) for name in result)


def test_a_whole_block_that_stays_on_the_device_moves_nothing(tmp_path, monkeypatch):
    labels = []

    def note(way, label):
        labels.append(label)
        return 0.0

    with_twin(monkeypatch, note)
    model = opened(
        ZOO["llama"].build().train(), disk=tmp_path, dtype="bfloat16", pins=Pins(resident_bytes=100_000)
    )
    optimizer = outsize.AdamW(model, lr=1e-3)
    for seed in range(3):
        model(**ZOO["llama"].batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    placement = placement_of(model)
    stay = {block for block, group in placement.at(Home.DEVICE) if group is Group.STATE}
    assert stay and not {label.partition(".")[0] for label in labels} & stay
    rows = {(row.tier, row.what) for row in outsize.report(model).rows}
    assert ("device", "optimizer state") in rows and ("host", "weights") in rows


def test_host_memory_that_copies_use_is_pinned(tmp_path, monkeypatch):
    twins = with_twin(monkeypatch)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", dtype="bfloat16")
    outsize.AdamW(model)
    model(**ZOO["llama"].batch()).loss.backward()
    kinds = {name.partition("[")[0] for name in twins[0].pinned.values()}
    assert kinds >= {"chunk", "bounce", "staging"}
    close(model)  # while chunks are small
    assert not twins[0].pinned


def test_a_model_that_is_dropped_unpins_its_memory(tmp_path, monkeypatch):
    """Pages that are unmapped while CUDA has them registered cannot be registered again at their address."""
    twins = with_twin(monkeypatch)
    move_small_inputs(monkeypatch)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", pins=Pins(inputs="host"))
    outsize.AdamW(model)
    model(**ZOO["llama"].batch()).loss.backward()
    assert any(name.startswith("input") for name in twins[0].pinned.values())
    del model
    for _ in range(2):  # first the session, whose threads are ended, then what those held
        gc.collect()
        finalizers.finish()
    assert not twins[0].pinned


def test_weights_that_cannot_be_read_are_not_computed_with(tmp_path, monkeypatch):
    with_twin(monkeypatch)
    ZOO["llama"].build().save_pretrained(tmp_path)
    model = outsize.load(tmp_path, home="host", dtype="float32")

    def fail(block, targets):
        raise WeightsError("the file is gone")

    monkeypatch.setattr(source_of(model), "read", fail)
    with pytest.raises(WeightsError), torch.no_grad():
        model(**ZOO["llama"].batch())
    abandon(model)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_what_a_slot_remembers_does_not_grow(home, tmp_path, monkeypatch):
    with_twin(monkeypatch)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype="bfloat16")
    optimizer = outsize.AdamW(model)
    for seed in range(4):
        model(**ZOO["llama"].batch(seed=seed)).loss.backward()
        optimizer.step()
    remembered = [len(slot.after) for slot in slots_of(model)]
    assert remembered and max(remembered) <= 2
    close(model)


class _Mark(DoneTransfer):
    def __init__(self, tick):
        self.tick = tick


class LateDevice(TwinDevice):
    """As if nothing were computed before it has to be: copies must come after the last use of what they touch.

    The twin computes at once, so a copy that overtakes computing does not show there.
    """

    def __init__(self):
        super().__init__()
        self.tick = 0
        self.uses = {}
        self.too_early = []

    def mark(self):
        return _Mark(self.tick)

    def computed(self, tensor):
        self.tick += 1
        self.uses[tensor.data_ptr()] = (tensor.data_ptr() + tensor.nbytes, self.tick)

    def start_copy(self, way, target, source, *, after=(), label):
        place = target if way is Way.UP else source
        start, stop = place.data_ptr(), place.data_ptr() + place.nbytes
        last = max((tick for at, (end, tick) in self.uses.items() if at < stop and start < end), default=0)
        if label.endswith(".input"):
            last = self.tick  # just made, or where something was until now
        if max((each.tick for each in after if isinstance(each, _Mark)), default=0) < last:
            self.too_early.append(f"{label} {way}")
        return super().start_copy(way, target, source, after=after, label=label)


@pairwise(slots=[1, 3], dtype=["float32", "bfloat16"], home=["host", "disk"])
def test_no_copy_overtakes_computing(home, dtype, slots, tmp_path, monkeypatch):
    device = LateDevice()
    compute_on(monkeypatch, lambda: device)
    move_small_inputs(monkeypatch)

    watch_slots_of_visits(monkeypatch, device.computed)
    pins = Pins(weight_slots=slots, gradient_slots=min(slots, 2), inputs="host")
    model = opened(ZOO["llama_tied"].build().train(), disk=tmp_path, home=home, dtype=dtype, pins=pins)
    optimizer = outsize.AdamW(model, lr=1e-3)
    for seed in range(3):
        for part in range(2):
            model(**ZOO["llama_tied"].batch(seed=2 * seed + part)).loss.backward()
        with torch.no_grad():  # blocks are held when it ends, computed with after their gradients went down
            model(**ZOO["llama_tied"].batch(seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    assert device.tick > 0 and sorted(set(device.too_early)) == []
    close(model)


def test_gradients_go_down_while_the_next_block_computes(tmp_path, monkeypatch):
    """A gradient's copy down is over long after its slot was freed, and nobody waited."""
    with_twin(monkeypatch, lambda way, label: 0.05 if way is Way.DOWN else 0.0)
    model = opened(ZOO["llama"].build().train(), home="host", dtype="float32", pins=Pins(gradient_slots=2))
    outsize.AdamW(model)
    loss = model(**ZOO["llama"].batch()).loss
    loss.backward()
    assert gradients_on_their_way(model)
    close(model)


def test_a_device_that_is_too_small_names_one_that_works(tmp_path, monkeypatch):
    with_twin(monkeypatch)

    def run(**budgets):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="float32", **budgets)
        outsize.AdamW(model)
        model(**ZOO["llama"].batch()).loss.backward()
        return model

    monkeypatch.setattr(api.torch.cuda, "is_available", lambda: True)
    with pytest.raises(BudgetError) as caught:
        run(device="64MiB")
    hint = str(caught.value.hint)
    assert "of the device" in caught.value.message and 'device="' in hint
    named = {part.split("=")[0]: part.split('"')[1] for part in hint.split() if '="' in part}
    close(run(device=named["device"], host=named["host"]))


def test_a_failed_pin_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    twins = with_twin(monkeypatch)

    def refuse(self, address, num_bytes, name):
        raise DeviceError(f"{name} cannot be pinned", hint="ulimit -l unlimited")

    monkeypatch.setattr(TwinDevice, "pin", refuse)
    model = opened(ZOO["llama"].build().train(), home="host")
    outsize.AdamW(model)
    with pytest.raises(DeviceError, match="cannot be pinned"):
        model(**ZOO["llama"].batch())
    assert not has_memory(model) and len(twins) == 1


@pytest.mark.parametrize("way", list(Way))
def test_a_lost_device_is_named_and_nothing_hangs(way, tmp_path, monkeypatch):
    def lose(kind, label):
        if kind is way and label.startswith("L01"):
            raise DeviceError(f"{label}: the device is lost", hint="nvidia-smi")
        return 0.0

    with_twin(monkeypatch, lose)
    model = opened(ZOO["llama"].build().train(), home="host", dtype="float32")
    optimizer = outsize.AdamW(model)
    with pytest.raises(DeviceError, match="L01"):
        for seed in range(3):
            model(**ZOO["llama"].batch(seed=seed)).loss.backward()
            optimizer.step()
    abandon(model)


@pytest.mark.parametrize("name", ["llama_tied", "t5"])
@pytest.mark.parametrize("tile_rows", [None, 1])
def test_inputs_that_wait_in_the_hosts_memory_are_the_same(name, tile_rows, tmp_path, monkeypatch):
    labels = []

    def delay(way, label):
        labels.append((way, label))
        return 0.004 if label.endswith(".input") else 0.0

    with_twin(monkeypatch, delay)
    move_small_inputs(monkeypatch)
    run = Run(name, "float32", accumulation=2, tile_rows=tile_rows)
    pins = Pins(tile_rows=tile_rows, inputs="host")
    losses, values, report = trained(run, home="host", pins=pins)
    assert_same_bits(run, losses, values)
    down, up = (
        sum(way is each and label.endswith(".input") for way, label in labels) for each in (Way.DOWN, Way.UP)
    )
    # The last two visits' inputs are still there when the backward begins.
    assert down > up > 10 and any(row.what == "inputs of blocks" for row in report.rows)


def test_inputs_are_brought_up_one_block_ahead(tmp_path, monkeypatch):
    order = []
    with_twin(monkeypatch, lambda way, label: order.append((way, label)) or 0.0)
    move_small_inputs(monkeypatch)
    model = opened(ZOO["llama"].build().train(), home="host", pins=Pins(inputs="host"))
    outsize.AdamW(model)
    loss = model(**ZOO["llama"].batch()).loss
    device_of(model).finish()
    kept = [label for way, label in order if way is Way.DOWN and label.endswith(".input")]
    order.clear()
    loss.backward()
    device_of(model).finish()
    ups = [label for way, label in order if way is Way.UP]
    brought = [label for label in ups if label.endswith(".input")]
    assert brought == ["L01.input", "L00.input"] and kept == [
        "L00.input",
        "L01.input",
        "L02.input",
        "norm.input",
    ]
    # The next block's input is asked for before this block's gradient is there.
    executed = list(map(str, plan_executed(model)))
    fetch, write = (
        next(at for at, op in enumerate(executed) if op.startswith(start))
        for start in ("fetch L00", "write L01.gradient")
    )
    assert fetch < write, executed
    close(model)


def test_a_graph_may_be_gone_back_twice_and_dropped(tmp_path, monkeypatch):
    with_twin(monkeypatch, lambda way, label: 0.001)
    move_small_inputs(monkeypatch)
    model = opened(ZOO["llama"].build().train(), home="host", pins=Pins(inputs="host"))
    outsize.AdamW(model)
    batch = ZOO["llama"].batch()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, 2 * once)
    keeper = activation_offload(model)
    model(**batch)
    del loss
    model(**batch)
    assert keeper.high_water_bytes > 0 and not keeper.in_use_bytes, "places go back with the graph"
    before = keeper.high_water_bytes
    model(**batch).loss.backward()
    assert keeper.high_water_bytes == before, "and are used again"
    late = model(**batch).loss
    close(model)
    with pytest.raises(UsageError):
        late.backward()


def test_a_long_sequence_moves_inputs_where_the_device_is_too_small(tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    set_device_slack(monkeypatch, 0)
    set_activations(
        monkeypatch,
        lambda workload, shape, tile_rows, inputs=None, kept=frozenset(): (
            (100, 50, 900) if inputs else (1000, 50)
        ),
    )
    with_twin(monkeypatch, limit_bytes=LIMIT)
    for spare, moves in ((2000, False), (500, True)):
        model = opened(ZOO["llama"].build().train(), home="host", dtype="float32")
        outsize.AdamW(model)
        around_placing(monkeypatch, _first_fits(spare))
        with torch.no_grad():
            model(**ZOO["llama"].batch())
        assert (activation_offload(model) is not None) is moves, spare
        close(model)


def _first_fits(spare):
    """A planner to whom all arenas take what leaves `spare` of the device."""

    def place(run, options):
        if int(0.95 * LIMIT) - options["room"][Home.DEVICE] > spare:
            raise BudgetError("too small")
        return run()

    return place


@pytest.mark.parametrize("pins", [Pins(), Pins(inputs="host")])
def test_budgets_that_are_named_hold_the_inputs_that_wait(pins, tmp_path, monkeypatch):
    set_activations(
        monkeypatch,
        lambda workload, shape, tile_rows, inputs=None, kept=frozenset(): (
            (1 << 20, 1 << 20, 300 << 20) if inputs else (80 << 30, 1 << 20)
        ),
    )
    with_twin(monkeypatch, limit_bytes=LIMIT)
    monkeypatch.setattr(api.torch.cuda, "is_available", lambda: True)

    def run(**budgets):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="float32", pins=pins, **budgets)
        outsize.AdamW(model)
        model(**ZOO["llama"].batch()).loss.backward()
        return model

    with pytest.raises(BudgetError) as caught:
        run()
    hint = str(caught.value.hint)
    named = {part.split("=")[0]: part.split('"')[1] for part in hint.split() if '="' in part}
    with_twin(monkeypatch, limit_bytes=1 << 30)
    close(run(device=named["device"], host=named["host"]))


def test_smaller_tiles_do_where_the_host_has_no_room_for_inputs(tmp_path, monkeypatch):
    set_activations(
        monkeypatch,
        lambda workload, shape, tile_rows, inputs=None, kept=frozenset(): (
            (0, 0, 1 << 50) if inputs else (0, tile_rows << 36 if tile_rows > 1 else 0)
        ),
    )
    with_twin(monkeypatch, limit_bytes=1 << 30)
    model = opened(ZOO["llama"].build().train(), home="host", dtype="float32")
    outsize.AdamW(model)
    model(**ZOO["llama"].batch(rows=4)).loss.backward()
    assert activation_offload(model) is None
    close(model)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_running_out_of_the_devices_memory_is_named(direction, tmp_path, monkeypatch):
    with_twin(monkeypatch)
    model = opened(ZOO["llama"].build().train(), home="host", dtype="float32")
    outsize.AdamW(model)
    batch = ZOO["llama"].batch()
    model(**batch).loss.backward()

    visits = []

    def full(x):
        visits.append(x)
        if len(visits) == (1 if direction == "forward" else 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with (
        around_forward(model.model.layers[1].mlp, before=full),
        pytest.raises(BudgetError, match="ran out of memory") as caught,
    ):
        model(**batch).loss.backward()
    assert "tile_rows" in str(caught.value.hint)
    model(**batch).loss.backward()
    close(model)
