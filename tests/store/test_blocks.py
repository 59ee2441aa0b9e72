"""The store of blocks: exact masters, planes where the placement says, and what a layer hands out."""

import gc

import pytest
import torch
from torch import nn

import outsize
from outsize import Pins
from outsize.block import Plane
from outsize.config import Home
from outsize.optim import join
from outsize.store import finalizers, memory
from tests.running import adamw, assert_same_weights, opened, train
from tests.seams import flush, placement_of, settle_updates, store_of
from tests.zoo import ZOO, plain_batch, seeded


@pytest.mark.parametrize("from_files", [False, True])
def test_a_master_begins_with_every_bit_of_the_source(from_files, tmp_path):
    """Weight and remainder together are the fp32 value, also after a first update that changes nothing."""
    plain = ZOO["llama_tied"].build().train()
    if from_files:
        plain.save_pretrained(tmp_path)
        model = outsize.load(tmp_path, home="host", dtype="bfloat16").train()
    else:
        model = opened(plain, home="host", dtype="bfloat16")
    optimizer = adamw(model, lr=0.0, weight_decay=0.0)
    train(model, [ZOO["llama_tied"].batch()], optimizer)
    settle_updates(model)
    flush(model)
    store = store_of(model)
    seen = 0
    for state in store:
        weight = state.planes.weights()
        remainder = state.planes.at_home(Plane.REMAINDER)
        for entry in state.record.entries:
            piece = entry.piece
            expected = plain.get_parameter(piece.parameter).detach()
            expected = expected if piece.is_whole else expected[piece.row_start : piece.row_stop]
            master = join(weight[entry.start : entry.stop], remainder[entry.start : entry.stop])
            assert torch.equal(master, expected.reshape(-1)), piece
            seen += entry.stop - entry.start
    assert seen == plain.num_parameters()


def test_small_steps_are_not_lost_in_bf16(tmp_path):
    """A step far below the resolution of bf16 adds up in the master."""
    plain = ZOO["llama"].build().train()
    model = opened(plain, disk=tmp_path, home="disk", dtype="bfloat16")
    optimizer = adamw(model, lr=1e-4, eps=1e-8, weight_decay=0.0)
    before = model.model.norm.weight.detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        model(**ZOO["llama"].batch(rows=1, length=4)).loss.backward()
        optimizer.step()
    moved = (model.model.norm.weight.detach().clone() - before).abs().float()
    assert float(moved.mean()) > 1e-3


def test_planes_live_where_the_placement_says(tmp_path):
    pins = Pins(resident_bytes=100_000)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, pins=pins)
    train(model, [ZOO["llama"].batch()])
    placement = placement_of(model)
    kinds = set()
    for state in store_of(model):
        for plane in (Plane.WEIGHT, Plane.GRADIENT, *state.record.state):
            is_resident = placement.home(state.name, plane.group) is Home.DEVICE
            kinds.add(is_resident)
            assert (plane in state.planes.regions) is is_resident
    assert kinds == {True, False}


class Positions(nn.Module):
    """Hands out rows of its own table: a view of what Outsize keeps in a slot."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return self.table[: x.shape[1]]


class Placed(nn.Module):
    """Positions are computed first and used last, when their slot holds other weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Positions(), *(nn.Linear(8, 8) for _ in range(3))])

    def forward(self, x, y):
        x = x[:, None].expand(-1, 5, -1)
        positions = self.layers[0](x)
        for layer in self.layers[1:]:
            x = x + layer(x).tanh()
        return ((x + positions).mean((1, 2)) - y[:, 0]).square().mean()


@pytest.mark.parametrize("grads", [True, False])
def test_an_output_that_is_a_view_of_a_weight_outlives_its_slot(grads, tmp_path):
    with seeded(0):
        plain = Placed()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    for subject in (model, plain):
        train(subject, [plain_batch(seed=seed) for seed in range(2)])
    assert_same_weights(model, plain)
    with torch.set_grad_enabled(grads):
        assert torch.allclose(model(**plain_batch()), plain(**plain_batch()), rtol=1e-6)


class Biased(nn.Module):
    """As in T5: every layer is given a bias that has no batch, and that trains."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, bias):
            return x + (self.linear(x) + bias).tanh()

    def __init__(self):
        super().__init__()
        self.bias = nn.Linear(8, 8)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x, y):
        bias = self.bias(torch.ones(1, 8))
        for layer in self.layers:
            x = layer(x, bias)
        return (x[:, :1] - y).square().mean()


@pytest.mark.parametrize("tile_rows", [1, 2, None])
def test_an_input_without_a_batch_gets_the_gradients_of_all_tiles(tile_rows, tmp_path):
    with seeded(0):
        plain = Biased()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(tile_rows=tile_rows))
    for subject in (model, plain):
        train(subject, [plain_batch(rows=5, seed=seed) for seed in range(3)])
    assert_same_weights(model, plain)


@pytest.fixture
def freed_bytes():
    """64 MiB of tensors of 1 to 32 MiB that were allocated and freed, with small ones between that live on."""
    gc.collect()
    finalizers.finish()  # closing what earlier tests dropped gives freed memory back, whenever it happens
    memory.keep_freed_memory()
    memory.give_back()
    before = memory.resident_bytes()
    tensors = [torch.ones(size << 18) for size in (1, 2, 4, 8, 17, 32)]
    kept = torch.ones(1 << 10)
    del tensors
    yield memory.resident_bytes() - before
    del kept


def test_memory_that_is_freed_is_handed_out_again(freed_bytes):
    assert freed_bytes > 60 << 20
    before = memory.resident_bytes()
    tensor = torch.ones(17 << 18)
    # Other threads of the process may take a little meanwhile.
    assert memory.resident_bytes() - before < tensor.nbytes / 2, "it came from the system"
    del tensor


def test_below_the_ceiling_freed_memory_is_kept(freed_bytes):
    now = memory.resident_bytes()
    ceiling = memory.Ceiling(now + (8 << 20))
    ceiling.make_room(4 << 20)
    assert ceiling.num_times == 0 and memory.resident_bytes() > now - (1 << 20)


def test_freed_memory_makes_room_below_the_ceiling(freed_bytes):
    now = memory.resident_bytes()
    ceiling = memory.Ceiling(now + (8 << 20))
    ceiling.make_room(16 << 20)
    assert ceiling.num_times == 1 and memory.resident_bytes() < now - (48 << 20)
