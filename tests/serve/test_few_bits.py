"""Text from weights in few bits: the same bits whatever else runs, wherever weights live, whenever they are encoded."""

import pytest
import torch
import transformers

import outsize
from outsize import Pins
from outsize.serve import Engine, Request, Sampling
from tests.serve.families import prompts_of

DRAWN = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=6,
        num_experts_per_tok=2,
        vocab_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mlp_only_layers=[1],
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id = None
    path = tmp_path_factory.mktemp("models") / "moe"
    model.save_pretrained(path)
    return path


def answers(engine, requests):
    streams = [engine.submit(request) for request in requests]
    return [[(one.tokens, one.logprobs) for one in stream.wait()] for stream in streams]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_bits_do_not_depend_on_what_else_runs(folder, weights, tmp_path):
    outsize.save(outsize.load(folder, weights=weights), tmp_path / "written")
    requests = [Request(prompt, DRAWN, 8) for prompt in prompts_of((60, 5, 20))]
    resident = outsize.load(tmp_path / "written", home="host")
    expected = [answers(Engine(resident, deterministic=True), [request])[0] for request in requests]
    streamed = outsize.load(folder, weights=weights, disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    engine = Engine(streamed, pass_tokens=24, deterministic=True)
    others = [Request(prompts_of((60,))[0][:17], DRAWN, 9, num_samples=2) for _ in range(3)]
    for _ in range(2):
        assert answers(engine, [*requests, *others])[:3] == expected
    assert not outsize.report(streamed).off_plan


def test_an_ordinary_pass_says_the_same_as_a_call(folder):
    model = outsize.load(folder, weights="int8", home="host")
    (prompt,) = prompts_of((30,))
    (completion,) = Engine(model).submit(Request(prompt, max_new_tokens=6)).wait()
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(-1).values
    chosen = logits.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert ((best - chosen) < 0.02 * logits.std(-1)).all()
