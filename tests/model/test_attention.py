"""Which attention is chosen, and what is refused."""

import os

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import outsize
from outsize.errors import ConfigError, UsageError
from outsize.model import attention as attention_module
from outsize.model import attention_of, open_skeleton
from tests.running import opened, settled  # noqa: F401
from tests.seams import close, last_training_call, set_merging_of_rows
from tests.zoo import ZOO


@pytest.fixture
def folder(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_torchs_own_is_the_default_and_is_named(folder):
    model = outsize.load(folder)
    assert "attention: sdpa" in str(outsize.preview(folder, seq_len=8))
    with torch.no_grad():
        model(**ZOO["llama"].batch())
    assert "attention: sdpa" in str(outsize.report(model))
    close(model)


def test_what_is_asked_for_comes_before_the_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    assert attention_of(open_skeleton(config, torch.float32)) == "eager"
    assert attention_of(open_skeleton(config, torch.float32, attention="sdpa")) == "sdpa"
    assert attention_of(outsize.load(folder, attention="eager")) == "eager"
    assert outsize.preview(folder, seq_len=8, attention="eager").attention == "eager"


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("fast", "float32", "no such implementation"),
        ("flash_attention_2", "float32", "computes in bfloat16"),
        ("flash_attention_2", "bfloat16", "not installed"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(folder, name, dtype, why):
    with pytest.raises(ConfigError, match=why) as caught:
        outsize.load(folder, dtype=dtype, attention=name)
    assert name in str(caught.value) and caught.value.hint == "one of sdpa, eager, flex_attention"


def test_a_kernel_of_a_repository_is_left_to_transformers():
    config = ZOO["llama"].config()
    attention_module.choose(config, transformers.LlamaForCausalLM, torch.bfloat16, "someone/attention")
    assert config._attn_implementation == "someone/attention"


def test_a_class_that_does_not_support_it_is_believed(folder, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not support it"):
        outsize.load(folder, attention="sdpa")
    assert attention_of(outsize.load(folder)) == "eager"


def test_flash_attention_is_made_to_give_the_same_bits_every_time(monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    monkeypatch.setitem(attention_module._INSTALLED, "flash_attention_2", lambda: True)
    config = ZOO["llama"].config()
    attention_module.choose(config, transformers.LlamaForCausalLM, torch.bfloat16, "flash_attention_2")
    assert config._attn_implementation == "flash_attention_2"
    assert os.environ.pop("FLASH_ATTENTION_DETERMINISTIC") == "1"
    attention_module.choose(ZOO["llama"].config(), transformers.LlamaForCausalLM, torch.bfloat16, "sdpa")
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def of_one_row(module, query, key, value, attention_mask, **options):
    """As transformers calls flash attention: no mask, and positions that begin anew count in a batch of one row."""
    positions, causal = (
        options.get("position_ids"),
        torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril(),
    )
    if positions is not None and query.shape[0] == 1:
        document = (positions[0].diff(prepend=positions[0, :1]) != 1).cumsum(0)
        causal = causal & (document[:, None] == document[None])
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=causal, scale=options.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    name = "of_one_row"
    set_merging_of_rows(monkeypatch, lambda module: attention_of(module) == name)
    transformers.AttentionInterface.register(name, of_one_row)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def packed(rows):
    ids = ZOO["llama"].batch(rows=rows, length=12)["input_ids"]
    positions = torch.arange(12).remainder(5).repeat(rows, 1)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def test_packed_documents_are_kept_apart_with_flash_attention_too(flash):
    def loss_with(attention, batch):
        plain = ZOO["llama"].build().train()
        plain.set_attn_implementation(attention)
        model = opened(plain, dtype="float32")
        loss = model(**batch).loss
        loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        call = last_training_call(model)
        close(model)
        return loss.detach(), gradient, call.tile_rows

    batch = packed(3)
    expected, loss = loss_with("sdpa", batch), loss_with(flash, batch)
    assert torch.allclose(loss[0], expected[0], rtol=1e-6)
    assert torch.allclose(loss[1], expected[1], atol=1e-6)
    assert (loss[2], expected[2]) == (1, 3)
    del batch["position_ids"]
    assert loss_with(flash, batch)[2] == 3, "rows are computed together where nothing is packed"


def test_packed_documents_that_cannot_be_cut_into_rows_are_refused(flash):
    plain = ZOO["llama"].build()
    plain.set_attn_implementation(flash)
    model = opened(plain, dtype="float32")
    with torch.no_grad():
        model(**packed(3))
        with pytest.raises(UsageError, match="one row"):
            model(**{key: value for key, value in packed(3).items() if key != "labels"}, use_cache=True)
        model(**{key: value for key, value in packed(1).items() if key != "labels"}, use_cache=True)
    close(model)
