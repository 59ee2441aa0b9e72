"""What is lost with an interrupted operation, and what is not."""

import pytest
import torch

import outsize
from outsize import Pins
from outsize.errors import StateLostError
from outsize.store.gradients import Gradients
from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.recovery import undone_by
from outsize.store.state import UpdateState
from outsize.store.weights import Weights
from tests.running import adamw, opened, train, values_of
from tests.seams import close, interrupt_op
from tests.zoo import ZOO

BATCHES = [ZOO["llama"].batch(seed=seed) for seed in range(3)]


def llama(tmp_path, home="disk"):
    pins = Pins(weight_slots=1, gradient_slots=1) if home == "disk" else None
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype="float32", pins=pins)
    return model, adamw(model)


def raising(real, at=1, after=False, error=KeyboardInterrupt):
    """`real`, which raises at its `at`-th call, before or after doing what it does; and the calls that were made."""
    calls = []

    def act(*args, **kwargs):
        calls.append(args)
        if len(calls) == at and not after:
            raise error
        result = real(*args, **kwargs)
        if len(calls) == at:
            raise error
        return result

    return act


def interrupting(monkeypatch, owner, name, **options):
    """`owner.name` raises once."""
    monkeypatch.setattr(owner, name, raising(getattr(owner, name), **options))


def interrupting_op(monkeypatch, model, text, **options):
    """The operation `text` of plans raises once."""
    interrupt_op(monkeypatch, model, text, lambda run: raising(run, **options))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses and weights of a run that nothing interrupts: they have the same bits in memory."""
    torch.set_num_threads(1)  # as in the tests
    model, optimizer = llama(tmp_path_factory.mktemp("expected"))
    losses = train(model, BATCHES, optimizer)
    values = values_of(model)
    close(model)
    return losses, values


def assert_the_interrupted_step_can_be_repeated(expected, home, tmp_path, monkeypatch, interrupt):
    losses, values = expected
    model, optimizer = llama(tmp_path, home)
    train(model, BATCHES[:1], optimizer)
    with monkeypatch.context() as patch:
        interrupt(patch, model)
        with pytest.raises(KeyboardInterrupt):
            train(model, BATCHES[1:2], optimizer)
    optimizer.zero_grad()
    assert train(model, BATCHES[1:], optimizer) == losses[1:]
    again = values_of(model)
    assert all(torch.equal(again[key], value) for key, value in values.items())
    close(model)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("home", "op"),
    [
        ("disk", "read L01.weight 0"),
        ("disk", "wait L01.weight"),
        ("disk", "free L01.weight"),
        ("disk", "update L01"),
        ("disk", "claim L01.gradient"),
        ("disk", "write L01.gradient 0"),
        ("disk", "free L01.gradient"),
        ("host", "wait L01.weight"),
        ("host", "update L01"),
        ("host", "write L01.gradient 0"),
    ],
)
def test_an_interrupted_operation_can_be_repeated(op, home, after, expected, tmp_path, monkeypatch):
    def interrupt(patch, model):
        interrupting_op(patch, model, op, after=after)

    assert_the_interrupted_step_can_be_repeated(expected, home, tmp_path, monkeypatch, interrupt)


@pytest.mark.parametrize(
    ("home", "owner", "name", "at", "after"),
    [
        ("disk", Weights, "_fill", 2, False),
        ("disk", OptimizerWorker, "submit", 1, False),
        ("host", OptimizerWorker, "submit", 1, False),
        ("host", OptimizerWorker, "submit", 2, True),
        ("host", Gradients, "add", 3, True),
    ],
)
def test_an_operation_that_is_interrupted_half_way_can_be_repeated(
    owner, name, at, after, home, expected, tmp_path, monkeypatch
):
    def interrupt(patch, model):
        interrupting(patch, owner, name, at=at, after=after)

    assert_the_interrupted_step_can_be_repeated(expected, home, tmp_path, monkeypatch, interrupt)


@pytest.mark.parametrize("repeats_step", [True, False])
def test_a_step_that_is_interrupted_on_the_way_is_ended_by_the_next_call(
    repeats_step, expected, tmp_path, monkeypatch
):
    losses, values = expected
    model, optimizer = llama(tmp_path)
    model(**BATCHES[0]).loss.backward()
    with monkeypatch.context() as patch:
        interrupting(patch, UpdateState, "freeze", at=2, after=True)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    if repeats_step:
        optimizer.step()
    optimizer.zero_grad()
    assert train(model, BATCHES[1:], optimizer) == losses[1:]
    assert optimizer.num_updates == len(BATCHES)
    again = values_of(model)
    assert all(torch.equal(again[key], value) for key, value in values.items())
    close(model)


def test_a_gradient_that_is_partly_summed_is_refused_until_it_is_dropped(tmp_path, monkeypatch):
    model, optimizer = llama(tmp_path, "host")
    weight = model.model.layers[1].mlp.up_proj.weight
    model(**BATCHES[0]).loss.backward()
    before = weight.grad.clone()
    loss = model(**BATCHES[1]).loss
    with monkeypatch.context() as patch:
        interrupting_op(patch, model, "write L01.gradient 0")
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    for refused in (
        lambda: weight.grad.clone(),
        optimizer.step,
        lambda: model(**BATCHES[1]).loss.backward(),
    ):
        with pytest.raises(StateLostError, match="only partly summed") as refusal:
            refused()
        assert "zero_grad" in refusal.value.hint
    optimizer.zero_grad()
    model(**BATCHES[0]).loss.backward()
    assert torch.equal(weight.grad.clone(), before)
    optimizer.step()
    close(model)


def test_an_update_that_stops_half_way_is_refused_and_the_last_commit_loads(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    model, optimizer = llama(tmp_path / "scratch")
    outsize.checkpoint.resume(model, optimizer, tmp_path / "store")
    train(model, BATCHES[:1], optimizer)
    outsize.checkpoint.commit(model, optimizer, tmp_path / "store")
    outsize.checkpoint.finish(model)
    committed = values_of(model)
    train(model, BATCHES[1:2], optimizer)
    with monkeypatch.context() as patch:
        interrupting(patch, OptimizerWorker, "_apply_chunk", at=2, after=True, error=MemoryError("no memory"))
        with pytest.raises(MemoryError):
            train(model, BATCHES[2:], optimizer)
    for refused in (
        lambda: model(**BATCHES[2]),
        lambda: model.lm_head.weight.detach().clone(),
        optimizer.step,
        lambda: outsize.save(model, tmp_path / "saved"),
        lambda: outsize.checkpoint.commit(model, optimizer, tmp_path / "store"),
    ):
        for _ in range(2):
            with pytest.raises(StateLostError, match=r"update of block .* \(no memory\)") as refusal:
                refused()
            assert "outsize.checkpoint.resume" in refusal.value.hint
    close(model)
    model, optimizer = llama(tmp_path / "scratch")
    assert outsize.checkpoint.resume(model, optimizer, tmp_path / "store") is not None
    again = values_of(model)
    assert all(torch.equal(again[key], value) for key, value in committed.items())
    outsize.checkpoint.close(model)


def test_an_update_that_failed_before_it_began_is_applied_later(expected, tmp_path, monkeypatch):
    losses, values = expected
    model, optimizer = llama(tmp_path)
    train(model, BATCHES[:2], optimizer)
    with monkeypatch.context() as patch:
        interrupting(patch, OptimizerWorker, "_start_reads", at=1, error=OSError(5, "a read failed"))
        with pytest.raises(OSError, match="a read failed"):
            model(**BATCHES[2])
    assert train(model, BATCHES[2:], optimizer) == losses[2:]
    again = values_of(model)
    assert all(torch.equal(again[key], value) for key, value in values.items())
    close(model)


def test_undoing_that_is_interrupted_is_done_again():
    undone = []

    def undo():
        undone.append(1)
        if len(undone) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undone_by(undo):
        pass
    assert len(undone) == 2
    with undone_by(undo):
        pass
    assert len(undone) == 3
