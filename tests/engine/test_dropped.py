"""Memory of models that were dropped, and of those that are still open."""

import gc

import pytest
import torch

from outsize.engine import budget
from outsize.errors import BudgetError
from outsize.store import finalizers, memory
from tests.running import opened, train
from tests.zoo import ZOO, seeded


def trained(tmp_path, **options):
    with seeded(0):
        plain = ZOO["llama"].build().train()
    model = opened(plain, disk=tmp_path, **options)
    train(model, [ZOO["llama"].batch(rows=2, length=12, seed=seed) for seed in (1, 2)])
    return model


@pytest.fixture(autouse=True)
def nothing_open():
    """What earlier tests left behind is gone."""
    gc.collect()
    finalizers.finish()
    gc.collect()
    before = len(memory.open_models())
    yield
    gc.collect()
    finalizers.finish()
    assert len(memory.open_models()) <= before


@pytest.mark.parametrize("home", ["host", "disk", None])
def test_one_collection_frees_a_model_that_trained(home, tmp_path):
    before = memory.open_models()
    model = trained(tmp_path, home=home)
    assert len(memory.open_models()) == len(before) + 1
    del model
    gc.collect()
    finalizers.finish()
    assert memory.open_models() == before


def test_a_model_that_waits_for_the_collector_makes_room_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "WORTH_COLLECTING_BYTES", 1)
    before = memory.open_models()
    gc.disable()
    try:
        model = trained(tmp_path)
        del model
        assert len(memory.open_models()) == len(before) + 1
        again = trained(tmp_path)
        assert len(memory.open_models()) == len(before) + 1 and again is not None
    finally:
        gc.enable()


def test_it_is_gone_before_the_dry_run_of_the_next_takes_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "WORTH_COLLECTING_BYTES", 1)
    before = memory.open_models()
    plain = ZOO["llama"].build().train()
    layer, found = plain.model.layers[0], []
    forward = layer.forward

    def noting(*args, **kwargs):
        found.append(memory.open_models())
        return forward(*args, **kwargs)

    layer.forward = noting
    gc.disable()
    try:
        model = trained(tmp_path)
        del model
        opened(plain, disk=tmp_path)(**ZOO["llama"].batch())
    finally:
        gc.enable()
    assert found[0] == before


def test_a_refusal_names_another_open_model(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "WORTH_COLLECTING_BYTES", 1)
    model = trained(tmp_path, home="host")
    with pytest.raises(BudgetError, match="LlamaForCausalLM, which is still open, holds"):
        trained(tmp_path, home="host", host=memory.resident_bytes() + (1 << 20))
    assert torch.isfinite(model.lm_head.weight.detach().sum())
