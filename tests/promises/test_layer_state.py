"""What a layer changes in its own forward moves once per call, as in plain PyTorch, or is refused by name."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import outsize
from outsize import Pins
from outsize.errors import UsageError
from tests.running import adamw, assert_same_losses, assert_same_weights, opened
from tests.seams import current_call, has_memory

WIDTH, ROWS = 8, 6


class Normed(nn.Module):
    """Running statistics, and their counter."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + self.norm(self.linear(x))


class Balanced(nn.Module):
    """A router's bias that balances the load, read in the same forward."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x):
        scores = self.gate(x).sigmoid()
        chosen = (scores + self.bias).argmax(-1)
        if self.training:
            load = torch.bincount(chosen, minlength=4).float()
            self.bias = self.bias + 0.05 * (load.mean() - load).sign()
        return x + self.experts(x) * scores.gather(1, chosen.unsqueeze(1))


class Codebook(nn.Module):
    """Codes that follow what is given to them, in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.randn(5, WIDTH))

    def forward(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(-1)
        codes = self.codes[nearest]
        if self.training:
            self.codes.index_add_(0, nearest, 0.1 * (x.detach() - codes))
        return self.linear(x + codes)


class Counting(nn.Module):
    """Attributes: a number, a list, a dict of tensors, an object."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.rows, self.sums = 0, [], {"all": torch.zeros(())}

    def forward(self, x):
        self.calls += 1
        self.rows.append(x.shape[0])
        self.sums["all"] += x.detach().sum()
        return self.linear(x) / self.calls + 0.01 * self.sums["all"]


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.linear(x)


class OldSpectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.linear(x)


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with pytest.warns(FutureWarning):
            self.linear = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.linear(x)


class Drawing(nn.Module):
    """Random numbers from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(WIDTH, WIDTH), torch.Generator().manual_seed(3)

    def forward(self, x):
        return self.linear(x) * torch.rand(x.shape, generator=self.generator)


class DrawingElsewhere(nn.Module):
    """Random numbers from Python and numpy, from generators of its own and those of the process."""

    def __init__(self):
        super().__init__()
        self.linear, self.own = nn.Linear(WIDTH, WIDTH), random.Random(3)
        self.array = np.random.default_rng(4)

    def forward(self, x):
        x = self.linear(x) * (random.random() + self.own.random())
        return x * torch.tensor(np.random.rand(WIDTH) + self.array.random(WIDTH), dtype=x.dtype)


class Net(nn.Module):
    """Three layers of a kind, and state beside them."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.register_buffer("seen", torch.zeros(()))
        self.steps = 0

    def forward(self, x):
        self.seen += x.shape[0]
        self.steps += 1
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


KINDS = [
    Normed,
    Balanced,
    Codebook,
    Counting,
    Spectral,
    OldSpectral,
    OldWeightNorm,
    Drawing,
    DrawingElsewhere,
]


def made(kind):
    torch.manual_seed(0)
    return Net(kind).train()


def state_of(model):
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        for name in ("calls", "rows", "sums", "steps"):
            if name in vars(module):
                found[f"{path}.{name}"] = copy.deepcopy(vars(module)[name])
        if isinstance(module, Drawing):
            found[f"{path}.generator"] = module.generator.get_state()
        if isinstance(module, DrawingElsewhere):
            found[f"{path}.own"] = copy.deepcopy(module.own).random()
            found[f"{path}.array"] = copy.deepcopy(module.array).random()
    return found


def assert_same_state(model, plain):
    ours, theirs = state_of(model), state_of(plain)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, WIDTH, generator=generator) + 1 for _ in range(5)]


def trained(model):
    """Steps, one of two accumulated batches, an evaluation between, and a call without gradients in training."""
    optimizer, losses = adamw(model), []
    for number, x in enumerate(batches()):
        loss = model(x)
        loss.backward()
        losses.append(float(loss.detach()))
        if number == 1:
            continue
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(model.eval()(x)))
            losses.append(float(model.train()(x)))
    return losses


@pytest.mark.parametrize(
    "pins", [Pins(tile_rows=2, kept_blocks=0), Pins(kept_blocks=2)], ids=["again", "kept"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_moves_once_per_call(kind, pins):
    plain, model = made(kind), outsize.wrap(made(kind), pins=pins)
    losses = []
    for some in (model, plain):
        random.seed(1)
        np.random.seed(2)
        losses.append(trained(some))
    assert_same_losses(*losses)
    assert_same_state(model, plain)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("kind", [Normed, Counting])
def test_a_forward_that_nothing_follows_moves_it_once(kind):
    plain = made(kind)
    model = opened(plain, pins=Pins(tile_rows=2))
    with torch.no_grad():
        for x in batches()[:2]:
            torch.testing.assert_close(model(x), plain(x))
            assert_same_state(model, plain)


class Twice(nn.Module):
    """One layer, visited twice: each visit is computed again from where it started."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Balanced()])

    def forward(self, x):
        return self.layers[0](self.layers[0](x)).square().mean()


def test_a_layer_that_is_visited_twice_moves_it_twice():
    torch.manual_seed(0)
    plain = Twice().train()
    model = opened(plain, pins=Pins(kept_blocks=0))
    for some in (model, plain):
        (some(batches()[0]) + some(batches()[1])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.clone(), plain.get_parameter(name).grad)
    assert_same_state(model, plain)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.penalty = self.linear(x).square().mean()
        return x + self.linear(x)


def test_a_loss_that_a_layer_keeps_beside_its_output_is_refused():
    """The tensor has no gradient outside of the visit: a penalty would train nothing."""
    model = opened(made(Remembering))
    with pytest.raises(UsageError, match=r"layers\.0 keeps a tensor with a gradient in penalty"):
        model(batches()[0])
    assert not has_memory(model) and "penalty" not in vars(model.layers[0])
    with torch.no_grad():
        model(batches()[0])


class Lazy(nn.Module):
    """A table that is made in the first forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, WIDTH)
        return x + self.linear(x) * self.table


def test_what_is_made_once_does_not_keep_a_layer_from_being_cut():
    model = outsize.wrap(made(Lazy), pins=Pins(tile_rows=2))
    model(batches()[0]).backward()
    call = current_call(model)
    assert not call.workload.changing and all(call.workload.dims.values())
