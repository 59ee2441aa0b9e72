"""Placeholders: reading gives values, everything that would be lost is refused by name."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from outsize import Pins
from outsize.engine.placeholder import GradientPlaceholder, OffloadedParameter
from outsize.errors import UsageError
from tests.running import adamw, assert_same_weights, opened
from tests.zoo import ZOO, plain_batch, plain_stack


@pytest.fixture(params=["never called", "trained"])
def pair(request, tmp_path):
    """A model under Outsize and its values in plain PyTorch."""
    plain = ZOO["llama_tied"].build()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    if request.param == "trained":
        for subject in (model, plain):
            optimizer = adamw(subject)
            subject(**ZOO["llama_tied"].batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, plain


def test_reading_gives_the_value(pair):
    model, plain = pair
    for name, parameter in model.named_parameters():
        value = plain.get_parameter(name).detach()
        assert isinstance(parameter, OffloadedParameter) and isinstance(parameter, nn.Parameter)
        assert parameter.shape == value.shape and parameter.dtype is value.dtype
        assert torch.allclose(parameter.detach() + 0, value, atol=1e-6)
        assert torch.allclose(parameter.data.clone(), value, atol=1e-6)
        assert type(parameter.data.clone()) is torch.Tensor
        assert torch.allclose(torch.from_numpy(parameter.detach().numpy()), value, atol=1e-6)
        assert torch.allclose(torch.tensor(parameter.tolist()), value, atol=1e-6)
        with torch.no_grad():
            assert float(parameter.norm()) == pytest.approx(float(value.norm()), rel=1e-5)
            assert torch.allclose(parameter[0] * 2, value[0] * 2, atol=1e-6)


READINGS = {
    "float": lambda p: p.detach().float(),
    "to": lambda p: p.detach().to("cpu", torch.float64),
    "data float": lambda p: p.data.float(),
    "double of a clone": lambda p: p.detach().clone().double(),
    "from_dlpack": lambda p: torch.from_dlpack(p.detach()),
    "numpy from_dlpack": lambda p: torch.from_numpy(np.from_dlpack(p.detach().float()).copy()),
    "asarray": lambda p: torch.asarray(p.detach()),
    "rows": lambda p: torch.stack([row.clone() for row in p.detach()]),
    "view": lambda p: p.detach().view(-1).clone().view(p.shape),
    "split": lambda p: torch.cat(torch.split(p.detach(), 5)),
    "transposed": lambda p: p.detach().t().contiguous().t(),
    "view of a view": lambda p: p.detach().view(-1)[:].view(p.shape) + 0,
}


@pytest.mark.parametrize("way", READINGS)
def test_every_way_of_reading_gives_the_value(way, tmp_path):
    """Copies of another type, views, and what other libraries take, as from a plain tensor in bfloat16."""
    plain = ZOO["llama"].build().bfloat16()
    model = opened(plain, disk=tmp_path)
    read = READINGS[way]
    value, expected = read(model.lm_head.weight), read(plain.lm_head.weight)
    assert value.dtype is expected.dtype and torch.equal(value, expected)


RAW = {
    "storage": lambda p: p.detach().untyped_storage(),
    "typed storage": lambda p: p.detach().storage(),
    "safetensors": lambda p: save_file({"w": p.detach()}, "/dev/null"),
    "share_memory_": lambda p: p.detach().share_memory_(),
    "set_": lambda p: torch.empty(0).set_(p.detach().untyped_storage()),
    "view": lambda p: p.detach().view(-1).data_ptr(),
    "to_dlpack": lambda p: torch.utils.dlpack.to_dlpack(p.detach()),
}


@pytest.mark.parametrize("way", RAW)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_what_reaches_for_bytes_is_refused(way, tmp_path):
    """There are none to point at: reading address 0 ended the process."""
    parameter = opened(ZOO["llama"].build(), disk=tmp_path).lm_head.weight
    with pytest.raises((UsageError, RuntimeError), match=r"store|Cannot access data pointer"):
        RAW[way](parameter)


def test_sharing_a_model_between_processes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be shared between processes"):
        opened(ZOO["llama"].build(), disk=tmp_path).share_memory()


def test_a_state_dict_is_read(pair):
    model, plain = pair
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name].clone(), value, atol=1e-6), name


def test_a_value_that_was_read_stays(pair):
    model, _ = pair
    value = model.model.norm.weight.detach().clone()
    before = value.clone()
    model(**ZOO["llama_tied"].batch())
    assert torch.equal(value, before)


def test_printing_neither_reads_nor_fails(pair):
    model, _ = pair
    text = repr(model.model.norm.weight)
    assert "model.norm.weight" in text and "(32,)" in text and "store" in text
    assert "LlamaForCausalLM" in repr(model)


def no_grad(run):
    def inside(model):
        with torch.no_grad():
            run(model)

    return inside


def assign_item(model):
    model.model.norm.weight[0] = 1.0


def load_changed(model):
    model.load_state_dict({name: torch.zeros(value.shape) for name, value in model.state_dict().items()})


def save_pickled(model):
    torch.save(model.state_dict(), io.BytesIO())


WRITES = {
    "fill_": no_grad(lambda m: m.model.norm.weight.fill_(0)),
    "mul_": no_grad(lambda m: m.model.norm.weight.mul_(2)),
    "copy_": no_grad(lambda m: m.model.norm.weight.copy_(torch.zeros(32))),
    "data fill_": lambda m: m.model.norm.weight.data.fill_(0),
    "data mul_": lambda m: m.model.norm.weight.data.mul_(0),
    "index": no_grad(assign_item),
    "init": lambda m: nn.init.normal_(m.model.norm.weight),
    "foreach": no_grad(lambda m: torch._foreach_mul_(list(m.parameters()), 2.0)),
    "to dtype": lambda m: m.to(torch.float16),
    "half": lambda m: m.half(),
    "parameter to": lambda m: m.model.norm.weight.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle parameter": lambda m: pickle.dumps(m.model.norm.weight),
    "torch.save": save_pickled,
    "load_state_dict": load_changed,
    "data_ptr": lambda m: m.model.norm.weight.data_ptr(),
    "view fill_": no_grad(lambda m: m.model.norm.weight.view(-1).fill_(0)),
    "row": no_grad(lambda m: m.model.norm.weight[:2].zero_()),
    "rows": no_grad(lambda m: [row.zero_() for row in m.lm_head.weight.unbind()]),
    "chunks of data": lambda m: m.lm_head.weight.data.chunk(2)[0].mul_(0),
    "index of a view": lambda m: m.lm_head.weight.data.t().__setitem__(0, 1.0),
    "out=": no_grad(lambda m: torch.add(torch.ones(32), 1, out=m.model.norm.weight)),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_would_be_lost_is_refused(way, pair):
    model, _ = pair
    before = model.model.norm.weight.detach().clone()
    with pytest.raises((UsageError, RuntimeError), match=r"weight.*(cannot be|store)"):
        WRITES[way](model)
    assert torch.equal(model.model.norm.weight.detach().clone(), before)


@pytest.mark.parametrize("way", ["attribute", "data", "view"])
def test_replacing_a_parameter_is_refused(way, tmp_path):
    """The assignment would be accepted and never seen: points install their own values."""
    model = opened(plain_stack(), disk=tmp_path)
    with pytest.raises((UsageError, TypeError, RuntimeError)):
        if way == "attribute":
            model.outlet.weight = nn.Parameter(torch.zeros(1, 16))
            model(**plain_batch())
        elif way == "data":
            model.outlet.weight.data = torch.zeros(1, 16)
        else:
            with torch.no_grad():
                model.outlet.weight.view(-1).zero_()


def test_moving_to_the_cpu_is_no_change(pair):
    model, _ = pair
    assert model.to("cpu") is model
    assert isinstance(model.model.norm.weight, OffloadedParameter)


def test_differentiating_a_parameter_outside_of_the_forward_is_refused(pair):
    model, _ = pair
    penalty = model.model.norm.weight.square().sum()
    with pytest.raises(UsageError, match="differentiated outside"):
        penalty.backward()


def test_a_penalty_on_weights_beside_the_loss_is_refused(pair):
    model, _ = pair
    loss = model(**ZOO["llama_tied"].batch()).loss
    with pytest.raises(UsageError, match="differentiated outside"):
        (loss + model.model.layers[0].mlp.up_proj.weight.pow(2).sum()).backward()


def test_a_parameter_unfrozen_later_is_refused_outside_of_the_forward(tmp_path):
    plain = plain_stack()
    plain.outlet.requires_grad_(False)
    model = opened(plain, disk=tmp_path, home="disk")
    model.outlet.requires_grad_(True)
    with pytest.raises(UsageError, match="differentiated outside"):
        model.outlet.weight.square().sum().backward()


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "host"])
def after_backward(request, tmp_path):
    plain = ZOO["llama_tied"].build()
    options = {"disk": tmp_path, "pins": Pins(gradient_slots=1)} if request.param == "disk" else {}
    model = opened(plain, home=request.param, **options)
    for subject in (model, plain):
        subject(**ZOO["llama_tied"].batch()).loss.backward()
    return model, plain


def test_gradients_are_those_of_plain_pytorch(after_backward):
    model, plain = after_backward
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        assert isinstance(parameter.grad, GradientPlaceholder)
        assert parameter.grad.shape == expected.shape and parameter.grad.dtype is expected.dtype
        assert torch.allclose(parameter.grad.clone(), expected, rtol=1e-4, atol=1e-6), name
        assert f"{name}.grad" in repr(parameter.grad)
        assert float(parameter.grad.norm()) == pytest.approx(float(expected.norm()), rel=1e-4)
        assert float(torch.linalg.vector_norm(parameter.grad)) == pytest.approx(
            float(expected.norm()), rel=1e-4
        )
        assert float(parameter.grad.abs().max()) == pytest.approx(float(expected.abs().max()), rel=1e-4)
        assert float(parameter.grad.norm(1)) == pytest.approx(float(expected.norm(1)), rel=1e-4)
        assert float(parameter.grad.norm(p=float("inf"))) == pytest.approx(
            float(expected.abs().max()), rel=1e-4
        )
        if parameter.dim() == 1:
            continue
        row = torch.linalg.vector_norm(parameter.grad, dim=-1)
        assert torch.allclose(row, torch.linalg.vector_norm(expected, dim=-1), rtol=1e-4, atol=1e-6)


def test_scaling_a_gradient_is_kept(after_backward):
    model, plain = after_backward
    for subject in (model, plain):
        subject.model.embed_tokens.weight.grad.mul_(0.5)
        subject.model.norm.weight.grad *= 3
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        ours, theirs = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert torch.allclose(ours.clone(), theirs, rtol=1e-4, atol=1e-6)
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-4)


def test_clipping_by_value_and_other_writes_to_a_gradient_are_refused(after_backward):
    model, _ = after_backward
    for run in (
        lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 0.1),
        lambda: model.model.norm.weight.grad.add_(1),
        lambda: model.model.norm.weight.grad.mul_(torch.ones(32)),
    ):
        with pytest.raises((UsageError, RuntimeError, ValueError, TypeError)):
            run()


def test_norms_of_another_order_can_clip(after_backward):
    model, plain = after_backward
    for order in (1.0, float("inf")):
        norms = [
            float(torch.nn.utils.get_total_norm([p.grad for p in s.parameters()], order))
            for s in (model, plain)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_gradients_are_set_to_none_and_nothing_else(after_backward):
    model, _ = after_backward
    with pytest.raises(UsageError, match="given a gradient"):
        model.model.norm.weight.grad = torch.zeros(32)
    assert model.model.norm.weight.grad is not None
    model.model.norm.weight.grad = None
    assert model.model.norm.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zeroing_gradients_in_place_is_refused_or_done(after_backward):
    model, _ = after_backward
    try:
        model.zero_grad(set_to_none=False)
    except UsageError as refusal:
        assert ".grad" in str(refusal)
    else:
        assert all(float(parameter.grad.norm()) == 0 for parameter in model.parameters())


ZEROING = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "gradients": lambda model, optimizer: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("way", ZEROING)
def test_gradients_made_zero_are_gradients_as_in_torch(way, home, tmp_path):
    """Weights then move with their moments at a step without a backward, and a backward adds to nothing."""
    plain = ZOO["llama_tied"].build()
    model = opened(plain, home=home, disk=tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject, weight_decay=0.1)
        for seed in range(3):
            if seed != 1:
                subject(**ZOO["llama_tied"].batch(seed=seed)).loss.backward()
            optimizer.step()
            ZEROING[way](subject, optimizer)
        gradient = subject.model.norm.weight.grad
        assert gradient is not None and float(gradient.abs().max()) == 0.0
    assert_same_weights(model, plain)


def test_a_gradient_of_inf_is_not_made_zero(tmp_path):
    model = opened(plain_stack(), disk=tmp_path)
    optimizer = adamw(model)
    (model(**plain_batch()).sum() * float("inf")).backward()
    with pytest.raises(UsageError, match=r"holds inf or nan[\s\S]*hint"):
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
