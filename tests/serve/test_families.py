"""What an engine says is what transformers' own `generate` says, for every architecture, plain and streamed from disk."""

import logging
from collections import Counter

import pytest
import torch

import outsize
from outsize import Pins
from outsize.serve import Engine, Request, open_engine
from outsize.serve.single import SingleEngine
from tests.running import opened
from tests.seams import source_of
from tests.serve.families import PAGED, SINGLE, assert_greedy, lively, prompts_of, reference

LENGTHS = (5, 21, 1, 33)


def serve(engine, prompts, num_new):
    streams = [engine.submit(Request(prompt, max_new_tokens=num_new)) for prompt in prompts]
    return [stream.wait()[0].tokens for stream in streams]


@pytest.mark.parametrize("name", PAGED)
def test_paged(name):
    model, prompts = lively(name), prompts_of(LENGTHS)
    engine = Engine(model, pass_tokens=16)
    for prompt, tokens in zip(prompts, serve(engine, prompts, 14), strict=True):
        assert_greedy(model, prompt, tokens)
    engine.scheduler.check()


@pytest.mark.parametrize(
    ("name", "dtype", "deterministic"),
    [
        ("llama", torch.float16, False),
        ("gemma2", torch.float16, True),
        ("llama", torch.float64, False),
    ],
)
def test_models_of_other_types(name, dtype, deterministic):
    model, prompts = lively(name).to(dtype), prompts_of(LENGTHS)
    engine = Engine(model, pass_tokens=16, deterministic=deterministic)
    streams = [engine.submit(Request(prompt, max_new_tokens=8)) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        (completion,) = stream.wait()
        ids = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logprobs_NV = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logprobs_NV.gather(1, ids[0, len(prompt) :, None]).flatten()
        tolerance = 0.05 if dtype is torch.float16 else 1e-5
        assert float((torch.tensor(completion.logprobs) - expected).abs().max()) < tolerance
        assert float((logprobs_NV.max(-1).values - expected).max()) < tolerance  # greedy, up to ties


def test_of_ten_thousand_tokens_at_most_one_differs():
    model = lively("llama_tied", max_position_embeddings=320)
    prompts = prompts_of((8,) * 40)
    expected = model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=256, pad_token_id=0)[
        :, 8:
    ]
    ours = serve(Engine(model), prompts, 256)
    differing = [index for index, tokens in enumerate(ours) if tokens != expected[index].tolist()]
    assert len(differing) <= 1
    for index in differing:
        assert_greedy(model, prompts[index], ours[index])


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "phi3"])
def test_streamed(name, tmp_path, monkeypatch):
    plain, prompts = lively(name), prompts_of(LENGTHS)
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    model.requires_grad_(False)
    engine, source, fetched = Engine(model, pass_tokens=16), source_of(model), Counter()

    def count(block, targets, read=source.read):
        fetched[block.name] += 1
        read(block, targets)

    monkeypatch.setattr(source, "read", count)
    for prompt, tokens in zip(prompts, serve(engine, prompts, 6), strict=True):
        assert_greedy(plain, prompt, tokens)
    # At least five passes, each of which fetches every layer; tables stay, or come as often.
    layers = [name for name in fetched if name.startswith("L")]
    assert len(layers) == 3 and all(fetched[name] >= 5 for name in layers), fetched
    assert not outsize.report(model).off_plan
    assert_greedy(plain, prompts[0], reference(model, prompts[0], 3))  # its own generate works as ever


@pytest.mark.parametrize("name", SINGLE)
def test_one_at_a_time(name, caplog):
    model, prompts = lively(name), prompts_of(LENGTHS[:3])
    with caplog.at_level(logging.WARNING, "outsize"):
        engine = open_engine(model)
    assert isinstance(engine, SingleEngine)
    assert "one request at a time" in caplog.text
    for prompt, tokens in zip(prompts, serve(engine, prompts, 8), strict=True):
        assert_greedy(model, prompt, tokens)


def test_one_at_a_time_streamed(tmp_path):
    plain, (prompt,) = lively("bloom"), prompts_of((9,))
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1)).requires_grad_(False)
    (tokens,) = serve(open_engine(model), [prompt], 5)
    assert_greedy(plain, prompt, tokens)


def test_rotations_that_depend_on_the_longest_request_are_served_alone():
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    model = lively("llama", rope_parameters=rope)
    assert isinstance(open_engine(model), SingleEngine)


def test_a_model_that_serves_is_the_model_it_was():
    model = lively("mistral")
    ids = torch.tensor(prompts_of((9,)))
    before = model(ids).logits
    serve(Engine(model), prompts_of((5,)), 3)
    assert torch.equal(model(ids).logits, before)
