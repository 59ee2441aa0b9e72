"""The head: losses and gradients without logits, in tiles of tokens and of rows."""

import pytest
import torch
from torch.nn import functional as F

import outsize
from outsize.engine import head as head_module
from outsize.engine.head import Logits, _add_to_logsumexp, _token_tiles
from tests.running import adamw, assert_same_weights, opened, train
from tests.seams import row_blocks, set_loss_tiles
from tests.zoo import CAUSAL, VOCABULARY, ZOO


def test_an_online_log_sum_exp_is_exact_enough_at_any_scale():
    for scale in (1e-3, 1.0, 80.0):
        logits = torch.randn(7, 50) * scale
        largest, total = torch.full((7,), -torch.inf), torch.zeros(7)
        for part in logits.split(16, 1):
            _add_to_logsumexp(part, largest, total)
        assert torch.allclose(largest + total.log(), logits.logsumexp(1), rtol=1e-6)


@pytest.mark.parametrize(("count", "rows"), [(10, 1 << 24), (10, 1 << 22), (1, 7), (0, 7), (1000, 1 << 23)])
def test_tiles_of_tokens_cover_all_of_them(count, rows):
    tiles = _token_tiles(count, rows, head_module.TILE_ELEMENTS)
    assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(count))
    assert all(
        (tile.stop - tile.start) * rows <= head_module.TILE_ELEMENTS or tile.stop - tile.start == 1
        for tile in tiles
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_never_made_where_the_loss_can_do_without(name, monkeypatch):
    made = []
    compute = Logits.compute
    monkeypatch.setattr(Logits, "compute", lambda self: (made.append(1), compute(self))[1])
    model = opened(ZOO[name].build().train())
    model(**ZOO[name].batch()).loss.backward()
    made.clear()
    model(**ZOO[name].batch()).loss.backward()
    assert bool(made) is not ZOO[name].tiles_loss


def test_small_tiles_give_the_same_training(monkeypatch, tmp_path):
    set_loss_tiles(monkeypatch, 200)
    plain = ZOO["llama_tied"].build().train()
    model = opened(plain, disk=tmp_path, home="disk")
    data = [ZOO["llama_tied"].batch(seed=seed) for seed in range(3)]
    assert train(model, data) == pytest.approx(train(plain, data), rel=1e-6)
    assert_same_weights(model, plain)


def test_a_table_is_cut_in_rows():
    model = opened(ZOO["llama"].build(vocab_size=4000))
    assert len(row_blocks(model, "lm_head.weight")) > 2
    assert row_blocks(model, "lm_head.weight")[-1][2] == 4000


@pytest.mark.parametrize("tied", [False, True])
def test_many_row_blocks_train_as_one_table(tied, tmp_path):
    plain = ZOO["phi"].build(vocab_size=4000, tie_word_embeddings=tied).train()  # its head has a bias
    model = opened(plain, disk=tmp_path, home="disk", pins=outsize.Pins(weight_slots=1, gradient_slots=1))
    data = [ZOO["phi"].batch(seed=seed) for seed in range(3)]
    for batch in data:
        batch["input_ids"] = batch["input_ids"] * 20
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] * 19)
    assert train(model, data) == pytest.approx(train(plain, data), rel=1e-6)
    assert_same_weights(model, plain)
    with torch.no_grad():
        assert torch.allclose(model(**data[0]).logits + 0, plain(**data[0]).logits, atol=1e-5)


def test_a_loss_is_scaled_by_what_comes_back(tmp_path):
    plain = ZOO["llama"].build().train()
    model = opened(plain)
    for subject in (model, plain):
        (subject(**ZOO["llama"].batch()).loss * 0.125).backward()
    assert torch.allclose(model.lm_head.weight.grad.clone(), plain.lm_head.weight.grad, rtol=1e-4, atol=1e-8)
    assert torch.allclose(
        model.model.layers[0].mlp.up_proj.weight.grad.clone(),
        plain.model.layers[0].mlp.up_proj.weight.grad,
        rtol=1e-4,
        atol=1e-8,
    )


def test_a_handle_behaves_like_logits_while_the_model_runs():
    """Models look at logits, slice them, and cast them before they hand them to the loss."""
    model, plain = opened(ZOO["llama"].build()), ZOO["llama"].build()
    batch = ZOO["llama"].batch()
    outputs = [s(**batch, logits_to_keep=5) if False else s(**batch) for s in (model, plain)]
    handle, logits = outputs[0].logits, outputs[1].logits
    assert handle.shape == logits.shape == (3, 12, VOCABULARY)
    assert (
        handle.size(1) == 12 and handle.dim() == 3 and handle.numel() == logits.numel() and len(handle) == 3
    )
    assert "computed when read" in repr(handle)
    with torch.no_grad():
        assert torch.allclose(handle[:, -1].softmax(-1), logits[:, -1].softmax(-1), atol=1e-6)
        assert torch.allclose(F.log_softmax(handle, -1), F.log_softmax(logits, -1), atol=1e-5)
        assert torch.allclose(torch.stack([handle, handle])[1], logits, atol=1e-6)


def test_logits_kept_by_the_user_are_of_the_weights_at_reading():
    """Documented: a handle computes when it is read. After an update it gives the logits of the new head."""
    model = opened(ZOO["llama"].build().train())
    optimizer = adamw(model)
    output = model(**ZOO["llama"].batch())
    with torch.no_grad():
        before = output.logits + 0
    output.loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(output.logits + 0, before)


def test_bf16_losses_are_near(tmp_path):
    plain = ZOO["llama"].build()
    model = opened(plain, dtype="bfloat16")
    reference = ZOO["llama"].build(dtype=torch.bfloat16)
    batch = ZOO["llama"].batch()
    losses = [float(s(**batch).loss.detach()) for s in (model, reference, plain)]
    assert losses[0] == pytest.approx(losses[2], rel=5e-3)
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
