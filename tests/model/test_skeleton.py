import resource
import threading

import pytest
import torch
import transformers
from torch import nn

from outsize.errors import ModelError
from outsize.model import open_skeleton, skeleton
from outsize.model.names import parameter_aliases
from tests.model.helpers import edit_json
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_parameters_on_meta_and_buffers_as_in_the_real_model(name):
    real = ZOO[name].build()
    state = torch.get_rng_state()
    skeleton = open_skeleton(ZOO[name].config(), torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert not skeleton.training
    assert parameter_aliases(skeleton) == parameter_aliases(real)
    for (_, have), (_, want) in zip(skeleton.named_parameters(), real.named_parameters(), strict=True):
        assert have.is_meta and have.shape == want.shape and have.dtype == want.dtype
    have, want = dict(skeleton.named_buffers()), dict(real.named_buffers())
    assert have.keys() == want.keys()
    for key, buffer in have.items():
        assert buffer.dtype == want[key].dtype and torch.equal(buffer, want[key]), key


def test_bfloat16_is_the_type_of_all_parameters():
    skeleton = open_skeleton(ZOO["llama"].config(), torch.bfloat16)
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert skeleton.config.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_model_of_8_billion_parameters_opens_in_little_memory():
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton = open_skeleton(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) > 8e9
    assert all(tensor.is_meta for tensor in skeleton.parameters())
    assert sum(tensor.nbytes for tensor in skeleton.buffers()) < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_folder_gives_generation_settings(tmp_path):
    model = ZOO["llama"].build()
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.float32)
    assert skeleton.generation_config.max_new_tokens == 17
    assert type(skeleton) is type(model)


def test_without_architectures_it_is_a_causal_language_model():
    config = ZOO["llama"].config()
    config.architectures = None
    assert type(open_skeleton(config, torch.float32)).__name__ == "LlamaForCausalLM"


def test_torch_is_left_as_it_was():
    register, init = nn.Module.register_parameter, nn.init.normal_
    open_skeleton(ZOO["llama"].config(), torch.float32)
    assert nn.Module.register_parameter is register and nn.init.normal_ is init
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_buffer_made_from_a_large_empty_tensor_is_real(monkeypatch):
    original = transformers.LlamaModel.__init__

    def with_table(self, config):
        original(self, config)
        table = torch.empty(1 << 17)
        table.copy_(torch.arange(1 << 17))
        self.register_buffer("table", table, persistent=False)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", with_table)
    skeleton = open_skeleton(ZOO["llama"].config(), torch.float32)
    assert torch.equal(skeleton.model.table, torch.arange(1 << 17).float())
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no folder .*nowhere[\s\S]*hint:"):
        open_skeleton(tmp_path / "nowhere", torch.float32)
    with pytest.raises(ModelError, match="local cache"):
        open_skeleton("nobody/no-such-model", torch.float32)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json[\s\S]*hint:"):
        open_skeleton(tmp_path, torch.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        open_skeleton(tmp_path / "file", torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"architectures": ["LlamaConfig"]}, "unknown architecture 'LlamaConfig'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_unknown_and_quantised_models_are_refused(tmp_path, changes, message):
    ZOO["llama"].config().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"{message}[\s\S]*hint:"):
        open_skeleton(tmp_path, torch.float32)


def test_malformed_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json"):
        open_skeleton(tmp_path, torch.float32)


def test_code_of_a_model_runs_only_when_asked_for(tmp_path):
    ZOO["llama"].config().save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    brought = True\n"
    )
    edit_json(
        tmp_path / "config.json",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        open_skeleton(tmp_path, torch.float32)
    assert open_skeleton(tmp_path, torch.float32, trust_remote_code=True).brought


# Threads


def named(config):
    """`config` with the name of its class, by which transformers is asked for it."""
    config.architectures = ["LlamaForCausalLM"]
    return config


def test_other_threads_construct_modules_as_ever(monkeypatch):
    """While a skeleton is constructed, modules of other threads have parameters with values."""
    found = []

    class Spy(transformers.LlamaForCausalLM):
        def __init__(self, config):
            thread = threading.Thread(target=lambda: found.append(nn.Linear(2, 2).weight))
            thread.start()
            thread.join()
            super().__init__(config)

    monkeypatch.setattr(skeleton.transformers, "LlamaForCausalLM", Spy)
    assert open_skeleton(named(ZOO["llama"].config()), torch.float32).lm_head.weight.is_meta
    assert not found[0].is_meta and found[0].requires_grad


def test_skeletons_in_two_threads_leave_nothing_behind(monkeypatch):
    """The first begins, the second begins, the first ends, the second ends: where that order is possible at all."""
    before = nn.Module.register_parameter, nn.init.normal_, torch.get_default_dtype()
    second_began, first_ended = threading.Event(), threading.Event()
    threads = []

    class Spy(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            if not threads:
                threads.append(threading.Thread(target=open_skeleton, args=(config, torch.bfloat16)))
                threads[0].start()
                second_began.wait(0.3)
            else:
                second_began.set()
                first_ended.wait(10)

    monkeypatch.setattr(skeleton.transformers, "LlamaForCausalLM", Spy)
    first = open_skeleton(named(ZOO["llama"].config()), torch.float32)
    first_ended.set()
    threads[0].join()
    assert (nn.Module.register_parameter, nn.init.normal_, torch.get_default_dtype()) == before
    assert first.lm_head.weight.dtype is torch.float32 and not nn.Linear(2, 2).weight.is_meta
