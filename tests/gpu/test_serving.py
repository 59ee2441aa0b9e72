"""Text on a CUDA device: what it says is what the processor says, and pages stay within what the device may have."""

import gc

import pytest
import torch

import outsize
from outsize import Pins
from outsize.errors import BudgetError
from outsize.serve import Engine, Request, Sampling
from outsize.serve.runner import Part
from tests.running import adamw, opened
from tests.serve.families import assert_greedy, lively, prompts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = (5, 21, 1, 33)


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    gc.collect()


def serve(engine, prompts, num_new, **options):
    streams = [engine.submit(Request(prompt, max_new_tokens=num_new, **options)) for prompt in prompts]
    return [stream.wait()[0].tokens for stream in streams]


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt_oss", "mistral", "qwen3_moe"])
def test_what_is_said_is_what_the_processor_says(name, home, tmp_path):
    plain, prompts = lively(name), prompts_of(LENGTHS)
    model = opened(plain, disk=tmp_path, home=home, pins=Pins(weight_slots=1))
    model.requires_grad_(False)
    engine = Engine(model, pass_tokens=16, kv="4MiB")
    for prompt, tokens in zip(prompts, serve(engine, prompts, 8), strict=True):
        assert_greedy(plain, prompt, tokens)
    engine.scheduler.check()


def test_a_plain_model_on_the_device_is_served_too():
    plain, prompts = lively("llama_tied"), prompts_of(LENGTHS)
    engine = Engine(lively("llama_tied").cuda(), pass_tokens=16, kv="4MiB")
    for prompt, tokens in zip(prompts, serve(engine, prompts, 8), strict=True):
        assert_greedy(plain, prompt, tokens)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_in_few_bits(weights, tmp_path):
    """Their products on a device are those of widened weights; placement changes none of their bits."""
    lively("llama_tied", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "model")
    said = []
    for home in ("device", "host", "disk"):
        model = outsize.load(tmp_path / "model", weights=weights, home=home, disk=tmp_path)
        engine = Engine(model, pass_tokens=32, kv="4MiB", deterministic=True)
        said.append(serve(engine, prompts_of((20, 5)), 6, sampling=Sampling(temperature=1.0, seed=5)))
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("kv", [None, "8MiB"])
def test_pages_and_weights_stay_within_the_limit(kv, tmp_path):
    limit = 256 << 20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plain = lively("llama_tied", max_position_embeddings=16384)
    model = opened(plain, device=limit, disk=tmp_path, home="disk")
    model.requires_grad_(False)
    engine = Engine(model, pass_tokens=64, kv=kv)
    serve(engine, prompts_of((100, 3, 60)), 4)
    assert engine.runner.kv.num_bytes > 1 << 20
    assert torch.cuda.max_memory_reserved() <= limit


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_training_and_generating_in_turn(home, tmp_path):
    """On one copy of the weights, with the pages in the device's arena; training does not notice."""
    ids = torch.arange(5, 101).view(4, 24)

    def trained(model, optimizer):
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    alone = opened(lively("llama_tied"), disk=tmp_path, home=home, dtype="float32")
    optimizer = adamw(alone)
    losses = [trained(alone, optimizer) for _ in range(3)]
    model = opened(lively("llama_tied"), disk=tmp_path, home=home, dtype="float32")
    optimizer = adamw(model)
    engine = Engine(model, pass_tokens=16, kv="1MiB")
    found, prompts = [], prompts_of((37, 5))
    for _ in range(3):
        found.append(trained(model, optimizer))
        plain = lively("llama_tied")
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(dict(model.named_parameters())[name])
        model.eval()
        for prompt, tokens in zip(prompts, serve(engine, prompts, 6), strict=True):
            assert_greedy(plain, prompt, tokens)
    assert found == losses


def test_pages_that_the_device_has_no_room_for_are_named(tmp_path):
    model = opened(lively("llama_tied"), device=256 << 20, home="host")
    model.requires_grad_(False)
    with pytest.raises(BudgetError, match="KV cache takes"):
        Engine(model, pass_tokens=16, kv="400MiB")
    assert len(serve(Engine(model, pass_tokens=16, kv="4MiB"), prompts_of((5,)), 3)[0]) == 3


def test_a_pass_asks_the_device_once_for_what_it_says(tmp_path):
    """Pages, tables and ids are sent without waiting; logits come down when somebody wants them."""
    import transformers.masking_utils as masking

    model = opened(lively("llama_tied"), disk=tmp_path, home="disk")
    model.requires_grad_(False)
    engine = Engine(model, pass_tokens=32, kv="4MiB")
    serve(engine, prompts_of((20, 5)), 3)
    parts = [Part([5] * 9, 0, [1], [8]), Part([7], 20, [2, 3], [0]), Part([7], 3, [4], [0])]
    plain = masking.is_tracing
    masking.is_tracing = lambda *values: True
    gc.collect()  # closing a model of an earlier test waits for the device
    try:
        torch.cuda.set_sync_debug_mode("error")
        logits = engine.runner.run(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        masking.is_tracing = plain
    assert all(torch.isfinite(each).all() for each in logits)
