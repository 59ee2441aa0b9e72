"""Saving: what was trained is what is written, bit for bit, and what `from_pretrained` reads."""

import copy
import gc
import math
import weakref

import pytest
import torch
import transformers
from torch import nn

import outsize
from outsize import Pins
from outsize.errors import ModelError, UsageError, WeightsError
from tests.model.helpers import stored
from tests.running import adamw, assert_same_losses, assert_same_weights, opened, train, values_of
from tests.seams import abandon, has_memory, source_of
from tests.zoo import ZOO, plain_batch, plain_stack, seeded

NAMES = ("llama", "llama_tied", "gpt2", "mixtral", "t5", "vit", "albert", "llava")


def trained(name, tmp_path, steps=2, **options):
    scratch = tmp_path / "disk"
    scratch.mkdir()
    model = opened(ZOO[name].build().train(), disk=scratch, home="disk", pins=Pins(weight_slots=1), **options)
    train(model, [ZOO[name].batch(seed=seed) for seed in range(steps)])
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_what_was_trained(name, tmp_path):
    model = trained(name, tmp_path)
    outsize.save(model, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    expected = values_of(model)
    saved = dict(again.named_parameters())
    assert set(expected) == set(saved)
    for parameter, value in expected.items():
        assert torch.equal(saved[parameter], value), parameter
    batch = ZOO[name].batch(seed=9)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits + 0, again(**batch).logits, rtol=1e-5, atol=1e-6)


def test_what_is_saved_changed_since_the_source_was_read(tmp_path):
    plain = ZOO["llama_tied"].build()
    model = trained("llama_tied", tmp_path, steps=1)
    outsize.save(model, tmp_path / "out")
    files = stored(tmp_path / "out")
    assert "lm_head.weight" not in files
    assert not any(torch.equal(value, plain.state_dict()[key]) for key, value in files.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_does_not_disturb_training(dtype, tmp_path):
    results = []
    for saves in (False, True):
        folder = tmp_path / str(saves)
        folder.mkdir()
        (folder / "disk").mkdir()
        model = opened(ZOO["llama"].build().train(), disk=folder / "disk", home="disk", dtype=dtype)
        optimizer = adamw(model)
        for seed in range(3):
            model(**ZOO["llama"].batch(seed=seed)).loss.backward()
            if saves:
                outsize.save(model, folder / f"before{seed}")
            optimizer.step()
            if saves:
                model.save_pretrained(folder / f"after{seed}")
            optimizer.zero_grad()
        results.append(values_of(model))
        if saves:
            assert set(stored(folder / "after1")) == set(stored(folder / "before1"))
            first, second = stored(folder / "after1"), stored(folder / "before2")
            assert all(torch.equal(first[key], second[key]) for key in first)
            assert not torch.equal(first["lm_head.weight"], stored(folder / "after2")["lm_head.weight"])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_save_pretrained_is_save(tmp_path):
    model = trained("qwen3", tmp_path)
    outsize.save(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "two", safe_serialization=True)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "two" / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()


def test_bf16_is_saved_as_bf16(tmp_path):
    model = trained("llama", tmp_path, dtype="bfloat16")
    outsize.save(model, tmp_path / "out")
    files = stored(tmp_path / "out")
    assert {value.dtype for value in files.values()} == {torch.bfloat16}
    assert torch.equal(files["model.norm.weight"], model.model.norm.weight.detach().clone())


def test_a_sharded_folder_is_read_and_trained(tmp_path):
    plain = ZOO["llama"].build()
    plain.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    model = outsize.load(tmp_path / "model", dtype="float32", home="disk", disk=tmp_path).train()
    data = [ZOO["llama"].batch(seed=seed) for seed in range(3)]
    assert_same_losses(train(model, data), train(plain.train(), data))
    assert_same_weights(model, plain)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    again = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[name], value) for name, value in values_of(model).items())


def test_saving_before_anything_was_called(tmp_path):
    plain = ZOO["llama_tied"].build()
    model = opened(plain)
    outsize.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, dict(plain.named_parameters())[n]) for n, p in again.named_parameters())


def test_saving_over_something_is_refused(tmp_path):
    model = opened(plain_stack())
    outsize.save(model, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        outsize.save(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_config_alone_is_initialised_where_that_is_asked_for(dtype, tmp_path):
    ZOO["llama_tied"].config().save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match=r"no weights[\s\S]*from_scratch=True"):
        outsize.load(tmp_path / "model", dtype=dtype)
    losses, models = [], []
    for index, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(index)
        folder.mkdir()
        options = {"home": "disk", "disk": folder} if index == 0 else {}
        model = outsize.load(tmp_path / "model", from_scratch=True, dtype=dtype, seed=seed, **options).train()
        batch = ZOO["llama_tied"].batch()
        losses.append(train(model, [batch] * 8, adamw(model, lr=1e-2)))
        models.append(values_of(model))
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][0] == pytest.approx(math.log(199), rel=0.02)
    assert losses[0][-1] < losses[0][0] - 0.3
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# -- wrap ------------------------------------------------------------------------------------------------------------


def test_a_plain_module_trains(tmp_path):
    plain = plain_stack()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    data = [plain_batch(seed=seed) for seed in range(5)]
    assert_same_losses(train(model, data), train(plain, data))
    assert_same_weights(model, plain)
    outsize.save(model, tmp_path / "out")
    files = stored(tmp_path / "out")
    assert all(torch.equal(files[name], value) for name, value in values_of(model).items())


class Classifier(nn.Module):
    """`torch.nn.TransformerEncoder` between two linear layers."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.outlet = nn.Linear(16, 1)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.outlet(self.encoder(self.inlet(x[:, None]))[:, 0]), y)


def test_a_transformer_of_torch_trains(tmp_path):
    with seeded(0):
        plain = Classifier().train()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    data = [plain_batch(seed=seed) for seed in range(5)]
    for subject in (model, plain):
        torch.manual_seed(1)
        train(subject, data)
    assert_same_weights(model, plain)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.allclose(model(**data[0]), plain(**data[0]), rtol=1e-5)


def test_wrapping_takes_a_model_in_place(tmp_path):
    module = ZOO["llama"].build()
    twin = copy.deepcopy(module)
    assert outsize.wrap(module, disk=tmp_path, home="disk") is module
    assert all(
        torch.equal(p.detach().clone(), q)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True)
    )
    train(module, [ZOO["llama"].batch()])
    train(twin, [ZOO["llama"].batch()])
    assert_same_weights(module, twin)


def test_wrapping_a_model_on_meta_initialises_it():
    with torch.device("meta"):
        module = Classifier().eval()
    model = outsize.wrap(module, seed=3)
    assert 0 < float(model.inlet.weight.detach().abs().mean()) < 1
    assert torch.isfinite(torch.tensor(train(model, [plain_batch()]))).all()


def test_a_first_call_that_fails_keeps_nothing(tmp_path):
    with torch.device("meta"):
        module = plain_stack()  # its `scale` has no rule that would initialise it
    model = outsize.wrap(module, disk=tmp_path, home="disk")
    outsize.AdamW(model)
    with pytest.raises(ModelError, match="no initial value to scale"):
        model(**plain_batch())
    try:
        assert not has_memory(model)
        assert not list(tmp_path.iterdir())
    finally:
        abandon(model)


def test_tensors_that_were_taken_over_are_let_go(tmp_path):
    """Once everything is on disk, memory holds no second copy of the model."""

    class Watched(torch.Tensor):
        pass

    module = plain_stack()
    module.inlet.weight = nn.Parameter(module.inlet.weight.detach().as_subclass(Watched))
    model = outsize.wrap(module, disk=tmp_path, home="disk")
    reference = weakref.ref(source_of(model)._tensors["inlet.weight"])
    train(model, [plain_batch()])
    gc.collect()
    assert reference() is None


def test_the_model_keeps_its_look(tmp_path):
    plain = ZOO["llama"].build()
    model = opened(plain, disk=tmp_path, home="disk")
    assert type(model) is type(plain) and model.config.to_dict() == plain.config.to_dict()
    assert model.num_parameters() == plain.num_parameters()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == {
        n: tuple(v.shape) for n, v in plain.state_dict().items()
    }
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.dtype is plain.dtype and model.device == plain.device
