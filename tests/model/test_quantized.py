"""Models in few bits: what they compute, the folders they are written to, what is refused."""

import copy
import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import outsize
from outsize import Pins
from outsize.config import Weights
from outsize.errors import ConfigError, ModelError, UsageError, WeightsError
from outsize.quant import FORMATS, QuantizedLinear, quantize
from tests.seams import compute_dtype, parameter_value

_DECODER = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FAMILIES = {
    "Qwen2": {},  # with biases
    "Mixtral": {"num_local_experts": 4},  # a checkpoint with each expert by itself
    "Qwen3Moe": {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
    },  # transposed, biases
    "DeepseekV3": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
}


def build(family, **changes):
    """A model whose numbers are those of bfloat16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_DECODER, **FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
            if parameter.dim() > 1:
                parameter.mul_(4)  # as alive as one that was trained
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "qwen2"
    build("Qwen2").save_pretrained(path)
    return path


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def logits_of(model):
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def decoded(plain, weights):
    """`plain` in bfloat16, with what codes stand for in the place of its matrices."""
    shell = type(plain)(copy.deepcopy(plain.config)).to("meta")
    names = [f"model.layers.{index}" for index in range(2)]
    matrices, _ = quantize(shell, names, weights, frozenset())
    form = FORMATS[weights]
    with torch.no_grad():
        for name, matrix in matrices.items():
            value = plain.get_parameter(name)
            for part in value if value.dim() == 3 else [value]:
                rows = part.T if matrix.is_transposed else part
                meant = form.decode(form.encode(rows.contiguous()))
                part.copy_(meant.T if matrix.is_transposed else meant)
    assert len(matrices) >= 12
    return plain.bfloat16()


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_its_codes_stand_for(family, weights, tmp_path):
    plain = build(family)
    plain.save_pretrained(tmp_path / "plain")
    model = outsize.load(tmp_path / "plain", weights=weights)
    found, exact = logits_of(model), logits_of(plain)
    meant = logits_of(decoded(plain, weights))
    # The median of tokens: a token that is nearly between two experts goes to either.
    distance = ((found - meant).norm(dim=-1) / meant.norm(dim=-1)).median()
    lost = ((meant - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
    assert distance < 0.05, (distance, lost)
    assert weights is Weights.INT8 or lost > 2 * distance, "rounding to four bits is what shows"
    assert not any(parameter.requires_grad for parameter in model.parameters())

    outsize.save(model, tmp_path / "written")
    again = outsize.load(tmp_path / "written")
    assert torch.equal(logits_of(again), found)
    assert torch.equal(logits_of(outsize.load(tmp_path / "written", weights=weights)), found)


def test_a_written_folder_is_small_and_says_what_it_is(folder, tmp_path):
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    outsize.save(outsize.load(folder, dtype="bfloat16"), tmp_path / "whole")
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "outsize",
        "weights": "int4",
        "modules_to_not_convert": ["lm_head"],
    }
    size, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("int4", "whole"))
    vocabulary = 2 * 2 * 256 * 128
    assert (size - vocabulary) < 0.32 * (whole - vocabulary)
    names = load_file(tmp_path / "int4" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight_scale" in names


@pytest.mark.parametrize("written", [False, True])
def test_streaming_changes_no_bit(folder, tmp_path, caplog, written):
    place = folder
    if written:
        place = tmp_path / "int4"
        outsize.save(outsize.load(folder, weights="int4"), place)
    resident = outsize.load(place, weights="int4", home="host")
    expected = logits_of(resident)
    once = outsize.report(resident).bytes_read
    assert torch.equal(logits_of(resident), expected) and outsize.report(resident).bytes_read == once
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        streamed = outsize.load(place, weights="int4", disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
        assert torch.equal(logits_of(streamed), expected)
    assert any("packing weights into int4" in record.message for record in caplog.records) is not written
    before = outsize.report(streamed).bytes_read
    assert torch.equal(logits_of(streamed), expected)
    read = outsize.report(streamed).bytes_read - before
    num_bytes = sum(parameter.numel() for parameter in streamed.parameters()) * 2
    assert 0.5 * num_bytes < read < 1.5 * num_bytes


def test_parts_give_the_bits_of_the_whole(folder, monkeypatch):
    expected = logits_of(outsize.load(folder, weights="int4"))
    monkeypatch.setattr("outsize.model.encoding._READ_ELEMENTS", 128 * 64)
    monkeypatch.setattr("outsize.model.encoding._ENCODED_ELEMENTS", 1)
    assert torch.equal(logits_of(outsize.load(folder, weights="int4")), expected)


def test_weights_from_nothing(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = outsize.load(tmp_path, weights="int8", from_scratch=True, seed=3)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(
        logits_of(outsize.load(tmp_path, weights="int8", from_scratch=True, seed=3)), logits_of(model)
    )


def test_what_chooses_experts_stays():
    model = build("Mixtral").to("meta")
    matrices, stayed = quantize(
        model, ["model.layers.0"], Weights.INT4, frozenset({"model.layers.0.self_attn.q_proj"})
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in matrices
    assert not any("gate.weight" in name or "q_proj" in name or "layers.1" in name for name in matrices)
    assert {"model.layers.0.self_attn.q_proj", "lm_head", "model.layers.1.mlp.experts"} < set(stayed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weights='int3'"),
        ({"weights": "int4", "dtype": "float32"}, "with weights in few bits"),
    ],
)
def test_what_cannot_be_asked_for(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        outsize.load(folder, **options)


def test_a_folder_of_other_bits_is_refused(folder, tmp_path):
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    with pytest.raises(ConfigError, match="are in int4 already"):
        outsize.load(tmp_path / "int4", weights="int8")
    with pytest.raises(ConfigError, match="with weights in few bits"):
        outsize.load(tmp_path / "int4", dtype="float32")
    path = tmp_path / "int4" / "config.json"
    path.write_text(path.read_text().replace('"int4"', '"int2"'))
    with pytest.raises(ModelError, match="'int2' are not known"):
        outsize.load(tmp_path / "int4")


def test_a_folder_whose_codes_are_of_another_shape_is_refused(folder, tmp_path):
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    path = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][1:].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"up_proj.weight has shape"):
        outsize.load(tmp_path / "int4")


def without_scales(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_other_scales(path):
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].float()[:, :-2].clone()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no weights"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
        (lambda path: os.truncate(path, 100), "cut short"),
        (lambda path: path.write_bytes(b"\x00" * 8 + path.read_bytes()), "malformed|cut short"),
        (without_scales, r"no weights for model.layers.1.mlp.up_proj.weight_scale"),
        (with_other_scales, r"up_proj.weight_scale has shape"),
    ],
)
def test_a_damaged_folder_is_named(folder, tmp_path, damage, message):
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    damage(tmp_path / "int4" / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        outsize.load(tmp_path / "int4")
    assert str(tmp_path / "int4") in str(caught.value)


def test_codes_of_any_bytes_survive(folder, tmp_path):
    """Codes are bfloat16 to all that moves them, also those that would be no number: no way may change a bit of them."""
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    special = torch.cat([torch.arange(0x7F80, 0x8000), torch.arange(0xFF80, 0x10000)])  # NaNs, infinities
    every = torch.cat([special, torch.arange(0, 0x10000, 11)])[: tensors[name].numel()]
    codes = torch.zeros(tensors[name].numel(), dtype=torch.int32)
    codes[: every.numel()] = every.int()
    codes = codes.to(torch.uint16).view(tensors[name].shape)
    tensors[name] = codes.view(torch.bfloat16)
    save_file(tensors, tmp_path / "int4" / "model.safetensors", metadata={"format": "pt"})

    model = outsize.load(tmp_path / "int4", disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    values = [parameter_value(model, name)]
    outsize.save(model, tmp_path / "before")
    logits_of(model)
    values.append(parameter_value(model, name))
    outsize.save(model, tmp_path / "after")
    values += [load_file(tmp_path / when / "model.safetensors")[name] for when in ("before", "after")]
    assert all(torch.equal(value.view(torch.uint16).int(), codes.int()) for value in values)


def test_a_model_without_such_matrices_is_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no matrix that can be kept in int4"):
        outsize.load(tmp_path, weights="int4")


def test_nothing_trains(folder):
    model = outsize.load(folder, weights="int4")
    with pytest.raises(UsageError, match="nothing in the model trains"):
        outsize.AdamW(model)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UsageError, match="cannot be trained, nor gone back through"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_weights_that_are_not_finite_are_named(changed):
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    model = outsize.load(changed, weights="int4")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down_proj.weight has weights that are not finite"):
        logits_of(model)
    with pytest.raises(WeightsError):
        outsize.save(outsize.load(changed, weights="int4"), changed / "int4")
    assert not (changed / "int4").exists()


def test_a_plan_for_training_is_refused(folder, tmp_path):
    outsize.save(outsize.load(folder, weights="int4"), tmp_path / "int4")
    with pytest.raises(ModelError, match="few bits are not trained"):
        outsize.preview(tmp_path / "int4", batch_size=1, seq_len=16)
    small, large = (
        outsize.preview(each, train=False, batch_size=1, seq_len=16) for each in (tmp_path / "int4", folder)
    )
    assert small.num_parameters < large.num_parameters
    assert compute_dtype(outsize.load(tmp_path / "int4")) is torch.bfloat16
