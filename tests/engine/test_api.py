"""Opening models: what `load`, `wrap` and the package itself promise."""

import inspect
import os
import pydoc

import pytest
import torch
import transformers

import outsize
from outsize.engine import api
from outsize.engine.api import Options, settings_of
from outsize.engine.preview import PreviewOptions, preview
from outsize.errors import ConfigError, ModelError, OutsizeError, UsageError, WeightsError
from tests.running import adamw, opened, train
from tests.seams import compute_dtype
from tests.zoo import ZOO, plain_batch, plain_stack


def test_loading_reads_no_weights(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data, times = file.read_bytes(), file.stat()
    model = outsize.load(tmp_path, dtype="float32")
    file.write_bytes(data[:-4000] + bytes(4000))  # the values that lie last
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # else reading says that they are others
    read = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = dict(ZOO["llama"].build().named_parameters())
    assert not all(torch.equal(read[name], expected[name]) for name in read)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "t5"])
def test_a_loaded_model_is_the_model_in_the_folder(name, tmp_path):
    plain = ZOO[name].build()
    plain.save_pretrained(tmp_path)
    model = outsize.load(tmp_path, dtype="float32")
    assert type(model) is type(plain)
    for parameter, value in plain.named_parameters():
        assert torch.equal(model.get_parameter(parameter).detach().clone(), value), parameter
    with torch.no_grad():
        batch = ZOO[name].batch()
        assert torch.allclose(model(**batch).loss, plain(**batch).loss, rtol=1e-5)


def test_folders_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(OutsizeError, match="absent"):
        outsize.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        outsize.load(tmp_path / "empty")
    ZOO["llama"].build().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError):
        outsize.load(tmp_path / "cut")


def test_wrapping_twice_is_refused_and_harmless():
    model = opened(plain_stack())
    before = model.outlet.weight.detach().clone()
    with pytest.raises(UsageError, match="under Outsize already"):
        outsize.wrap(model)
    train(model, [plain_batch()])
    assert not torch.equal(model.outlet.weight.detach().clone(), before)


def test_the_type_follows_the_module():
    assert compute_dtype(opened(plain_stack())) is torch.float32
    assert compute_dtype(opened(ZOO["llama"].build(dtype=torch.bfloat16))) is torch.bfloat16
    assert compute_dtype(outsize.wrap(plain_stack(), dtype="bfloat16")) is torch.bfloat16
    assert compute_dtype(outsize.wrap(plain_stack(), dtype=torch.bfloat16)) is torch.bfloat16


@pytest.mark.parametrize("name", ["load", "wrap", "preview", "pipeline"])
def test_signatures_and_help_show_every_option(name):
    parameters = inspect.signature(getattr(outsize, name)).parameters
    expected = dict.fromkeys(Options.__annotations__) | {"on_device_full": "error"}
    assert {option: parameters[option].default for option in expected} == expected
    assert (
        all(each.kind is not each.VAR_KEYWORD for each in parameters.values()) and "passes" not in parameters
    )
    assert str(inspect.signature(getattr(outsize, name))) in pydoc.plain(
        pydoc.render_doc(getattr(outsize, name))
    )


def test_types_of_options_are_those_of_what_parses_them():
    for options, function, also in ((Options, settings_of, set()), (PreviewOptions, preview, {"passes"})):
        parameters = inspect.signature(function).parameters.values()
        annotated = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
        typed = {name: each.__forward_arg__ for name, each in options.__annotations__.items()}
        assert typed == {name: each for name, each in annotated.items() if name not in also}


@pytest.mark.parametrize("keyword", ["hots", "attention", "weights"])
def test_a_keyword_that_is_unknown_is_refused(keyword):
    with pytest.raises(TypeError, match=keyword):
        outsize.wrap(torch.nn.Linear(2, 2), **{keyword: None})


def test_signatures_of_forwards_are_kept():
    plain, model = ZOO["llama"].build(), opened(ZOO["llama"].build())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    layer, expected = model.model.layers[0], plain.model.layers[0]
    assert inspect.signature(layer.forward) == inspect.signature(expected.forward)
    assert type(layer).forward is type(expected).forward, "the class stays as it is"


def test_a_session_belongs_to_its_model_alone():
    model = opened(plain_stack())
    assert outsize.report(model).num_parameters > 0
    with pytest.raises(UsageError, match="not a model of Outsize"):
        outsize.report(model.layers)


def test_native_types_follow_the_processor(monkeypatch, tmp_path):
    for flags, expected in (
        ("flags : amx_bf16", "bfloat16"),
        ("flags : avx512_bf16", "bfloat16"),
        ("avx2", "float32"),
    ):
        monkeypatch.setattr(api.Path, "read_text", lambda self, flags=flags: flags)
        assert api.native_compute_type() == expected
    monkeypatch.undo()


def test_malformed_budgets_are_named():
    for options, message in (
        ({"host": "3 bananas"}, "host"),
        ({"disk": ("/tmp", "none")}, "disk"),
        ({"home": "tape"}, "home"),
    ):
        with pytest.raises(ConfigError, match=message):
            outsize.wrap(plain_stack(), **options)
    with pytest.raises(ConfigError, match="weight_slots=0"):
        outsize.Pins(weight_slots=0)


def test_models_work_inside_the_auto_classes(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "in")
    model = outsize.load(tmp_path / "in", dtype="float32").train()
    train(model, [ZOO["llama"].batch()], adamw(model))
    outsize.save(model, tmp_path / "out")
    again = outsize.load(tmp_path / "out", dtype="float32")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in other.named_parameters():
        assert torch.equal(again.get_parameter(name).detach().clone(), value)
        assert torch.equal(model.get_parameter(name).detach().clone(), value)
