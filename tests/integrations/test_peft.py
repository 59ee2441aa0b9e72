"""Models with adapters of peft train as with plain PyTorch and save peft's own folder, or are refused by name."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import outsize
from outsize.errors import UsageError
from tests.running import adamw, assert_same_losses, opened, train
from tests.zoo import ZOO, seeded

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def base(tmp_path):
    """A folder with the base model."""
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def plain_lora(base, **changes):
    with seeded(1):
        config = copy.deepcopy(LORA)
        for name, value in changes.items():
            setattr(config, name, value)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).train()


def in_transformers(base):
    with seeded(1):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.add_adapter(copy.deepcopy(LORA))
        return model.train()


BATCHES = [ZOO["llama"].batch(seed=seed) for seed in range(3)]


def losses_of(model):
    with torch.no_grad():
        return [float(model.eval()(**batch).loss) for batch in BATCHES]


def save_pretrained(model, out):
    model.save_pretrained(out)


@pytest.mark.parametrize("save", [outsize.save, save_pretrained])
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_adapters_are_saved_as_peft_does(save, changes, base, tmp_path):
    plain = plain_lora(base, **changes)
    model = opened(plain, disk=tmp_path, home="disk")
    assert_same_losses(train(model, BATCHES), train(plain, BATCHES))
    save(model, tmp_path / "out")
    expected = losses_of(model)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"} and "model.safetensors" not in names
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert losses_of(again) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("save", [outsize.save, save_pretrained])
def test_adapters_of_transformers_are_saved(save, base, tmp_path):
    model = opened(in_transformers(base), disk=tmp_path)
    train(model, BATCHES)
    save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(str(tmp_path / "out"))
    assert losses_of(again) == pytest.approx(losses_of(model), rel=1e-6)


def test_several_adapters_are_saved_each_in_its_folder(base, tmp_path):
    plain = plain_lora(base)
    plain.add_adapter("second", copy.deepcopy(LORA))
    model = opened(plain, disk=tmp_path)
    model(**BATCHES[0])
    outsize.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "second" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert losses_of(again) == pytest.approx(losses_of(model), rel=1e-6)


def test_saving_adapters_over_something_is_refused(base, tmp_path):
    model = opened(plain_lora(base), disk=tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        outsize.save(model, tmp_path / "out")
    outsize.save(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").exists() and (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("called", ["never called", "called"])
def test_adapters_put_into_an_opened_model_are_refused(called, base, tmp_path):
    model = outsize.load(base, disk=tmp_path, dtype="float32")
    if called == "called":
        model(**BATCHES[0])
    lora = get_peft_model(model, copy.deepcopy(LORA))
    named = r"q_proj \(Linear\) was replaced by a Linear|was put around a LlamaForCausalLM"
    for use in (
        lambda: lora(**BATCHES[0]),
        lambda: adamw(model),
        lambda: outsize.AdamW(lora, lr=1e-3),
        lambda: outsize.save(model, tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match=rf"({named})[\s\S]*hint: .*outsize\.wrap"):
            use()


def test_methods_that_add_adapters_to_an_opened_model_are_refused(base, tmp_path):
    model = outsize.load(base, disk=tmp_path, dtype="float32")
    with pytest.raises(UsageError, match=r"adapters cannot be added[\s\S]*get_peft_model"):
        model.add_adapter(copy.deepcopy(LORA))
    with pytest.raises(UsageError, match="adapters cannot be added"):
        model.load_adapter(str(tmp_path))
    assert model(**BATCHES[0]).loss is not None


def test_what_peft_would_do_to_weights_in_the_store_is_refused(base, tmp_path):
    model = opened(plain_lora(base), disk=tmp_path)
    before = losses_of(model)
    with pytest.raises(UsageError, match="store"):
        model.merge_and_unload()
    with pytest.raises(UsageError, match="store"):
        PeftModel.save_pretrained(model, tmp_path / "out")
    assert losses_of(model) == before
