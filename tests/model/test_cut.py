import pytest
import torch
import transformers
from torch import nn

from outsize.errors import ModelError
from outsize.model import PointKind, cut, open_skeleton
from tests.model.helpers import assert_covers
from tests.zoo import CAUSAL, ZOO, plain_stack


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("limit", [None, 1])
def test_every_parameter_is_in_exactly_one_block(name, limit):
    model = ZOO[name].build()
    assert_covers(model, cut(model, limit))


@pytest.mark.parametrize("name", ZOO)
def test_a_skeleton_is_cut_like_the_real_model(name):
    assert cut(open_skeleton(ZOO[name].config(), torch.float32)) == cut(ZOO[name].build())


@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_have_an_embedding_layers_and_a_head(name):
    model = ZOO[name].build()
    result = cut(model)
    kinds = [point.kind for point in result.points]
    assert kinds[0] is PointKind.EMBEDDING and kinds[-1] is PointKind.HEAD
    layers = [point for point in result.points if point.blocks[0].startswith("L")]
    assert [point.blocks for point in layers] == [("L00",), ("L01",), ("L02",)]
    assert all(point.kind is PointKind.LAYER for point in layers)


def test_names_and_order():
    assert [block.name for block in cut(ZOO["llama"].build()).blocks] == [
        "E00", "E01", "L00", "L01", "L02", "norm", "H00", "H01",
    ]  # fmt: skip


def test_no_block_is_larger_than_a_layer_or_64_rows():
    result = cut(ZOO["llama"].build())
    sizes = {block.name: block.num_elements for block in result.blocks}
    assert max(sizes.values()) == sizes["L00"]
    first = {block.name: block for block in result.blocks}["E00"].pieces[0]
    assert (first.row_start, first.row_stop) == (0, 192)
    small = [block for block in cut(ZOO["llama"].build(), 1).blocks if block.name.startswith("E")]
    assert [block.pieces[0].shape for block in small] == [(64, 32)] * 3 + [(7, 32)]


def test_tied_table_is_one_set_of_blocks():
    points = {point.module: point for point in cut(ZOO["t5"].build()).points}
    tables = [points[name] for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]
    assert {point.blocks for point in tables} == {("E00",)}
    assert {binding.parameter for point in tables for binding in point.bindings} == {"shared.weight"}
    assert [point.kind for point in tables] == [PointKind.EMBEDDING] * 3 + [PointKind.HEAD]


def test_head_bias_is_cut_with_the_rows():
    blocks = {block.name: block for block in cut(ZOO["phi"].build()).blocks}
    assert [(p.parameter, p.row_start, p.row_stop) for p in blocks["H01"].pieces] == [
        ("lm_head.weight", 192, 199),
        ("lm_head.bias", 192, 199),
    ]


def test_a_bias_that_the_head_shares_with_its_parent_belongs_to_the_head():
    result = cut(ZOO["albert"].build())
    assert [point.module for point in result.points if point.kind is PointKind.HEAD] == [
        "predictions.decoder"
    ]
    assert not [point for point in result.points if point.module == "predictions"]
    block = next(block for block in result.blocks if block.name == "E00")
    assert [piece.parameter for piece in block.pieces] == [
        "albert.embeddings.word_embeddings.weight",
        "predictions.bias",
    ]


def test_a_repeated_layer_is_one_point():
    result = cut(ZOO["albert"].build())
    assert [point.module for point in result.points if point.blocks[0] == "L00"] == [
        "albert.encoder.albert_layer_groups.0"
    ]


def test_a_vision_tower_and_a_decoder_both_count():
    result = cut(ZOO["llava"].build())
    owners = [point.module.rpartition(".layers")[0] for point in result.points if point.blocks[0][0] == "L"]
    assert owners == ["model.vision_tower.encoder"] * 2 + ["model.language_model"] * 2


def test_plain_module():
    model = plain_stack()
    result = cut(model)
    assert_covers(model, result)
    assert [(point.module, point.kind.value) for point in result.points] == [
        ("", "loose"),
        ("inlet", "layer"),
        ("layers.0", "layer"),
        ("layers.1", "layer"),
        ("layers.2", "layer"),
        ("outlet", "layer"),
    ]


def test_sequential_and_single_modules():
    sequence = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert [block.name for block in cut(sequence).blocks] == ["L00", "L01"]
    single = nn.Linear(4, 4)
    assert_covers(single, cut(single))


def test_parameter_lists_belong_to_the_module_that_reads_them():
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(8)) for _ in range(2)])

    model = Mix()
    result = cut(model)
    assert_covers(model, result)
    assert {binding.module for binding in result.points[0].bindings} == {"scales"}
    assert result.points[0].kind is PointKind.LOOSE


def test_a_parameter_shared_by_layers_has_a_block_of_its_own():
    model = plain_stack()
    model.layers[2][0].weight = model.layers[0][0].weight
    result = cut(model)
    assert_covers(model, result)
    points = {point.module: point.blocks for point in result.points}
    (shared,) = set(points["layers.0"]) & set(points["layers.2"])
    assert points["layers.0"] == (shared, "L00") and points["layers.2"] == (shared, "L02")


def test_a_table_that_is_also_needed_whole_is_not_cut():
    model = ZOO["llama_tied"].build()
    model.model.norm.extra = model.model.embed_tokens.weight
    result = cut(model)
    assert_covers(model, result)
    assert {point.kind for point in result.points} == {PointKind.LAYER}
    assert all(piece.is_whole for block in result.blocks for piece in block.pieces)


def test_an_embedding_that_rescales_its_rows_is_a_layer():
    model = ZOO["llama"].build()
    model.model.embed_tokens.max_norm = 1.0
    assert cut(model).points[0].kind is PointKind.LAYER


def test_bert_keeps_its_table_out_of_the_embeddings_module():
    config = transformers.BertConfig(
        vocab_size=199, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertForMaskedLM(config)
    result = cut(model)
    assert_covers(model, result)
    assert result.points[0].kind is PointKind.EMBEDDING


def test_integers_and_empty_models_are_refused():
    model = plain_stack()
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"codes has type torch.int8"):
        cut(model)
    with pytest.raises(ModelError, match="no parameters"):
        cut(nn.ReLU())
