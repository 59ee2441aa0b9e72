"""Hooks of users see each call once, with its own numbers; hooks that compute do so in a recomputation too."""

import pytest
import torch
from torch import nn

from outsize import Pins
from tests.running import opened
from tests.zoo import ZOO

WIDTH, ROWS = 8, 5


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, scale=1.0):
        return x + self.down(torch.tanh(self.up(x))) * scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x.square().mean()


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net()


PINS = [Pins(tile_rows=2, kept_blocks=0), Pins(kept_blocks=2)]
both = pytest.mark.parametrize("pins", PINS, ids=["again", "kept"])


def x_of():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def compared(plain, pins, register):
    """What hooks that `register` puts on each model note in a step and an evaluation, ours and plain; gradients agree."""
    model, found = opened(plain, pins=pins), []
    for some in (model, plain):
        notes = []
        handles = register(some, notes)
        some(x_of()).backward()
        with torch.no_grad():
            some(x_of())
        for handle in handles:
            handle.remove()
        found.append(notes)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.clone(), plain.get_parameter(name).grad)
    return found


@both
@pytest.mark.parametrize("at", ["", "layers.1", "layers.1.down"])
def test_a_hook_that_looks_on_sees_each_call_once(plain, pins, at):
    def register(model, notes):
        module = model.get_submodule(at)
        return [
            module.register_forward_pre_hook(lambda module, args: notes.append(args[0].detach().clone())),
            module.register_forward_hook(
                lambda module, args, kwargs, output: notes.append(output.detach().clone()), with_kwargs=True
            ),
        ]

    ours, theirs = compared(plain, pins, register)
    assert len(ours) == len(theirs) == 4
    torch.testing.assert_close(ours, theirs)


@both
def test_a_hook_on_all_modules_sees_each_call_once(plain, pins):
    def register(model, notes):
        def note(module, args, output):
            notes.append((type(module).__name__, output.detach().clone()))

        return [nn.modules.module.register_module_forward_hook(note)]

    ours, theirs = compared(plain, pins, register)
    assert [name for name, _ in ours] == [name for name, _ in theirs] and len(ours) == 2 * 7
    torch.testing.assert_close([each for _, each in ours], [each for _, each in theirs])


@both
def test_a_hook_that_changes_what_is_computed_does_so_in_a_recomputation_too(plain, pins):
    def register(model, notes):
        layer = model.layers[1]
        return [
            layer.up.register_forward_hook(lambda module, args, output: notes.append(output)),
            layer.down.register_forward_hook(lambda module, args, output: output * 3 + notes[-1]),
        ]

    compared(plain, pins, register)


@both
def test_a_hook_may_ask_for_the_gradient_of_what_it_sees(plain, pins):
    def register(model, notes):
        def ask(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: notes.append(gradient.clone()))

        return [model.layers[1].up.register_forward_hook(ask)]

    ours, theirs = compared(plain, pins, register)
    torch.testing.assert_close(ours, theirs)


@both
@pytest.mark.parametrize("at", ["layers.1", "layers.1.down"])
def test_a_backward_hook_sees_each_backward_once(plain, pins, at):
    def register(model, notes):
        return [
            model.get_submodule(at).register_full_backward_hook(
                lambda module, inputs, outputs: notes.append((inputs[0].clone(), outputs[0].clone()))
            )
        ]

    ours, theirs = compared(plain, pins, register)
    assert len(ours) == len(theirs) == 1
    torch.testing.assert_close(ours, theirs)


def test_a_hook_that_raises_leaves_hooks_as_they_were(plain):
    model, notes = opened(plain, pins=PINS[0]), []

    def refuse(module, args, output):
        notes.append(module)
        raise ValueError("no")

    handle = model.layers[0].up.register_forward_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        model(x_of())
    assert list(model.layers[0].up._forward_hooks.values()) == [refuse] and len(notes) == 1
    handle.remove()
    model(x_of()).backward()


def test_recorders_of_transformers_go_on():
    """They are hooks as well, installed in a model's first call."""
    plain = ZOO["mixtral"].build()
    model, seen = opened(plain, pins=Pins(tile_rows=2)), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    batch = {**ZOO["mixtral"].batch(rows=ROWS), "output_hidden_states": True, "output_router_logits": True}
    output, expected = model(**batch), plain(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.router_logits, expected.router_logits)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states)
    output.loss.backward()
    assert len(seen) == 1
