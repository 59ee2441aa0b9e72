"""Types: what a model keeps in fp32 beside bf16 computes, trains, commits and is saved in fp32."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import outsize
from outsize.checkpoint.export import export
from outsize.model import cut, open_skeleton
from tests.running import adamw, train

GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"


class Gated(nn.Module):
    """A layer in bf16 whose gate is in fp32, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x):
        return x + self.inner(x) * self.gate(x.float()).sigmoid().to(x.dtype)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Gated() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def stack():
    torch.manual_seed(0)
    return Stack()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 8, generator=generator).bfloat16()} for _ in range(count)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a mixture of experts that declares its routers to be in fp32, with values that bf16 does not have."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_num_experts=8,
        moe_k=2,
        moe_layer_start_index=1,
        max_position_embeddings=64,
    )
    model = transformers.Ernie4_5_MoeForCausalLM(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                value.copy_(4 + torch.rand_like(value) / 100)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_loaded_model_has_the_types_and_values_of_transformers(weights, mixture):
    plain = transformers.Ernie4_5_MoeForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16)
    model = outsize.load(mixture, dtype="bfloat16", weights=weights).requires_grad_(False)
    for name in (GATE, BIAS):
        value, expected = model.get_parameter(name).detach().clone(), plain.get_parameter(name).detach()
        assert value.dtype is expected.dtype is torch.float32
        assert torch.equal(value, expected) and not torch.equal(value, value.bfloat16().float()), name
    if weights is None:
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)


def test_fp32_parameters_of_a_layer_are_a_block_that_stays(mixture):
    blocks = {block.name: block for block in cut(open_skeleton(mixture, torch.bfloat16)).blocks}
    assert blocks["L01_fp32"].pieces[0].parameter == GATE
    assert "L01" in blocks and "L00_fp32" not in blocks
    # The blocks do not depend on the compute type: a commit made in one goes on in the other.
    assert cut(open_skeleton(mixture, torch.float32)).blocks == tuple(blocks.values())


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_mixed_module_trains_as_in_torch(home, tmp_path):
    plain = stack()
    model = outsize.wrap(copy.deepcopy(plain), home=home, disk=tmp_path)
    (batch,) = batches(1)
    assert train(model, [batch]) == train(plain, [batch], adamw(plain))
    for name, value in model.named_parameters():
        expected = plain.get_parameter(name).detach()
        assert value.dtype is expected.dtype
        assert torch.allclose(value.detach().clone(), expected, rtol=0, atol=1e-7 if "gate" in name else 1e-2)


def test_no_placement_changes_a_bit(tmp_path):
    results = []
    for home in ("host", "disk"):
        model = outsize.wrap(stack(), home=home, disk=tmp_path)
        losses = train(model, batches(), adamw(model, max_grad_norm=0.1))
        results.append((losses, [value.detach().clone() for value in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))


def test_fp32_survives_saving_commits_and_export(mixture, tmp_path):
    ids = torch.arange(4, 20)[None]
    batch = {"input_ids": ids, "labels": ids}

    def opened():
        model = outsize.load(mixture, dtype="bfloat16", disk=tmp_path).train()
        return model, outsize.AdamW(model, lr=1e-3)

    model, optimizer = opened()
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    train(model, [batch], optimizer)
    outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    outsize.checkpoint.finish(model)
    gate = model.get_parameter(GATE).detach().clone().cpu()
    assert not torch.equal(gate, gate.bfloat16().float())
    outsize.save(model, tmp_path / "saved")
    outsize.checkpoint.close(model)
    export(tmp_path / "run", tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert torch.equal(load_file(tmp_path / folder / "model.safetensors")[GATE], gate)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert plain.dtype is torch.bfloat16 and torch.equal(plain.get_parameter(GATE).detach(), gate)
    model, optimizer = opened()
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    assert torch.equal(model.get_parameter(GATE).detach().clone().cpu(), gate)
    model(**batch)
    assert torch.equal(model.get_parameter(GATE).detach().clone().cpu(), gate)
