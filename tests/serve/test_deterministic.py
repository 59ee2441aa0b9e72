"""With `deterministic=True` tokens and log-probabilities have the same bits, whatever runs and wherever weights live."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from outsize import Pins
from outsize.kv import store
from outsize.serve import Engine, Request, Sampling
from outsize.serve.fixed import TILE_ROWS, FixedTiles
from tests.running import opened
from tests.serve.families import FAMILIES, lively, prompts_of

DRAWN = Sampling(temperature=1.0, seed=5)


def answer(stream):
    (first, *_) = stream.wait()
    return first.tokens, first.logprobs


def alone(model, request):
    return answer(Engine(model, deterministic=True).submit(request))


NAMES = ("llama", "gemma2", "gpt2", "gpt_oss", "qwen3_moe", "deepseek_v3", "phi3")


@pytest.mark.parametrize(("name", "threads"), [*((name, 1) for name in NAMES), ("llama", 2)])
def test_bits_do_not_depend_on_what_else_runs(name, threads, tmp_path, monkeypatch):
    torch.set_num_threads(threads)
    plain, prompts = lively(name), prompts_of((33, 5, 20))
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1)).requires_grad_(False)
    requests = [Request(prompt, DRAWN, 8) for prompt in prompts]
    expected = [alone(model, request) for request in requests]
    resident = opened(plain, home="host").requires_grad_(False)
    engine = Engine(resident, pass_tokens=24, deterministic=True)
    guesses = expected[0][0]
    for _ in range(2):  # the second time prompts are found in pages, and tokens are guessed
        streams = [engine.submit(request) for request in requests]
        streams += [engine.submit(Request(prompts[0][:17], DRAWN, 9, num_samples=2)) for _ in range(2)]
        assert [answer(stream) for stream in streams[:3]] == expected
        monkeypatch.setattr(engine.guesser, "learn", lambda *_: None)
        monkeypatch.setattr(
            engine.guesser,
            "propose",
            lambda sample, most: guesses[len(sample.tokens) - 33 :][: min(most, 3)] or [9] * min(most, 2),
        )
    assert engine.scheduler.num_shared_tokens or name == "phi3"


def test_bits_do_not_depend_on_what_else_runs_without_a_compiler(monkeypatch):
    monkeypatch.setattr(store, "load", lambda dtype: None)
    model, prompts = lively("gemma3"), prompts_of((33, 5))
    requests = [Request(prompt, DRAWN, 5) for prompt in prompts]
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, pass_tokens=24, deterministic=True)
    streams = [engine.submit(request) for request in requests]
    assert [answer(stream) for stream in streams] == expected


class RoundsByShape(TorchDispatchMode):
    """A machine whose products differ in their last bits with the number of rows, as those of many do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default:
            return output * (1 + 2.0**-20 * args[0].shape[0])
        if func in [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "matmul")]:
            return output * (1 + 2.0**-20 * output.shape[-2])
        if func is torch.ops.aten.silu.default:
            return output * (1 + 2.0**-20 * torch.get_num_threads())
        return output


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_it_is_needed(name):
    """Where products depend on their number of rows, a token's numbers depend on the batch, except with `deterministic`."""
    model, (prompt, other) = lively(name), prompts_of((20, 33))
    requests = [Request(prompt, DRAWN, 3), Request(other, DRAWN, 3)]
    for deterministic in (False, True):
        answers = []
        for count in (1, 2):
            engine = Engine(model, deterministic=deterministic)
            with RoundsByShape():
                streams = [engine.submit(request) for request in requests[:count]]
                answers.append(answer(streams[0]))
        assert (answers[0] == answers[1]) is deterministic


def test_products_are_those_of_tiles():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 896, generator=generator)
    weight, bias = torch.randn(300, 896, generator=generator), torch.randn(300, generator=generator)
    experts = torch.randn(3, 896, 40, generator=generator)
    for vector in (bias, None):
        expected = rows @ weight.T + (0 if vector is None else vector)
        with FixedTiles():
            assert torch.allclose(F.linear(rows, weight, vector), expected, atol=1e-3)
    with RoundsByShape(), FixedTiles():
        for vector in (bias, None):
            whole = F.linear(rows, weight, vector)
            for start, stop in ((0, 1), (7, 40), (99, 100)):
                assert torch.equal(F.linear(rows[start:stop], weight, vector), whole[start:stop])
        grouped = torch._grouped_mm(rows, experts, offs=torch.tensor([40, 40, 99], dtype=torch.int32))
        assert torch.equal(grouped[:7], rows[:7] @ experts[0])
        assert torch.equal(grouped[50:99], rows[50:99] @ experts[2])


def test_passes_are_filled_up_to_whole_tiles():
    model = FAMILIES["llama"].build()
    engine, sizes = Engine(model, deterministic=True), []
    model.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].shape[1]), with_kwargs=True)
    engine.submit(Request((5,) * 40, max_new_tokens=2)).wait()
    assert sizes == [2 * TILE_ROWS, TILE_ROWS]
