"""Inputs of blocks on disk: the same bits, a few blocks' inputs in memory, and errors of the disk that are named."""

import gc
import os
import time
import weakref

import pytest
import torch
from torch import nn

import outsize
from outsize import Pins
from outsize.config import Home
from outsize.errors import BudgetError, ConfigError, CorruptionError, StorageError, UsageError
from outsize.plan import memory_estimate
from outsize.plan.ledger import Purpose
from outsize.plan.memory_estimate import estimate
from outsize.store import offload
from outsize.tier import DoneTransfer, HostDevice, Verb
from tests.doubles import Fault, FaultKind, FaultyTier, MemoryTier, SlowTier, TwinDevice
from tests.pairs import pairwise
from tests.promises.test_placement import Run, assert_same_bits, small_chunks, trained
from tests.running import adamw, assert_same_losses, assert_same_weights, opened, train
from tests.seams import (
    abandon,
    activation_offload,
    arena_of,
    around_placing,
    budget_of,
    close,
    close_unchecked,
    computes_on_host,
    current_call,
    file_of_inputs,
    has_memory,
    move_small_inputs,
    placement_of,
    planned_bytes,
    set_activations,
    set_fewest_tile_tokens,
    tile_rows_placed,
    use_tiles_as_placed,
    watch_inputs_leaving,
    wrapped_disk,
)
from tests.zoo import ZOO

__all__ = ["small_chunks"]  # a fixture for all tests here

ON_DISK = Pins(inputs="disk", weight_slots=1, gradient_slots=1)


@pytest.fixture(autouse=True)
def small_inputs(monkeypatch):
    """Inputs of tiny models move, in several parts."""
    move_small_inputs(monkeypatch, part_bytes=4096)


def llama(tmp_path, **options):
    return opened(ZOO["llama"].build().train(), **{"disk": tmp_path, "pins": ON_DISK, **options})


@pairwise(
    name=["llama_tied", "mixtral", "t5", "albert", "vit", "llava"],
    dtype=["float32", "bfloat16"],
    home=["host", "disk"],
)
def test_inputs_on_disk_change_no_bit(home, name, dtype, tmp_path, monkeypatch):
    run = Run(name, dtype, accumulation=2, tile_rows=1)
    pins = Pins(inputs="disk", tile_rows=1, weight_slots=1)
    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, lambda verb, label: 0.001)) as tiers:
        losses, values, report = trained(run, disk=tmp_path, home=home, pins=pins)
    assert_same_bits(run, losses, values)
    assert report.off_plan == () and len(tiers) == (2 if home == "disk" else 1)
    assert any(row.tier == "disk" and row.what == "inputs of blocks" for row in report.rows)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_some_inputs_on_disk_and_some_graphs_kept(name, tmp_path):
    run = Run(name, "float32", accumulation=2)
    pins = Pins(inputs="disk", kept_blocks=2, weight_slots=1)
    losses, values, _ = trained(run, disk=tmp_path, home="disk", pins=pins)
    assert_same_bits(run, losses, values)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_is_that_of_plain_pytorch(name, tmp_path):
    plain = ZOO[name].build().train()
    model = opened(plain, disk=tmp_path, home="disk", pins=ON_DISK)
    batches = [[ZOO[name].batch(seed=2 * i + part) for part in range(2)] for i in range(5)]
    assert_same_losses(train(model, batches), train(plain, batches))
    assert_same_weights(model, plain)


@pytest.mark.parametrize("verb", list(Verb))
@pytest.mark.parametrize("block", ["L00", "L01"])
def test_one_slow_input_is_waited_for(verb, block, tmp_path, monkeypatch):
    """Longer than many blocks take: a missing wait would find what was there before."""

    def delay(kind, label):
        return 0.03 if kind is verb and label.startswith(f"{block}.input") else 0.0

    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)):
        run = Run("llama", "float32")
        losses, values, _ = trained(run, disk=tmp_path, home="host", pins=Pins(inputs="disk"))
    assert_same_bits(run, losses, values)


def moved(model):
    stats = activation_offload(model).stats()
    return stats.bytes_written, stats.bytes_read


def test_each_input_goes_to_the_disk_once_and_comes_back_once(tmp_path, monkeypatch):
    labels = []

    def note(verb, label):
        if ".input" in label:
            labels.append((verb, label))
        return 0.0

    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, note)):
        model = llama(tmp_path)
        batch = ZOO["llama"].batch(rows=8, length=16)
        model(**batch).loss.backward()
        activation_offload(model).begin()  # all is written
    each = 8 * 16 * 32 * 4
    parts = each // 4096
    inputs = ["L00", "L01", "L02", "norm"]
    written = [label for verb, label in labels if verb is Verb.WRITE]
    assert sorted(written) == sorted(f"{block}.input[{part}]" for block in inputs for part in range(parts))
    read = [label for verb, label in labels if verb is Verb.READ]
    # The last two visits' inputs are in memory still.
    assert sorted(read) == sorted(f"{block}.input[{part}]" for block in inputs[:2] for part in range(parts))
    assert moved(model) == (4 * each, 2 * each)
    report = outsize.report(model)
    assert report.bytes_written >= 4 * each and report.bytes_read >= 2 * each


def test_what_several_visits_share_is_stored_and_read_once(tmp_path, monkeypatch):
    """The decoder's layers all take what the encoder returned."""
    labels = []

    def note(verb, label):
        labels.append((verb, label.partition("[")[0]))
        return 0.0

    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, note)):
        move_small_inputs(monkeypatch, part_bytes=1 << 20)
        plain = ZOO["t5"].build(num_layers=3).train()
        model = opened(plain, disk=tmp_path, home="host", pins=Pins(inputs="disk"))
        model(**ZOO["t5"].batch()).loss.backward()
    written = [label for verb, label in labels if verb is Verb.WRITE]
    read = [label for verb, label in labels if verb is Verb.READ]
    assert len(read) <= len(written)
    first = next(
        label for label in written if written.count(label) == 2
    )  # its own input, and the encoder's output
    assert read.count(first) <= 2


def test_memory_for_inputs_does_not_grow_with_depth(tmp_path):
    """What is planned, and what is in use: places on the disk grow with depth, and memory does not."""
    needs = []
    for depth in (4, 12):
        model = opened(
            ZOO["llama"].build(num_hidden_layers=depth).train(), disk=tmp_path, home="host", pins=ON_DISK
        )
        model(**ZOO["llama"].batch(rows=16, length=16)).loss.backward()
        call, placement, keeper = current_call(model), placement_of(model), activation_offload(model)
        here = Home.HOST if computes_on_host(model) else Home.DEVICE
        inputs, stay = (
            estimate(call.workload, call.shape, 16, here, home)[here, Purpose.ACTIVATIONS]
            for home in (placement.inputs, here)
        )
        needs.append((inputs, stay, keeper.high_water_bytes))
        each = 16 * 16 * 32 * 4
        assert keeper.high_water_bytes == (depth + 1) * each
        assert keeper.high_water_bytes <= placement.inputs_bytes
        assert (
            keeper.arena.in_use_bytes
            == planned_bytes(model)["inputs"]
            == memory_estimate.input_buffers_bytes()
        )
        close(model)
    assert needs[1][1] - needs[0][1] == 8 * each and needs[1][0] == needs[0][0] < needs[1][1]


def test_sources_are_let_go_two_visits_later(tmp_path, monkeypatch):
    """Whatever the depth, however slow the disk: the forward waits instead of piling inputs up."""
    seen = []
    watch_inputs_leaving(monkeypatch, seen.append)
    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, lambda verb, label: 0.002)):
        plain = ZOO["llama"].build(num_hidden_layers=8).train()
        model = opened(plain, disk=tmp_path, home="host", pins=ON_DISK)
        loss = model(**ZOO["llama"].batch()).loss
    assert len(seen) == 9 and max(seen) == 2
    loss.backward()


def test_a_graph_that_is_dropped_gives_its_places_back(tmp_path):
    model = llama(tmp_path, home="host")
    batch = ZOO["llama"].batch()
    loss = model(**batch).loss
    keeper = activation_offload(model)
    full = keeper.in_use_bytes
    assert full > 0
    del loss
    assert keeper.in_use_bytes == 0
    for _ in range(3):
        model(**batch).loss.backward()
    assert keeper.in_use_bytes == 0 and keeper.high_water_bytes == full
    for length in (12, 7, 11, 9):  # places of other lengths are made of them
        model(**ZOO["llama"].batch(length=length)).loss.backward()
    assert keeper.high_water_bytes == full


def test_two_graphs_at_once_are_an_error_that_says_what_to_do(tmp_path):
    model = llama(tmp_path, home="host")
    batch = ZOO["llama"].batch(rows=32, length=16)
    first = model(**batch).loss
    with pytest.raises(BudgetError, match="in use") as caught:
        model(**batch)
    assert "backward()" in str(caught.value.hint)
    first.backward()
    gc.collect()
    model(**batch).loss.backward()


def test_of_two_graphs_at_once_each_brings_its_own_inputs_back(tmp_path):
    model = llama(tmp_path, home="host")
    model(**ZOO["llama"].batch(rows=8, length=16)).loss.backward()  # room for both
    batch = ZOO["llama"].batch(rows=4, length=16)
    graphs = [model(**batch).loss for _ in range(2)]
    activation_offload(model).release()  # all is written, and gone from memory
    each = 4 * 16 * 32 * 4
    for loss in graphs:
        before = moved(model)[1]
        loss.backward()
        del loss
        assert moved(model)[1] - before == 4 * each


def test_going_back_twice_reads_again(tmp_path):
    model = llama(tmp_path, home="host")
    optimizer = adamw(model)
    loss = model(**ZOO["llama"].batch()).loss
    loss.backward(retain_graph=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)
    optimizer.zero_grad()
    late = model(**ZOO["llama"].batch()).loss
    close(model)
    with pytest.raises(UsageError):
        late.backward()


ERRORS = {FaultKind.EIO: StorageError, FaultKind.SHORT: StorageError, FaultKind.CORRUPTION: CorruptionError}


@pytest.mark.parametrize("kind", list(ERRORS))
def test_an_input_that_cannot_be_read_is_a_named_error(kind, tmp_path, monkeypatch):
    fault = Fault(kind, Verb.READ, label="L00.input", nth=1)
    with wrapped_disk(monkeypatch, lambda disk: FaultyTier(disk, [fault])) as tiers:
        model = llama(tmp_path, home="host")
        optimizer = adamw(model)
        with pytest.raises(ERRORS[kind], match=r"L00\.input"):
            model(**ZOO["llama"].batch()).loss.backward()
        assert tiers[0].num_faults == 1
        gc.collect()
        optimizer.zero_grad()
        model(**ZOO["llama"].batch()).loss.backward()  # the disk is well again, and so is everything else
        assert activation_offload(model).in_use_bytes == 0


def test_an_input_that_cannot_be_written_is_a_named_error(tmp_path, monkeypatch):
    fault = Fault(FaultKind.ENOSPC, Verb.WRITE, label="L01.input", nth=1)
    with wrapped_disk(monkeypatch, lambda disk: FaultyTier(disk, [fault])):
        model = llama(tmp_path, home="host")
        with pytest.raises(StorageError, match=r"L01\.input.*No space left"):
            model(**ZOO["llama"].batch())
        gc.collect()
        model.zero_grad()
        model(**ZOO["llama"].batch()).loss.backward()


def test_bits_that_flip_on_the_disk_are_found(tmp_path):
    model = llama(tmp_path, home="host")
    loss = model(**ZOO["llama"].batch()).loss
    activation_offload(model).begin()  # all are written
    with file_of_inputs(model).open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptionError, match=r"\.input"):
        loss.backward()
    abandon(model)


class Careless(nn.Module):
    """Changes the input of one layer after the layer has run."""

    def __init__(self, changes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.changes = changes

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            before = x * 1.0
            x = layer(before)
            if index == self.changes:
                before += 1.0
        return x.square().mean()


@pytest.mark.parametrize("layer", [1, 5])
def test_an_input_that_is_changed_in_place_is_a_named_error(layer, tmp_path):
    """Whether it is in memory still when it is needed, or not."""
    model = opened(Careless(layer), disk=tmp_path, home="host", pins=ON_DISK)
    with pytest.raises(UsageError, match=rf"L0{layer}\.input.*changed in place"):
        model(torch.ones(2, 8)).backward()


class Changing(nn.Module):
    """Changes the input of a layer in place, and gives it to another."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        first, second, third, fourth, last = self.layers
        changed = first(x)
        early = fourth(third(second(changed)))
        changed.add_(1.0)
        return (early.square() + last(changed).square()).mean()


class Copying(Changing):
    """The same, with a tensor of its own for each."""

    def forward(self, x):
        first, second, third, fourth, last = self.layers
        before = first(x)
        return (fourth(third(second(before))).square() + last(before + 1.0).square()).mean()


def test_an_input_that_is_changed_between_two_visits_is_two_inputs(tmp_path):
    plain = Copying()
    changing = Changing()
    changing.load_state_dict(plain.state_dict())
    model = opened(changing, disk=tmp_path, home="host", pins=ON_DISK)
    plain(torch.ones(2, 8)).backward()
    model(torch.ones(2, 8)).backward()
    for own, expected in zip(model.layers, plain.layers, strict=True):
        assert torch.allclose(own.weight.grad, expected.weight.grad)


def test_the_folder_may_hold_so_much_and_no_more(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    for disk in (f"{tmp_path}:8KiB", [(folder, "8KiB") for folder in folders]):
        with pytest.raises(BudgetError, match="inputs of blocks") as caught:
            train(llama(tmp_path, disk=disk, home="host"), [ZOO["llama"].batch()])
        size = str(caught.value.hint).rpartition(":")[2].split('"')[0]
        disk = f"{tmp_path}:{size}" if isinstance(disk, str) else [(folder, size) for folder in folders]
        train(llama(tmp_path, disk=disk, home="host"), [ZOO["llama"].batch()])
    with pytest.raises(ConfigError, match="without a folder"):
        opened(ZOO["llama"].build(), pins=Pins(inputs="disk"))
    with pytest.raises(ConfigError, match="inputs='ssd'"):
        Pins(inputs="ssd")


def test_a_disk_that_is_full_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    def full(fd, offset, num_bytes):
        raise OSError(28, "No space left on device")

    model = llama(tmp_path, home="host")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match="the store needs"):
            model(**ZOO["llama"].batch())
    assert not has_memory(model) and activation_offload(model) is None


def attempts_of(model, room, monkeypatch, **options):
    """Where inputs wait, and rows of a tile, where blocks compute in `room` bytes beside the arenas."""

    def limited(workload, shape, tile_rows, inputs=None, kept=frozenset()):
        here, there = Home.HOST if computes_on_host(model) else Home.DEVICE, inputs or Home.DISK
        moved = estimate(workload, shape, tile_rows, here, there, kept)[there, Purpose.INPUTS]
        boundary, visit = (1000, 100 * tile_rows) if inputs is None else (200, 100 * tile_rows)
        short = 1 << 50 if boundary + visit > room else 0
        return (boundary + short, visit, moved) if inputs else (boundary + short, visit)

    with monkeypatch.context() as patch:
        set_activations(patch, limited)
        use_tiles_as_placed(patch)
        model(**ZOO["llama"].batch(rows=8, length=options.get("length", 12)))
    return placement_of(model).inputs, tile_rows_placed(model)


@pytest.mark.parametrize(
    ("room", "fewest", "expected"),
    [
        (1900, 12, (None, 8)),  # all fits
        (1500, 12, (None, 4)),  # with smaller tiles
        (1000, 24, ("disk", 8)),  # inputs have to go, and then large tiles fit
        (500, 24, ("disk", 2)),
        (1150, 24, ("disk", 8)),  # rather than tiles of one row
        (1150, 12, (None, 1)),  # tiles of one row are large enough
    ],
)
def test_inputs_go_to_the_disk_before_tiles_become_too_small(room, fewest, expected, tmp_path, monkeypatch):
    set_fewest_tile_tokens(monkeypatch, fewest)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="host")
    if not computes_on_host(model):
        pytest.skip("a device tries the host's memory first")
    assert attempts_of(model, room, monkeypatch) == expected
    close(model)


def test_without_a_disk_tiles_become_as_small_as_they_must(monkeypatch):
    set_fewest_tile_tokens(monkeypatch, 24)
    model = opened(ZOO["llama"].build().train(), home="host")
    if not computes_on_host(model):
        pytest.skip("a device tries the host's memory first")
    assert attempts_of(model, 1150, monkeypatch) == (None, 1)
    close(model)


def test_inputs_that_are_too_small_to_move_stay(tmp_path, monkeypatch):
    move_small_inputs(monkeypatch, 1 << 20)
    model = llama(tmp_path, home="host")
    model(**ZOO["llama"].batch()).loss.backward()
    assert activation_offload(model) is None and placement_of(model).inputs is None


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("device", [HostDevice(), TwinDevice(delay_s=lambda way, label: 0.002)])
def test_tensors_come_back_as_they_were(device, is_planned):
    """Of all types and lengths, also those that are no whole page; and those that no plan sends."""
    keeper = offload.ActivationOffload(device, 1 << 20, MemoryTier(1 << 20))
    generator = torch.Generator().manual_seed(0)
    saved = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for count in (1, 1000, 4097, 9999):
            tensor = torch.randn(count, generator=generator).to(dtype).requires_grad_()
            with keeper.keep([tensor], "L00"):
                if is_planned:
                    keeper.send("L00")
                saved.append((tensor.square(), tensor.detach().clone()))
            del tensor
    sizes, num_leaving = keeper.waiting()
    assert len(sizes) == len(saved) and num_leaving == (len(saved) if is_planned else 0)
    keeper.begin()
    for output, expected in reversed(saved):
        (inner,) = [fn for fn in (output.grad_fn,)]
        assert torch.equal(inner._saved_self, expected)
    del saved, output, inner
    assert keeper.in_use_bytes == 0
    keeper.close()
    keeper.close()


def test_the_plan_fetches_what_the_next_backward_needs():
    """Before autograd asks for it; what another visit needs is left where it is."""
    read = []
    disk = SlowTier(MemoryTier(1 << 20), lambda verb, label: read.append(label) or 0.0)
    keeper = offload.ActivationOffload(HostDevice(), 1 << 20, disk)
    outputs = {}
    for block in ("L00", "L01", "L02"):
        tensor = torch.full((2048,), 1.0, requires_grad=True)
        with keeper.keep([tensor], block):
            keeper.send(block)
            outputs[block] = tensor.square()
    last = weakref.ref(tensor)
    del tensor
    keeper.release()
    give_up_s = time.monotonic() + 60
    while (
        last() is not None and time.monotonic() < give_up_s
    ):  # a thread that wrote it may hold it a little longer
        time.sleep(0.001)
    read.clear()

    def unpack(block):
        return outputs[block].grad_fn._saved_self

    def blocks_read():
        return {label.partition(".")[0] for label in read}

    assert unpack("L02").sum() == 2048 and blocks_read() == {"L02"}
    keeper.fetch("L00")
    keeper.fetch("L01")
    give_up_s = time.monotonic() + 60
    while "L01" not in blocks_read() and time.monotonic() < give_up_s:
        time.sleep(0.001)
    assert blocks_read() == {"L01", "L02"}
    assert unpack("L01").sum() == 2048 and len(read) == len(set(read))
    assert blocks_read() == {"L01", "L02"}
    outputs.clear()
    keeper.close()


def test_a_place_is_used_again_when_its_last_owner_is_off_it():
    """A write that is late would overwrite what the next input leaves there."""
    delays = iter([0.1])
    disk = SlowTier(MemoryTier(1 << 20), lambda verb, label: next(delays, 0.0))
    keeper = offload.ActivationOffload(HostDevice(), 1 << 20, disk)
    saved = []
    for value in (1.0, 2.0):
        tensor = torch.full((1000,), value, requires_grad=True)
        with keeper.keep([tensor], "L00"):
            keeper.send("L00")
            saved.append(tensor.square())
        if value == 1.0:
            saved.clear()  # nobody wants it
    del tensor
    assert keeper.high_water_bytes == 4096
    keeper.begin()
    (output,) = saved
    assert torch.equal(output.grad_fn._saved_self, torch.full((1000,), 2.0))
    del output, saved
    keeper.close()


def test_a_place_whose_input_was_lost_is_given_back_when_nothing_writes_there_any_more():
    """One part fails at once, the other is late: it would overwrite what the next input leaves there."""
    delays = iter([0.1])
    slow = SlowTier(MemoryTier(1 << 20), lambda verb, label: next(delays, 0.0))
    disk = FaultyTier(slow, [Fault(FaultKind.EIO, Verb.WRITE, label="input[0]", nth=1)])
    keeper = offload.ActivationOffload(HostDevice(), 1 << 20, disk)
    tensor = torch.full((2048,), 1.0, requires_grad=True)
    with keeper.keep([tensor], "L00"):
        keeper.send("L00")
        lost = tensor.square()
    del tensor
    with pytest.raises(StorageError):
        keeper.begin()
    del lost
    tensor = torch.full((2048,), 2.0, requires_grad=True)
    with keeper.keep([tensor], "L01"):
        keeper.send("L01")
        output = tensor.square()
    del tensor
    assert keeper.high_water_bytes == 8192
    keeper.begin()
    time.sleep(0.15)
    assert torch.equal(output.grad_fn._saved_self, torch.full((2048,), 2.0))
    del output
    keeper.close()


def test_blocks_are_closed_though_inputs_cannot_be(tmp_path, monkeypatch):
    def fail():
        raise StorageError("no", hint="none")

    model = llama(tmp_path)
    model(**ZOO["llama"].batch()).loss.backward()
    keeper, arena = activation_offload(model), arena_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(keeper, "close", fail)
        with pytest.raises(StorageError):
            close_unchecked(model)
    assert arena.in_use_bytes == 0
    keeper.close()


def test_buffers_of_inputs_are_taken_from_what_is_left_for_arenas(tmp_path, monkeypatch):
    rooms = []

    def note(run, options):
        rooms.append(options["room"][Home.DEVICE])
        return run()

    around_placing(monkeypatch, note)
    model = llama(tmp_path, home="host")
    own = budget_of(model)
    if not computes_on_host(model):
        pytest.skip("a device has a budget of its own")
    model(**ZOO["llama"].batch())
    planned = planned_bytes(model)
    assert own.limits.room_bytes(Home.HOST) - planned["activations"] - planned["inputs"] in rooms
    assert (
        planned["host"]
        >= own.limits.taken.total(Home.HOST)
        + own.placement.bytes_in(Home.DEVICE)
        + memory_estimate.input_buffers_bytes()
    )


def test_places_are_used_again_and_merged():
    places = offload.Places(5 * 4096)
    first, second, third = (places.take(size, "x") for size in (4096, 5000, 4096))
    with pytest.raises(BudgetError, match="in use"):
        places.take(8192, "x")
    places.give(first, DoneTransfer())
    assert places.take(100, "x") == first
    places.give(first, DoneTransfer())
    places.give(second, DoneTransfer())
    merged = places.take(3 * 4096, "x")
    assert (merged.offset, places.in_use_bytes, places.high_water_bytes) == (0, 4 * 4096, 4 * 4096)
    places.give(merged, DoneTransfer())
    places.give(third, DoneTransfer())
    assert places.take(5 * 4096, "x").num_bytes == 5 * 4096


def test_the_pin_is_read_from_the_command_line():
    from outsize.cli.options import pins_of

    assert pins_of(["inputs=disk", "kept_blocks=2"]) == Pins(inputs="disk", kept_blocks=2)
    with pytest.raises(ConfigError, match="device or host or disk"):
        pins_of(["inputs=ssd"])
