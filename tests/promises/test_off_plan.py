"""A model may leave its plan: it gets right results, later, and the report says so. What cannot be right is refused."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

import outsize
from outsize import Pins
from outsize.errors import UsageError
from tests.doubles import SlowTier
from tests.running import adamw, assert_same_weights, loss_of, opened, train, values_of
from tests.seams import arena_of, close, wrapped_disk
from tests.zoo import ZOO, plain_batch, plain_stack, seeded


class Wayward(nn.Module):
    """Runs its layers in an order that may be changed between calls, which no rehearsal can see."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.outlet = nn.Linear(16, 1)
        self.order = [0, 1, 2, 3]

    def forward(self, x, y):
        x = self.inlet(x)
        for index in self.order:
            x = x + self.layers[index](x)
        return F.mse_loss(self.outlet(x), y)


def wayward(tmp_path, **pins):
    with seeded(0):
        plain = Wayward()
    pins = {"weight_slots": 1, "gradient_slots": 1, **pins}
    return opened(plain, disk=tmp_path, home="disk", pins=Pins(**pins)), plain


ORDERS = {
    "skip": [0, 3],
    "twice": [0, 1, 1, 2, 3],
    "twice, apart": [0, 1, 2, 3, 1],
    "backwards": [3, 2, 1, 0],
    "none": [],
}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("way", ORDERS)
def test_another_order_gives_the_results_of_plain_pytorch(way, slots, tmp_path):
    model, plain = wayward(tmp_path, weight_slots=slots)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for seed in range(6):
            subject.order = ORDERS[way] if seed in (1, 2, 4) else [0, 1, 2, 3]
            train(subject, [plain_batch(seed=seed)], optimizer)
    assert_same_weights(model, plain)
    assert outsize.report(model).off_plan
    assert "no plan foresaw" in str(outsize.report(model))


@pytest.mark.parametrize("way", ["skip", "backwards"])
def test_a_read_that_was_begun_for_nothing_does_not_end_in_another_block(way, tmp_path, monkeypatch):
    """The plan is left while a late read is under way: its slot goes to another block only afterwards."""

    def delay(verb, label):
        return 0.03 if verb == "read" and (".weight" in label and ("L01" in label or "L02" in label)) else 0.0

    with wrapped_disk(monkeypatch, lambda disk: SlowTier(disk, delay)):
        model, plain = wayward(tmp_path, weight_slots=2)
        for subject in (model, plain):
            optimizer = adamw(subject)
            for seed in range(6):
                subject.order = ORDERS[way] if seed in (1, 2, 4) else [0, 1, 2, 3]
                train(subject, [plain_batch(seed=seed)], optimizer)
        assert_same_weights(model, plain)


def test_another_order_while_evaluating(tmp_path):
    model, plain = wayward(tmp_path)
    losses = []
    for subject in (model, plain):
        optimizer = adamw(subject)
        for seed in range(3):
            train(subject, [plain_batch(seed=seed)], optimizer)
            with torch.no_grad():
                for way in ("skip", "twice", "backwards"):
                    subject.order = ORDERS[way]
                    losses.append(float(subject(**plain_batch(seed=9))))
            subject.order = [0, 1, 2, 3]
    assert losses[:9] == pytest.approx(losses[9:], rel=1e-6)
    assert_same_weights(model, plain)


def test_visits_off_plan_are_named_and_counted(tmp_path):
    model, _ = wayward(tmp_path)
    model(**plain_batch()).backward()
    assert outsize.report(model).off_plan == ()
    model.order = [0, 1, 3]
    with torch.no_grad():
        model(**plain_batch())
        assert outsize.report(model).off_plan == ()  # this kind of call is rehearsed as it is
        model.order = [0, 3]
        model(**plain_batch())
    assert outsize.report(model).off_plan == ("forward L03 x1",)


def test_an_early_exit_in_a_language_model(tmp_path):
    plain = ZOO["llama"].build().train()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    results = []
    for subject in (model, plain):
        optimizer = adamw(subject)
        train(subject, [ZOO["llama"].batch(seed=0)], optimizer)
        with torch.no_grad():
            subject(**ZOO["llama"].batch(seed=1))
            subject.model.config.num_hidden_layers = 1
            results.append(subject(**ZOO["llama"].batch(seed=1)).loss)
            subject.model.config.num_hidden_layers = 3
        train(subject, [ZOO["llama"].batch(seed=2)], optimizer)
    assert torch.allclose(*results, rtol=1e-6)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("grads", [False, True])
def test_a_part_of_the_model_run_directly(grads, tmp_path):
    model, plain = wayward(tmp_path)
    with pytest.raises(UsageError, match="call the whole model once first"):
        model.layers[1](torch.ones(2, 16))
    results = []
    for subject in (model, plain):
        optimizer = adamw(subject)
        train(subject, [plain_batch()], optimizer)
        with torch.set_grad_enabled(grads):
            output = subject.layers[1](torch.ones(2, 16))
            if grads:
                output.square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(output.detach())
        train(subject, [plain_batch(seed=1)], optimizer)
    assert torch.allclose(*results, atol=1e-6)
    assert_same_weights(model, plain)
    assert any("L01" in visit for visit in outsize.report(model).off_plan)


def test_the_body_of_a_language_model_run_directly(tmp_path):
    plain = ZOO["llama"].build().eval()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    with torch.no_grad():
        model(**ZOO["llama"].batch())
        ids = ZOO["llama"].batch()["input_ids"]
        outputs = [s.model(input_ids=ids).last_hidden_state for s in (model, plain)]
    assert torch.allclose(*outputs, atol=1e-6)


# -- refused ---------------------------------------------------------------------------------------------------------


def test_double_backward_is_refused(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    embeds = torch.randn(3, 12, 32, requires_grad=True)
    loss = model(inputs_embeds=embeds, labels=ZOO["llama"].batch()["labels"]).loss
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
        gradient.square().sum().backward()
    model(**ZOO["llama"].batch()).loss.backward()


def test_a_gradient_penalty_beside_a_loss_is_refused(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    embeds = torch.randn(3, 12, 32, requires_grad=True)
    loss = model(inputs_embeds=embeds, labels=ZOO["llama"].batch()["labels"]).loss
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_backward_after_step_is_refused_by_name(name, tmp_path):
    plain = ZOO[name].build().train()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    optimizer = adamw(model)
    late = model(**ZOO[name].batch(seed=0)).loss
    model(**ZOO[name].batch(seed=1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UsageError, match="between its forward and its backward"):
        late.backward()


def test_a_refused_backward_leaves_no_gradient(tmp_path):
    """The head comes first in backward: it must refuse as layers do, not add gradients of other weights."""
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    optimizer = adamw(model)
    late = model(**ZOO["llama"].batch(seed=0)).loss
    model(**ZOO["llama"].batch(seed=1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UsageError):
        late.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_backward_after_step_is_refused_where_only_the_head_trains(tmp_path):
    plain = ZOO["llama"].build().train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    model = opened(plain, disk=tmp_path, home="disk")
    optimizer = adamw(model)
    late = model(**ZOO["llama"].batch(seed=0)).loss
    model(**ZOO["llama"].batch(seed=1)).loss.backward()
    optimizer.step()
    with pytest.raises(UsageError):
        late.backward()


def test_a_cache_with_gradients_on_is_refused(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    with pytest.raises(UsageError, match="past_key_values with gradients on"):
        model(**ZOO["llama"].batch(), past_key_values=DynamicCache())
    train(model, [ZOO["llama"].batch()])


def test_a_cache_given_to_a_layer_with_gradients_on_is_refused(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    train(model, [ZOO["llama"].batch()])
    with pytest.raises(UsageError, match="given a cache while gradients are on"):
        model.model(input_ids=ZOO["llama"].batch()["input_ids"], use_cache=True)
    train_loss = loss_of(model(**ZOO["llama"].batch()))
    assert torch.isfinite(train_loss)


def test_a_model_that_is_not_ours_is_named():
    with pytest.raises(UsageError, match="PlainStack is not a model of Outsize"):
        outsize.report(plain_stack())


def test_parameters_of_another_model_are_refused(tmp_path):
    model = opened(plain_stack(), disk=tmp_path)
    with pytest.raises(UsageError, match="parameters of another model"):
        outsize.AdamW(model, list(plain_stack().parameters()))


def test_reading_a_parameter_inside_a_forward_of_another_block_is_refused(tmp_path):
    model = opened(plain_stack(), disk=tmp_path, home="disk")
    model(**plain_batch()).backward()
    handle = model.layers[1][0].register_forward_hook(
        lambda module, args, output: output + model.outlet.weight.detach().sum()
    )
    with pytest.raises(UsageError, match="read inside the forward of another block"):
        model(**plain_batch())
    handle.remove()
    model(**plain_batch()).backward()


def test_a_closed_session_gives_everything_back(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    train(model, [ZOO["llama"].batch()])
    arena = arena_of(model)
    close(model)
    assert arena.in_use_bytes == 0
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_dropped_gives_everything_back(tmp_path):
    model = opened(plain_stack(), disk=tmp_path, home="disk")
    model(**plain_batch()).backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_state_is_as_trained_after_an_off_plan_call(tmp_path):
    model, _plain = wayward(tmp_path)
    optimizer = adamw(model)
    train(model, [plain_batch()], optimizer)
    before = values_of(model)
    with torch.no_grad():
        model.order = [3, 3, 3]
        model(**plain_batch())
    after = values_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
