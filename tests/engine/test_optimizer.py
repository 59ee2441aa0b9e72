"""The optimizer: what a step freezes, and what is refused."""

import pytest
import torch

import outsize
from outsize.errors import UsageError
from tests.running import adamw, assert_same_weights, opened, train, values_of
from tests.seams import close_unchecked, records_of, updates_pending
from tests.zoo import ZOO, plain_batch, plain_stack


def test_a_step_changes_no_weight_until_a_visit(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    optimizer = adamw(model)
    batch = ZOO["llama"].batch()
    model(**batch).loss.backward()
    before = outsize.report(model).bytes_written
    optimizer.step()
    assert updates_pending(model) == set(records_of(model))
    assert outsize.report(model).bytes_written == before
    train(model, [batch], optimizer)
    assert outsize.report(model).bytes_written > before


def test_what_was_frozen_is_not_changed_by_later_settings(tmp_path):
    model, plain = opened(plain_stack(), disk=tmp_path, home="disk"), plain_stack()
    for subject in (model, plain):
        optimizer = adamw(subject)
        subject(**plain_batch()).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 100.0
        optimizer.param_groups[0]["weight_decay"] = 1.0
    assert_same_weights(model, plain)


def test_the_norm_is_that_of_all_gradients_before_clipping(tmp_path):
    model, plain = opened(ZOO["t5"].build().train(), disk=tmp_path, home="disk"), ZOO["t5"].build().train()
    optimizer = outsize.AdamW(model, max_grad_norm=0.01)
    assert optimizer.grad_norm is None and optimizer.gradient_norm() == 0.0
    for subject in (model, plain):
        subject(**ZOO["t5"].batch()).loss.backward()
    expected = float(
        torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    )
    assert optimizer.gradient_norm() == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-5)
    assert optimizer.gradient_norm() == pytest.approx(
        expected, rel=1e-5
    )  # as in torch, gradients are there still
    optimizer.zero_grad()
    assert optimizer.gradient_norm() == 0.0


def test_step_counts_are_per_parameter(tmp_path):
    """A parameter that misses a step has a younger bias correction, as in torch."""
    model, plain = opened(plain_stack(), disk=tmp_path, home="disk"), plain_stack()
    for subject in (model, plain):
        optimizer = adamw(subject, betas=(0.5, 0.6))
        for seed in range(4):
            subject(**plain_batch(seed=seed)).backward()
            if seed in (0, 2):
                subject.outlet.weight.grad = None
                subject.scale.grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_groups_may_be_added_before_the_first_backward(tmp_path):
    model, plain = opened(plain_stack(), disk=tmp_path, home="disk"), plain_stack()
    for subject in (model, plain):
        optimizer = adamw(subject, list(subject.layers.parameters()))
        optimizer.add_param_group({"params": list(subject.outlet.parameters()), "lr": 0.1})
        train(subject, [plain_batch(seed=seed) for seed in range(3)], optimizer)
    assert_same_weights(model, plain)


def test_a_second_optimizer_is_refused():
    model = opened(plain_stack())
    adamw(model)
    model(**plain_batch()).backward()
    with pytest.raises(UsageError, match="has an optimizer or gradients already"):
        adamw(model)


def test_gradients_without_an_optimizer_are_there_and_one_may_not_follow():
    model = opened(plain_stack())
    model(**plain_batch()).backward()
    assert model.scale.grad is not None
    with pytest.raises(UsageError, match="before the first backward"):
        adamw(model)
    model.zero_grad()
    adamw(model)


def test_evaluating_before_the_optimizer_is_made(tmp_path):
    plain = plain_stack()
    model = opened(plain, disk=tmp_path, home="disk")
    with torch.no_grad():
        assert torch.allclose(model(**plain_batch()), plain(**plain_batch()))
    for subject in (model, plain):
        train(subject, [plain_batch(seed=seed) for seed in range(3)])
    assert_same_weights(model, plain)


def test_evaluating_without_an_optimizer_writes_nothing(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    for options in ({}, {"home": "host"}, {"home": "disk", "disk": tmp_path / "disk"}):
        model = outsize.load(tmp_path / "model", dtype="float32", **options)
        with torch.no_grad():
            loss = model(**ZOO["llama"].batch()).loss
            expected = ZOO["llama"].build()(**ZOO["llama"].batch()).loss
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert outsize.report(model).bytes_written == 0
        close_unchecked(model)


def test_state_dicts_hold_groups_and_counts_and_no_tensor(tmp_path):
    model = opened(plain_stack(), disk=tmp_path, home="disk")
    optimizer = adamw(model, lr=0.5)
    train(model, [plain_batch()] * 2, optimizer)
    state = optimizer.state_dict()
    assert set(state["outsize"]["num_steps"].values()) == {2}
    assert not any(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(state))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(UsageError, match="no reference to Outsize's store"):
        optimizer.load_state_dict(torch.optim.AdamW(plain_stack().parameters()).state_dict())


def test_a_step_before_any_call_is_nothing():
    model = opened(plain_stack())
    optimizer = adamw(model)
    before = values_of(model)
    assert optimizer.step() is None
    optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())


def test_hooks_of_torch_run():
    model = opened(plain_stack())
    optimizer = adamw(model)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    train(model, [plain_batch()], optimizer)
    assert seen == ["pre", "post"]
