"""The promises of the device, on a CUDA device. Run with `pytest tests/gpu` where there is one; skipped elsewhere."""

import gc
import itertools
import os
import re
import sys
import warnings
from contextlib import ExitStack, contextmanager
from functools import cache

import pytest
import torch

import outsize
from outsize import Pins
from outsize.config import ComputeType, Home
from outsize.errors import BudgetError, ConfigError
from outsize.optim import RULES, gpu_kernel
from outsize.plan.ledger import Purpose
from outsize.plan.limits import DEVICE_SLACK_BYTES
from outsize.plan.place import GROUPS, lay_out
from outsize.plan.profile import Resource
from outsize.store import memory
from outsize.tier import CudaDevice, Way
from tests.pairs import pairwise
from tests.running import adamw, assert_same_losses, assert_same_weights, opened, train
from tests.seams import (
    around_placing,
    budget_of,
    close,
    flush,
    move_small_inputs,
    placement_of,
    visits_off_plan,
)
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = 4
IS_SHORT = "tests.emulation" in sys.modules and not os.environ.get("OUTSIZE_SOAK")
"""An emulated device takes long to compile for; a real one runs everything."""
HOMES = ["device", "host", "disk"]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Kernels that give the same bits each time, in full fp32."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


def slowed(monkeypatch, way, part):
    """Let copies of one way, of labels with `part`, begin late: their stream sleeps first."""
    start_copy = CudaDevice.start_copy

    def late(self, own_way, target, source, *, after=(), label):
        if own_way is way and part in label:
            with torch.cuda.stream(self._streams[way]):
                torch.cuda._sleep(20_000_000)  # some 10 ms
        return start_copy(self, own_way, target, source, after=after, label=label)

    monkeypatch.setattr(CudaDevice, "start_copy", late)


def trained(name="llama_tied", dtype="bfloat16", **options):
    """Losses and weights after some steps; updates on the host unless `home` is the device."""
    model = opened(ZOO[name].build().train(), dtype=dtype, **options)
    optimizer = outsize.AdamW(model, lr=3e-3, max_grad_norm=0.1)
    losses = []
    for step in range(STEPS):
        loss = model(**ZOO[name].batch(rows=4, length=10, seed=step)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    values = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    close(model)
    return [loss.item() for loss in losses], values


@cache
def reference(dtype, pins):
    """What training gives with everything in the memory of the host."""
    return trained(dtype=dtype, home="host", pins=pins)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gpt2", "mixtral", "t5"])
def test_training_is_that_of_plain_pytorch(name, home, tmp_path):
    plain = ZOO[name].build().train()
    model = opened(plain, disk=tmp_path, home=home, dtype="float32")
    plain.cuda()
    batches = [ZOO[name].batch(seed=seed) for seed in range(STEPS)]
    losses = train(model, batches, adamw(model))
    on_device = [{key: value.cuda() for key, value in batch.items()} for batch in batches]
    assert_same_losses(losses, train(plain, on_device, adamw(plain)), relative=1e-4)
    assert_same_weights(model, plain)


@pairwise(
    home=["host", "disk"],
    options={
        "one slot": {"weight_slots": 1},
        "three slots": {"weight_slots": 3},
        "inputs": {"inputs": "host"},
    },
    dtype=["float32", "bfloat16"],
)
def test_placement_changes_no_bit(dtype, options, home, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    expected = reference(dtype, Pins(weight_slots=2))
    losses, values = trained(dtype=dtype, disk=tmp_path, home=home, pins=Pins(**options))
    assert losses == expected[0]
    assert all(torch.equal(values[name], expected[1][name]) for name in values)


@pairwise(part=["weight", "gradient", "input"], way=list(Way), home=["host", "disk"])
def test_late_copies_are_waited_for(way, part, home, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    pins = Pins(weight_slots=2, gradient_slots=1, inputs="host")
    expected = reference("bfloat16", pins)
    slowed(monkeypatch, way, part)
    losses, values = trained(disk=tmp_path, home=home, pins=pins)
    assert losses == expected[0]
    assert all(torch.equal(values[name], expected[1][name]) for name in values)


@pytest.mark.parametrize("home", HOMES)
def test_nothing_waits_for_the_device_inside_a_step(home, tmp_path):
    """transformers asks the device one question per call; everything else is ours, and asks none."""
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype="bfloat16")
    optimizer = outsize.AdamW(model, max_grad_norm=1.0)

    def step(seed):
        loss = model(**ZOO["llama"].batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(2):
        step(seed)
    import transformers.masking_utils as masking

    plain = masking.is_tracing
    masking.is_tracing = lambda *values: True
    gc.collect()  # closing a model of an earlier test waits for the device
    try:
        loss = None
        torch.cuda.set_sync_debug_mode("error")
        loss = model(**ZOO["llama"].batch(seed=2)).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        masking.is_tracing = plain
    optimizer.step()
    assert loss is not None and torch.isfinite(loss)


@pytest.mark.parametrize("home", HOMES)
def test_a_step_is_recorded_on_the_clock_of_the_device(home, tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype="bfloat16")
    optimizer = outsize.AdamW(model)

    def step(seed):
        loss = model(**ZOO["llama"].batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for seed in range(3):
        step(seed)
    flush(model)  # what the last step moves still
    before = outsize.report(model)
    with outsize.record(model) as recording:
        step(3)
        flush(model)
        torch.cuda.synchronize()
    timeline, after = recording.timeline, outsize.report(model)
    computing = [span for span in timeline.spans if span.resource is Resource.COMPUTE]
    visits = [span.label for span in computing if span.label.split()[0] in ("forward", "backward")]
    assert len(visits) == len(set(visits)) > 6
    # Events of an emulated device are stamped by a thread, which may have to wait for a core first.
    is_emulated = torch.cuda.get_device_name() == "emulated"
    late_s = max(1e-4, timeline.step_s / 20 if is_emulated else 0.0)
    assert all(a.end_s <= b.start_s + late_s for a, b in itertools.pairwise(computing))
    late_s = max(1e-3, late_s)
    assert all(-late_s <= span.start_s <= span.end_s <= timeline.step_s + late_s for span in timeline.spans)
    moved = sum(span.num_bytes for span in timeline.spans if span.resource is Resource.UP)
    assert moved == after.bytes_up - before.bytes_up and (moved > 0) is (home != "device")
    assert max(size for _, size in timeline.memory["device"]) > 0


def test_a_slot_is_zero_before_a_copy_fills_it():
    device = CudaDevice()
    source = torch.ones(1 << 20, dtype=torch.uint8).pin_memory()
    torch.cuda._sleep(200_000_000)
    place = device.zeros(1 << 20, "slot")
    device.start_copy(Way.UP, place, source, label="slot").wait()
    torch.cuda.synchronize()
    assert bool(place.all())


def test_memory_is_pinned_again_after_a_model_was_dropped(tmp_path):
    """Registered pages that were unmapped could not be registered again at their address."""
    for _ in range(3):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", dtype="bfloat16")
        outsize.AdamW(model)
        model(**ZOO["llama"].batch()).loss.backward()
        del model
        gc.collect()


def test_memory_of_the_device_stays_within_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_highest_on_device", {})
    limit = 512 << 20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = opened(ZOO["llama"].build().train(), device=limit, disk=tmp_path, home="host", dtype="bfloat16")
    outsize.AdamW(model)
    model(**ZOO["llama"].batch()).loss.backward()
    report = outsize.report(model)
    assert report.device_peak_bytes <= limit
    planned = budget_of(model).ledger.total(Home.DEVICE)
    assert report.device_peak_bytes <= planned + DEVICE_SLACK_BYTES


@pytest.mark.parametrize("home", HOMES)
def test_memory_of_the_device_is_what_the_plan_says(home, tmp_path):
    """Never more, but for what kernels of a real device take, and the rule where no compiler serves it."""
    is_emulated = torch.cuda.get_device_name() == "emulated"
    slack = 0 if is_emulated and home != "device" else DEVICE_SLACK_BYTES
    gc.collect()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 2048}
    model = opened(ZOO["llama"].build(**sizes).train(), disk=tmp_path, home=home, dtype="bfloat16")
    optimizer = outsize.AdamW(model, max_grad_norm=1.0)
    for seed in range(3):
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(4, 2000, (4, 64), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    budget = budget_of(model)
    taken = budget.limits.taken[Home.DEVICE, Purpose.PROCESS]
    peak = torch.cuda.max_memory_allocated() - taken
    planned = budget.ledger.total(Home.DEVICE) - taken
    assert (0.9 * planned if is_emulated else 0) < peak <= planned + slack


def test_a_tight_limit_makes_torch_give_nothing_back(tmp_path):
    """Its allocator takes pages, of which some stay partly used; giving back what it keeps waits for the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192}
    before = torch.cuda.memory_stats()["num_alloc_retries"]
    limit = 240 << 20
    model = opened(ZOO["llama"].build(**sizes).train(), device=limit, disk=tmp_path, dtype="bfloat16")
    optimizer = outsize.AdamW(model, max_grad_norm=1.0)
    for seed in range(3):
        ids = torch.randint(4, 8000, (16, 128), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    budget = budget_of(model)
    assert budget.placement is not None and budget.placement.at(Home.DEVICE)
    assert budget.ledger.total(Home.DEVICE) > 0.65 * limit
    assert torch.cuda.memory_stats()["num_alloc_retries"] == before
    assert torch.cuda.max_memory_reserved() <= limit


def test_what_a_hint_says_of_a_device_that_is_too_small_works(tmp_path):
    """What is in use there already is part of it."""
    gc.collect()
    plain = ZOO["llama"].build(hidden_size=256, intermediate_size=768, vocab_size=8192).train()
    ids = torch.randint(4, 8000, (16, 128), generator=torch.Generator().manual_seed(0))
    beside = torch.zeros(100 << 20, dtype=torch.uint8, device="cuda")
    model = opened(plain, device=240 << 20, disk=tmp_path)
    with pytest.raises(BudgetError, match="does not fit into") as caught:
        model(input_ids=ids, labels=ids)
    named = re.search(r'device="(\d+)MiB"', caught.value.hint or "")
    assert named is not None
    del model, caught
    gc.collect()
    model = opened(plain, device=int(named[1]) << 20, disk=tmp_path)
    model(input_ids=ids, labels=ids).loss.backward()
    del beside


@contextmanager
def before_forward(module, act):
    """Inside, `act(module, args)` runs before the forward of `module`; hooks would keep its layer from being cut."""
    original = module.forward

    def forward(*args):
        act(module, args)
        return original(*args)

    module.forward = forward
    yield
    module.forward = original


def test_running_out_of_the_devices_memory_is_named(tmp_path):
    model = opened(ZOO["llama"].build().train(), home="host", dtype="bfloat16")
    outsize.AdamW(model)
    batch = ZOO["llama"].batch()
    model(**batch).loss.backward()

    def greedy(module, args):
        torch.empty(1 << 44, dtype=torch.uint8, device="cuda")

    with (
        before_forward(model.model.layers[1].mlp, greedy),
        pytest.raises(BudgetError, match="ran out of memory"),
    ):
        model(**batch)
    model(**batch).loss.backward()
    assert visits_off_plan(model) is not None


def test_a_first_call_that_the_device_has_no_room_to_try_is_named():
    model = opened(ZOO["llama"].build().train(), home="host", dtype="bfloat16")
    layer = model.model.layers[0].mlp  # which is tried for all that are like it
    named = "where a block was tried with up to 3 rows of 5 tokens"
    with (
        before_forward(layer, lambda *_: torch.empty(1 << 44, dtype=torch.uint8, device="cuda")),
        pytest.raises(BudgetError, match=named),
    ):
        model(**ZOO["llama"].batch(rows=4, length=5))
    model(**ZOO["llama"].batch(rows=4, length=5)).loss.backward()


def test_what_libraries_take_is_taken_before_memory_is_planned():
    """Products of forwards and of backwards: on another thread, with another workspace."""
    device = CudaDevice()
    free, taken = device.free_bytes(), device.taken_bytes()
    value = torch.ones(8, 8, device="cuda", requires_grad=True)
    (value @ value).sum().backward()
    del value
    assert (device.free_bytes(), device.taken_bytes()) == (free, taken)


def test_a_block_leaves_the_device_where_a_row_alone_is_too_much():
    """Its gradient, its moments and its pending update go with it; it is updated by the host from then on."""
    expected = trained(home="device")
    model = opened(
        ZOO["llama_tied"].build().train(),
        home="device",
        dtype="bfloat16",
        pins=Pins(tile_rows=1),
        on_device_full="retry",
    )
    optimizer = outsize.AdamW(model, lr=3e-3, max_grad_norm=0.1)
    losses = []

    def greedy(module, args):
        if losses and len({block for block, _ in placement_of(model).at(Home.DEVICE)}) > 3:
            torch.empty(1 << 44, dtype=torch.uint8, device="cuda")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(greedy)
    for step in range(STEPS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = model(**ZOO["llama_tied"].batch(rows=4, length=10, seed=step)).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    assert losses == pytest.approx(expected[0], rel=2e-2)
    assert outsize.report(model).stepped_down and outsize.report(model).bytes_down > 0
    close(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gives_the_same_bits_in_every_placement(attention, tmp_path):
    """And keeps packed documents apart, which in transformers it does in batches of one row only."""
    ZOO["llama"].build(head_dim=32).save_pretrained(tmp_path / "model")
    ids = torch.randint(4, 190, (3, 24), generator=torch.Generator().manual_seed(0))
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(24).remainder(8).repeat(3, 1)}

    def run(attention, home):
        try:
            model = outsize.load(
                tmp_path / "model", home=home, disk=tmp_path, dtype="bfloat16", attention=attention
            )
        except ConfigError as error:
            pytest.skip(str(error))
        optimizer = outsize.AdamW(model.train(), lr=3e-3)
        losses = []
        for _ in range(STEPS):
            loss = model(**packed).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        close(model)
        return losses

    losses = run(attention, "host")
    assert losses == run(attention, "host") == run(attention, "disk")
    assert losses == pytest.approx(run("sdpa", "host"), rel=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16"] if IS_SHORT else ["float32", "bfloat16"])
def test_compiled_layers_give_the_same_bits_in_every_placement(dtype, tmp_path):
    expected = trained(dtype=dtype, home="host", compile=True)
    for options in (
        {"home": "disk", "pins": Pins(weight_slots=1)},
        {"home": "host", "pins": Pins(inputs="host")},
    ):
        losses, values = trained(dtype=dtype, disk=tmp_path, compile=True, **options)
        assert losses == expected[0]
        assert all(torch.equal(values[name], expected[1][name]) for name in values)
    assert expected[0] == pytest.approx(trained(dtype=dtype, home="host")[0], rel=2e-2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_the_device_had_no_memory_for_is_computed_in_smaller_tiles(direction):
    """A real allocation fails, once in a forward and once in the thread that autograd goes back in."""
    expected = trained(home="host")
    model = opened(ZOO["llama_tied"].build().train(), home="host", dtype="bfloat16", on_device_full="retry")
    optimizer = outsize.AdamW(model, lr=3e-3, max_grad_norm=0.1)
    calls = []

    def greedy(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            torch.empty(1 << 44, dtype=torch.uint8, device="cuda")

    def watch(module, args):
        if direction == "forward":
            greedy()
        elif args[0].requires_grad:
            args[0].register_hook(greedy)

    undo = ExitStack()
    undo.enter_context(before_forward(model.model.layers[1].mlp, watch))
    losses = []
    for step in range(STEPS):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loss = model(**ZOO["llama_tied"].batch(rows=4, length=10, seed=step)).loss
            loss.backward()
        assert len([each for each in said if "2 rows" in str(each.message)]) == (step == 0)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    undo.close()
    assert losses == pytest.approx(expected[0], rel=2e-2) and outsize.report(model).stepped_down
    close(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rule_on_the_device_is_that_of_the_host(dtype):
    """To the last bits: a GPU fuses multiplications and additions."""
    on_device, on_host = trained(dtype=dtype, home="device"), trained(dtype=dtype, home="host")
    assert on_device[0] == pytest.approx(on_host[0], rel=2e-2 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_that_is_not_compiled_takes_no_more_than_the_slack(rule, monkeypatch):
    """Which no plan uses, whatever the size of a block."""
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    kernel = gpu_kernel(rule, ComputeType.BFLOAT16, torch.device("cuda"))
    sizes = rule.element_bytes(ComputeType.BFLOAT16)
    weight, *state, gradient = (
        torch.zeros(int((1 << 23) * sizes[plane]) // dtype.itemsize, dtype=dtype, device="cuda")
        for plane, dtype in rule.dtypes(ComputeType.BFLOAT16).items()
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernel(weight, state, gradient, (1.0,) * len(rule.scalars))
    assert torch.cuda.max_memory_allocated() - before < DEVICE_SLACK_BYTES


@pytest.mark.parametrize("first", [0, 1])
def test_groups_of_one_block_with_homes_of_their_own_give_the_same_bits(first, tmp_path, monkeypatch):
    """Every second group lives in the host's memory, the others on the disk: each block has another mixture of them."""
    expected = trained(home="host", pins=Pins(weight_slots=2))
    mixtures = set()

    def mixed(run, options):
        records, homes = run.args[0], dict(run().homes)
        homes |= {key: Home.HOST for key in sorted(homes)[first::2]}
        mixtures.update(tuple(homes[record.name, group] for group in GROUPS) for record in records)
        return lay_out(records, homes, (2, 1), Home.HOST)

    around_placing(monkeypatch, mixed)
    losses, values = trained(disk=tmp_path, home="disk", pins=Pins(weight_slots=2))
    assert len(mixtures) > 1
    assert losses == expected[0]
    assert all(torch.equal(values[name], expected[1][name]) for name in values)
