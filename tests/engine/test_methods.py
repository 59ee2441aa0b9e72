"""Methods of transformers that a model under Outsize answers itself: they work as there, or are refused by name."""

import json

import pytest
import torch
import transformers

import outsize
from outsize.errors import UsageError
from tests.model.helpers import stored
from tests.running import opened
from tests.zoo import ZOO


@pytest.fixture
def model(tmp_path):
    return opened(ZOO["llama"].build(), disk=tmp_path)


def assert_opens(folder, model):
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, model.get_parameter(n).detach() + 0) for n, p in again.named_parameters())


def test_save_pretrained_takes_the_arguments_of_transformers(model, tmp_path):
    out = tmp_path / "out"
    model.save_pretrained(save_directory=str(out), max_shard_size="20KB", is_main_process=True, variant=None)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert_opens(out, model)
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second").exists()


def test_save_pretrained_updates_a_folder_and_leaves_the_files_of_others(model, tmp_path):
    """As Trainer needs it: the tokenizer and earlier checkpoints are in the folder already."""
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "checkpoint-2" / "model.safetensors").write_bytes(b"theirs")
    (out / "tokenizer.json").write_text("{}")
    model.save_pretrained(out, max_shard_size="20KB")
    model.save_pretrained(out)
    assert (out / "checkpoint-2" / "model.safetensors").read_bytes() == b"theirs"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    model.save_pretrained(out, max_shard_size="20KB")
    assert not (out / "model.safetensors").exists() and (out / "model.safetensors.index.json").exists()
    assert not list(out.glob(".*"))
    assert_opens(out, model)


def test_saving_over_an_earlier_model_where_that_is_allowed(model, tmp_path):
    outsize.save(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty[\s\S]*overwrite=True"):
        outsize.save(model, tmp_path / "out")
    outsize.save(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert_opens(tmp_path / "out", model)


REFUSED = {
    "push_to_hub": {"push_to_hub": True},
    "variant": {"variant": "fp16"},
    "safe_serialization": {"safe_serialization": False},
    "state_dict": {"state_dict": {"lm_head.weight": torch.zeros(1)}},
    "state_dict of less": {"state_dict": {}},
    "compression": {"compression": "zip"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_would_be_ignored_are_refused(option, model, tmp_path):
    with pytest.raises(UsageError, match=rf"save_pretrained\({option.split()[0]}=[\s\S]*hint: leave"):
        model.save_pretrained(tmp_path / "out", **REFUSED[option])
    assert not (tmp_path / "out").exists()


def test_its_own_state_dict_may_be_passed(model, tmp_path):
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    assert set(stored(tmp_path / "out")) == set(model.state_dict())


def test_resizing_is_refused_and_the_model_is_unharmed(model):
    batch = ZOO["llama"].batch()
    before = model(**batch).loss
    with pytest.raises(UsageError, match=r"199 rows cannot become 210[\s\S]*hint: resize it first"):
        model.resize_token_embeddings(210)
    with pytest.raises(UsageError, match="199 rows cannot become 256"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 199 and torch.equal(model(**batch).loss, before)


def test_resizing_to_the_same_size_changes_nothing(model):
    """Scripts do it without asking whether the tokenizer grew."""
    assert model.resize_token_embeddings(199) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_the_hint_of_resizing_works(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain.resize_token_embeddings(210)
    plain.save_pretrained(tmp_path / "larger")
    assert json.loads((tmp_path / "larger" / "config.json").read_text())["vocab_size"] == 210
    model = outsize.load(tmp_path / "larger", disk=tmp_path, dtype="float32")
    assert model(torch.tensor([[205, 3]])).logits.shape == (1, 2, 210)
