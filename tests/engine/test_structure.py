"""A part of a model that is replaced, added or dropped after it was opened is refused by name before anything computes."""

import copy

import pytest
import torch
from torch import nn

import outsize
from outsize.errors import UsageError
from tests.running import adamw, opened
from tests.seams import is_open
from tests.zoo import ZOO


class LowRank(nn.Module):
    """LoRA written by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def new_head(model):
    model.lm_head = nn.Linear(32, 199, bias=False)


def new_norm(model):
    model.model.norm = copy.deepcopy(type(model.model.norm)(32))


def new_layer(model):
    model.model.layers[0] = type(model.model.layers[0])(model.config, 0)


def fewer_layers(model):
    model.model.layers = model.model.layers[:1]


def layers_in_another_order(model):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def low_rank(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = LowRank(attention.q_proj)


def one_more_parameter(model):
    model.model.layers[0].mlp.scale = nn.Parameter(torch.ones(1))


def one_more_part(model):
    model.score = nn.Linear(32, 2)


def new_parameter(model):
    model.model.norm.weight = nn.Parameter(torch.ones(32))


def no_parameter(model):
    model.model.norm.weight = None


CHANGES = {
    change.__name__: (change, named)
    for change, named in (
        (new_head, r"lm_head \(Linear\) was replaced by a Linear"),
        (new_norm, r"model\.norm \(LlamaRMSNorm\) was replaced"),
        (new_layer, r"model\.layers\.0\S* .*was replaced"),
        (fewer_layers, r"model\.layers\.1\S* .*is no longer part"),
        (layers_in_another_order, r"model\.layers\.0\S* .*was replaced"),
        (low_rank, r"model\.layers\.1\.self_attn\.q_proj \(Linear\) was replaced by a LowRank"),
        (one_more_parameter, r"model\.layers\.0\.mlp\.scale was added"),
        (one_more_part, r"score\.weight was added"),
        (new_parameter, r"in the place of model\.norm\.weight"),
        (no_parameter, r"in the place of model\.norm\.weight"),
    )
}


@pytest.mark.parametrize("called", ["never called", "called"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_by_name(change, called, tmp_path):
    model = opened(ZOO["llama"].build(), disk=tmp_path)
    if called == "called":
        model(**ZOO["llama"].batch())
    alter, named = CHANGES[change]
    alter(model)
    for use in (
        lambda: model(**ZOO["llama"].batch()),
        lambda: outsize.save(model, tmp_path / "out"),
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: adamw(model),
    ):
        with pytest.raises(UsageError, match=rf"{named}[\s\S]*hint: "):
            use()
    assert not (tmp_path / "out").exists()


def test_parts_without_parameters_may_be_replaced(tmp_path):
    """They own nothing that lives in the store."""
    plain = ZOO["llama"].build()
    model = opened(plain, disk=tmp_path)
    for subject in (model, plain):
        subject.model.layers[0].mlp.act_fn = nn.ReLU()
    batch = ZOO["llama"].batch()
    assert torch.equal(model(**batch).loss, plain(**batch).loss)


def test_a_model_that_is_put_back_is_served_again(tmp_path):
    model = opened(ZOO["llama"].build(), disk=tmp_path)
    batch = ZOO["llama"].batch()
    before, norm = model(**batch).loss, model.model.norm
    new_norm(model)
    with pytest.raises(UsageError, match="was replaced"):
        model(**batch)
    model.model.norm = norm
    assert torch.equal(model(**batch).loss, before)


def test_a_module_around_an_opened_model_is_named(tmp_path):
    model = opened(ZOO["llama"].build(), disk=tmp_path)
    with pytest.raises(UsageError, match=r"Sequential was put around a LlamaForCausalLM[\s\S]*outsize.wrap"):
        outsize.AdamW(nn.Sequential(model), lr=1e-3)
    assert is_open(model)
