import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import Chunk, Interleave, PermuteForRope, Transpose, WeightConverter

from outsize.block import Block, Piece
from outsize.errors import FileChangedError, ModelError, WeightsError
from outsize.model import (
    InitSource,
    SafetensorsSource,
    TensorSource,
    cut,
    file_digests,
    has_weights,
    open_skeleton,
)
from outsize.model.conversion import Group, Layouts, Run
from tests.model.helpers import assert_reads, edit_json, read, rows
from tests.weight_files import count_reads
from tests.zoo import ZOO, plain_stack, seeded


@pytest.fixture
def llama(tmp_path):
    """A folder with a saved model."""
    ZOO["llama"].build().save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "changed", metadata={"format": "pt"})
    (folder / "changed").rename(folder / "model.safetensors")


def opened(folder):
    skeleton = open_skeleton(folder, torch.float32)
    return SafetensorsSource(folder, skeleton), cut(skeleton)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", ZOO)
def test_blocks_equal_from_pretrained(name, shard, tmp_path):
    model = ZOO[name].build()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    expected = type(model).from_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.float32)
    source = SafetensorsSource(tmp_path, skeleton)
    assert_reads(source, cut(skeleton), expected)
    assert_reads(source, cut(skeleton, 1), expected)
    assert repr(skeleton._weight_conversions) == repr(expected._weight_conversions)
    assert source.unexpected == []
    source.close()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("file_type", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types_are_cast_as_from_pretrained_does(name, file_type, dtype, tmp_path):
    model = ZOO[name].build(dtype=file_type)
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=dtype)
    skeleton = open_skeleton(tmp_path, dtype)
    assert_reads(SafetensorsSource(tmp_path, skeleton), cut(skeleton), expected, dtype)


def test_a_read_touches_only_its_keys_and_rows(tmp_path, monkeypatch):
    ZOO["mixtral"].build().save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.float32)
    counts = count_reads(monkeypatch)
    source = SafetensorsSource(tmp_path, skeleton)
    assert not counts
    for block in cut(skeleton, 1).blocks:
        counts.clear()
        read(source, block)
        assert counts.total() == block.num_elements * 4
    counts.clear()
    read(source, next(block for block in cut(skeleton).blocks if block.name == "L01"))
    assert {key.split(".")[2] for key in counts} == {"1"}
    assert len(counts) == 4 * 3 + 7


@pytest.mark.parametrize("file_type", [torch.bfloat16, torch.float32])
def test_experts_that_are_read_one_by_one_are_read_once(file_type, tmp_path, monkeypatch):
    """Each expert is a piece of the stack that the model has, in a block of its own, and several keys in the file."""
    model = ZOO["mixtral"].build(dtype=file_type)
    model.save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.bfloat16)
    source = SafetensorsSource(tmp_path, skeleton)
    stacks = {name: value for name, value in model.named_parameters() if ".experts." in name}
    assert stacks and all(len(stack) > 2 for stack in stacks.values())
    counts = count_reads(monkeypatch)
    for name, stack in stacks.items():
        assert source.gives_rows(name)
        for expert, value in enumerate(stack):
            piece = Piece(name, (1, *value.shape), expert, expert + 1)
            assert source.conversion_bytes(piece) == 0
            (found,) = read(source, Block(f"{name}.{expert}", (piece,)), torch.bfloat16)
            assert torch.equal(found[0], value.to(torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    assert counts == {key: value.nbytes for key, value in stored.items() if ".experts." in key}
    assert sum(counts.values()) == sum(stack.nbytes for stack in stacks.values())


def test_projections_that_a_file_has_as_one_are_read_in_place_and_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    fused = torch.randn(12, 4)
    save_file({"qkv.weight": fused}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    names = ("q.weight", "k.weight", "v.weight")
    converter = WeightConverter("qkv.weight", list(names), operations=[Chunk(dim=0)])
    group = Group("q.weight", (("qkv.weight", "qkv.weight"),), converter)
    layouts = Layouts(transformers.LlamaForCausalLM(ZOO["llama"].config()), {"qkv.weight": (12, 4)})
    runs = layouts.runs(group, dict.fromkeys(names, (4, 4)))
    assert runs == {name: (Run("qkv.weight", 16 * at, 16),) for at, name in enumerate(names)}


@pytest.mark.parametrize(
    ("operation", "shape"),
    [(Transpose(0, 1), (4, 12)), (Interleave(dim=0), (12, 4)), (PermuteForRope(), (12, 4))],
)
def test_values_that_change_their_order_are_converted_as_a_whole(operation, shape):
    converter = WeightConverter("a.weight", "b.weight", operations=[operation])
    group = Group("b.weight", (("a.weight", "a.weight"),), converter)
    model = transformers.LlamaForCausalLM(ZOO["llama"].config())
    assert Layouts(model, {"a.weight": (12, 4)}).runs(group, {"b.weight": shape}) == {}


def test_views_on_a_slot_and_other_strides_are_filled(llama):
    source, result = opened(llama)
    block = result.blocks[2]
    slot = torch.zeros(block.num_elements)
    targets, start = [], 0
    for piece in block.pieces:
        targets.append(slot[start : start + piece.num_elements].view(piece.shape))
        start += piece.num_elements
    source.read(block, targets)
    assert all(torch.equal(a, b) for a, b in zip(targets, read(source, block), strict=True))
    strided = [torch.zeros(*piece.shape, 2)[..., 0] for piece in block.pieces]
    source.read(block, strided)
    assert all(torch.equal(a, b) for a, b in zip(targets, strided, strict=True))


def test_threads_may_read_at_once(llama):
    source, result = opened(llama)
    expected = [read(source, block) for block in result.blocks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda block: read(source, block), result.blocks))
            for have, want in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_base_model_weights_and_legacy_names(tmp_path):
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=199, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
    )
    model.save_pretrained(tmp_path)

    def old_names(tensors):
        for key in list(tensors):
            if "LayerNorm" in key:
                new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                )
                tensors[new] = tensors.pop(key)

    change_weights(tmp_path, old_names)
    source, result = opened(tmp_path)
    assert_reads(source, result, type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("removed", [True, False])
def test_base_model_prefix_is_added_and_removed(removed, tmp_path):
    model = ZOO["llama_tied"].build()
    if removed:
        model.model.save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
        expected = model
    else:
        model.save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", architectures=["LlamaModel"])
        expected = model.model
    source, result = opened(tmp_path)
    assert_reads(source, result, expected)


def test_persistent_buffers_are_filled(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("constant", torch.ones(2), persistent=False)

    model, other = Normed(), Normed()
    model.norm.running_mean.fill_(3.0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    SafetensorsSource(tmp_path, other)
    assert torch.equal(other.norm.running_mean, torch.full((4,), 3.0))


def test_plain_module(tmp_path):
    model = plain_stack()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert_reads(SafetensorsSource(tmp_path, plain_stack(1)), cut(model), model)


def test_unknown_keys_are_listed(llama):
    change_weights(llama, lambda tensors: tensors.update(surplus=torch.zeros(3)))
    with pytest.warns(RuntimeWarning, match="not read: surplus"):
        assert opened(llama)[0].unexpected == ["surplus"]


def test_either_name_of_a_tied_table_will_do_and_both_must_agree(tmp_path):
    model = ZOO["llama_tied"].build()
    model.save_pretrained(tmp_path)

    def under_the_other_name(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    change_weights(tmp_path, under_the_other_name)
    assert_reads(*opened(tmp_path), model)
    change_weights(
        tmp_path,
        lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["lm_head.weight"].clone()}),
    )
    assert_reads(*opened(tmp_path), model)
    change_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(WeightsError, match=r"are tied in the model[\s\S]*tie_word_embeddings"):
        opened(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("names", "said", "advised"),
    [
        ((), "has a config.json and no weights", "from_scratch=True"),
        (("model.safetensors.part",), "unfinished download: model.safetensors.part", "finish the download"),
        (("model.safetensors.incomplete",), "unfinished download", "finish the download"),
        (
            ("model-00001-of-00002.safetensors",),
            "shards without model.safetensors.index.json: model-00001-of-00002.safetensors",
            "fetch model.safetensors.index.json",
        ),
        (("adapter_config.json", "adapter_model.safetensors"), "a peft adapter", "base model"),
        (("consolidated.safetensors",), "names that transformers does not use", "convert it"),
        (("model.fp16.safetensors",), "under another name", "rename it"),
        (("pytorch_model.bin",), "pickled weights", "save_pretrained writes safetensors"),
        (("pytorch_model.pt",), "pickled weights", "save_pretrained writes safetensors"),
        (("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"), "pickled weights", "save_pre"),
        (("consolidated.00.pth", "params.json"), "pickled weights under names", "convert it"),
        (("model-Q4_K_M.gguf",), "GGUF weights, expected safetensors: model-Q4_K_M.gguf", "gguf_file=NAME"),
        (("tf_model.h5",), "another framework", "save it again"),
        (("fp16/model.safetensors",), "its folder fp16 has model.safetensors", "move the weights from"),
        (("checkpoint-5/model.safetensors", "checkpoint-5/config.json"), "its folder checkpoint-5", "pass "),
        (("training_args.bin", "README.md"), "has a config.json and no weights", "from_scratch=True"),
    ],
)
def test_a_folder_without_weights_is_refused_by_what_it_has(names, said, advised, tmp_path):
    ZOO["llama"].build().config.save_pretrained(tmp_path)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=re.escape(said)) as caught:
        opened(tmp_path)
    assert advised in caught.value.hint
    if "no weights" in said:
        assert not has_weights(tmp_path)
    else:
        with pytest.raises(WeightsError, match=re.escape(said)):
            has_weights(tmp_path)


def test_a_link_to_nothing_and_a_pointer_of_git_lfs_are_named(llama):
    file = llama / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(WeightsError, match=r"pointer of Git LFS[\s\S]*git lfs pull"):
        opened(llama)
    file.unlink()
    file.symlink_to(llama / "blob")
    with pytest.raises(WeightsError, match="a link to a file that does not exist"):
        opened(llama)


class _Optional(nn.Module):
    """Says, as some models of transformers do, that files need not hold two of its parameters."""

    _keys_to_ignore_on_load_missing: ClassVar = ["scale", "head"]

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.LayerNorm(4)
        self.register_buffer("shift", torch.zeros(2))


def test_optional_parameters_are_computed_and_never_random(tmp_path):
    model = _Optional()
    stored = {name: value for name, value in model.state_dict().items() if not name.startswith("scale")}
    save_file(stored, tmp_path / "model.safetensors")
    assert_reads(SafetensorsSource(tmp_path, _Optional()), cut(model), model)
    save_file(
        {name: value for name, value in stored.items() if name != "head.weight"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(WeightsError, match=r"has no weights for head\.weight"):
        SafetensorsSource(tmp_path, _Optional())


def test_buffers_that_are_absent_are_named(tmp_path):
    model = _Optional()
    save_file(
        {name: value for name, value in model.state_dict().items() if name != "shift"},
        tmp_path / "model.safetensors",
    )
    with pytest.warns(RuntimeWarning, match="no values for the buffers shift"):
        SafetensorsSource(tmp_path, model)


def test_absent_shard_and_bad_index(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("model-*"))[1]
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(WeightsError, match=rf"1 are absent: {victim.name}"):
        opened(tmp_path)
    victim.write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in [
        ("{}", "not an index"),
        ("{", "not an index"),
        (json.dumps({"weight_map": {"a": "../outside.safetensors"}}), "outside its folder"),
    ]:
        index.write_text(text)
        with pytest.raises(WeightsError, match=message):
            opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(llama, keep):
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(WeightsError, match=r"cut short[\s\S]*fetch the file again"):
        opened(llama)


def test_malformed_header(llama):
    file = llama / "model.safetensors"
    for header in (b"not json", b'{"a": {"dtype": "F32"}}', b"[]"):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(WeightsError, match="malformed"):
            opened(llama)
    for dtype, end, message in (("F4", 8, "not supported"), ("F32", 8, "8 bytes")):
        header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, end]}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        with pytest.raises(WeightsError, match=message):
            opened(llama)


def test_missing_keys_are_named(llama):
    def remove(tensors):
        for key in [key for key in tensors if "self_attn" in key]:
            del tensors[key]

    change_weights(llama, remove)
    with pytest.raises(WeightsError, match=r"model.layers.0.self_attn.q_proj.weight.* and 7 more"):
        opened(llama)


def test_wrong_shape_is_named(llama):
    def shrink(tensors):
        tensors["model.norm.weight"] = torch.zeros(5)

    change_weights(llama, shrink)
    with pytest.raises(WeightsError, match=r"model.norm.weight has shape \[5\] in .*, expected \[32\]"):
        opened(llama)


def test_a_missing_expert_is_named(tmp_path):
    ZOO["mixtral"].build().save_pretrained(tmp_path)

    def remove(tensors):
        del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]

    change_weights(tmp_path, remove)
    with pytest.raises(WeightsError, match=r"layers.1"):
        opened(tmp_path)


def test_a_file_that_is_cut_while_training(llama):
    source, result = opened(llama)
    with (llama / "model.safetensors").open("r+b") as stream:
        stream.truncate(4000)
    with pytest.raises(
        FileChangedError, match=r"model\.safetensors was cut short since it was opened: 4000 bytes"
    ):
        for block in result.blocks:
            read(source, block)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_that_is_gone_or_replaced_is_still_read(is_replaced, llama):
    source, result = opened(llama)
    expected = [read(opened(llama)[0], block) for block in result.blocks]
    if is_replaced:
        change_weights(llama, lambda tensors: [value.neg_() for value in tensors.values()])
    else:
        (llama / "model.safetensors").unlink()
    for block, values in zip(result.blocks, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read(source, block), values, strict=True))


def test_another_header_is_told_whatever_the_times_say(llama):
    source, _ = opened(llama)
    source.check()
    file = llama / "model.safetensors"
    times = file.stat()
    with file.open("r+b") as stream:
        stream.write(file.read_bytes().replace(b"model.norm.weight", b"model.form.weight"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        FileChangedError, match=r"model\.safetensors holds other tensors than when it was opened"
    ):
        source.check()


def test_digests_tell_what_files_hold_and_not_where_they_lie(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = file_digests(tmp_path / "a")
    assert len(first) > 2 and file_digests(tmp_path / "b") == first
    file = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last tensor is small: all of it is sampled from its middle on
    file.write_bytes(data)
    changed = [name for name, digest in file_digests(tmp_path / "b").items() if digest != first[name]]
    assert changed == [file.name]


# Tensors in memory


def test_tensors_from_memory():
    model = ZOO["t5"].build()
    source = TensorSource(dict(model.named_parameters()))
    assert_reads(source, cut(model, 1), model)
    with pytest.raises(WeightsError, match="no tensor for"):
        read(TensorSource({}), cut(model).blocks[0])
    wrong = {name: torch.zeros(1, 1) for name, _ in model.named_parameters()}
    with pytest.raises(WeightsError, match="has shape"):
        read(TensorSource(wrong), cut(model).blocks[0])


# From nothing


@pytest.mark.parametrize("name", ZOO)
def test_initial_values_are_distributed_as_from_config(name):
    with seeded(0):
        expected = getattr(transformers, ZOO[name].model_class)._from_config(ZOO[name].config())
    skeleton = open_skeleton(ZOO[name].config(), torch.float32)
    source, result = InitSource(skeleton, 3), cut(skeleton)
    state = torch.get_rng_state()
    found = {key: torch.zeros(parameter.shape) for key, parameter in skeleton.named_parameters()}
    for block in result.blocks:
        for piece, value in zip(block.pieces, read(source, block), strict=True):
            rows(found[piece.parameter], piece).copy_(value)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for key, parameter in expected.named_parameters():
        tolerance = 6 / parameter.numel() ** 0.5
        for figure in (lambda value: value.std(correction=0), lambda value: value.abs().mean()):
            have, want = figure(found[key]).item(), figure(parameter.detach()).item()
            assert abs(have - want) <= tolerance * abs(want) + 1e-9, (key, have, want)


def test_initial_values_depend_on_seed_and_block_only():
    skeleton = open_skeleton(ZOO["gpt2"].config(), torch.float32)
    blocks = cut(skeleton).blocks
    source = InitSource(skeleton, 0)
    first = {block.name: read(source, block) for block in blocks}
    torch.manual_seed(99)
    again = InitSource(open_skeleton(ZOO["gpt2"].config(), torch.float32), 0)
    for block in reversed(blocks):
        assert all(torch.equal(a, b) for a, b in zip(first[block.name], read(again, block), strict=True))
    other = read(InitSource(skeleton, 1), blocks[0])
    assert not torch.equal(other[0], first[blocks[0].name][0])
    assert not torch.equal(first["L00"][2], first["L01"][2])


def test_the_row_of_padding_is_zero_wherever_it_lies():
    skeleton = open_skeleton(ZOO["llama"].config(pad_token_id=130), torch.float32)
    source = InitSource(skeleton, 0)
    for block in cut(skeleton, 1).blocks[:4]:
        (piece,) = block.pieces
        (value,) = read(source, block)
        zero = [piece.row_start + index for index in range(len(value)) if not value[index].any()]
        assert zero == ([130] if piece.row_start <= 130 < piece.row_stop else [])


def test_a_parameter_that_the_model_does_not_initialise_is_named():
    model = plain_stack()
    source = InitSource(model, 0)
    blocks = {block.name: block for block in cut(model).blocks}
    assert read(source, blocks["inlet"])[0].std() > 0
    with pytest.raises(ModelError, match="no initial value to scale"):
        read(source, blocks["root"])


def test_sinusoidal_tables_that_no_file_holds_are_computed(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=199, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, architectures=["MarianMTModel"],
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.float32)
    assert_reads(SafetensorsSource(tmp_path, skeleton), cut(skeleton, 1), model)


def test_values_that_only_a_constructor_gives_are_kept():
    config = transformers.ApertusConfig(
        vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, architectures=["ApertusForCausalLM"],
    )  # fmt: skip
    skeleton = open_skeleton(config, torch.float32)
    model = transformers.ApertusForCausalLM._from_config(config)
    block = next(block for block in cut(skeleton).blocks if block.name == "L01")
    for piece, value in zip(block.pieces, read(InitSource(skeleton, 0), block), strict=True):
        if "act_fn" in piece.parameter:
            assert torch.equal(value, model.get_parameter(piece.parameter))
