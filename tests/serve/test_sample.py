import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from outsize.errors import ConfigError, ModelError, RequestError
from outsize.serve.request import Request, Sampling
from outsize.serve.sample import candidates, choose, logprobs_of, noise, penalised


def logits(seed=0, size=50):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.5},
        {"min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_filters_leave_what_transformers_leaves(settings):
    for seed in range(20):
        scores = logits(seed)
        warpers = LogitsProcessorList()
        if "temperature" in settings:
            warpers.append(theirs.TemperatureLogitsWarper(settings["temperature"]))
        if "top_k" in settings:
            warpers.append(theirs.TopKLogitsWarper(settings["top_k"]))
        if "top_p" in settings:
            warpers.append(theirs.TopPLogitsWarper(settings["top_p"]))
        if "min_p" in settings:
            warpers.append(theirs.MinPLogitsWarper(settings["min_p"]))
        expected = warpers(None, scores.unsqueeze(0))[0]
        ids, values = candidates(scores, Sampling(**settings))
        assert sorted(ids.tolist()) == torch.isfinite(expected).nonzero().flatten().tolist()
        assert torch.allclose(values, expected[ids])


def test_the_penalty_is_that_of_transformers():
    tokens = [3, 7, 3, 11]
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([tokens]), logits().unsqueeze(0))[0]
    assert torch.equal(penalised(logits(), tokens, 1.4), expected)
    assert choose(torch.tensor([5.0, 4.9]), [0], Sampling(repetition_penalty=1.5), 0) == 1


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    drawn = torch.zeros(4)
    for seed in range(count):
        drawn[choose(scores, [1, 2, 3], Sampling(temperature=1.0, seed=seed), 0)] += 1
    expected = scores.softmax(0)
    assert torch.all((drawn / count - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt())


def test_noise_is_a_function_of_its_place_alone():
    ids = torch.arange(1000)
    whole = noise(ids, 1, 2, 3)
    assert torch.equal(noise(ids[500:], 1, 2, 3), whole[500:])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert abs(float(torch.corrcoef(torch.stack([noise(ids, *other), whole]))[0, 1])) < 0.1
    assert float(whole.mean()) == pytest.approx(0.5772, abs=0.15)
    assert torch.isfinite(noise(torch.arange(1 << 20), 0, 0, 0)).all()


def test_logprobs():
    logprob, likeliest = logprobs_of(torch.tensor([0.0, math.log(3.0)]), 0, 2)
    assert logprob == pytest.approx(math.log(0.25))
    assert [token for token, _ in likeliest] == [1, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": 1.5},
        {"top_k": 2.5},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"temperature": True},
        {"temperature": "hot"},
        {"temperature": [0.5]},
        {"top_p": math.nan},
        {"top_p": "0.9"},
        {"min_p": math.nan},
        {"min_p": 1 + 1e-9},
        {"repetition_penalty": None},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"seed": None},
        {"seed": True},
        {"top_k": True},
        {"top_k": -1},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError, match="expected a") as caught:
        Sampling(**settings)
    assert next(iter(settings)) in caught.value.message and caught.value.hint


def test_settings_at_their_limits():
    logits_V = logits()
    best = int(logits_V.argmax())
    for settings in (
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 1},
        {"top_p": 5e-324, "temperature": 100.0},
    ):
        assert {choose(logits_V, [1], Sampling(seed=seed, **settings), 0) for seed in range(20)} == {best}
    free = candidates(logits_V, Sampling(temperature=1.0))
    for settings in ({"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 10**30}):
        ids, values = candidates(logits_V, Sampling(temperature=1.0, **settings))
        assert torch.equal(values, free[1][ids]) and len(ids) == len(free[0])
    flat_V = torch.zeros(200_000)  # of which rounded sums exceed 1 before the end
    assert len(candidates(flat_V, Sampling(top_p=1.0))[0]) == 200_000
    assert Sampling(seed=np.int64(7)) == Sampling(seed=7) and Sampling(top_p=np.float32(0.5)).top_p == 0.5
    assert 0 <= choose(logits_V, [1], Sampling(temperature=1e308, seed=-(10**30)), 0) < 50
    assert (
        choose(logits_V, [60, best], Sampling(repetition_penalty=1e4), 0) != best
    )  # 60: beyond the head's rows


@pytest.mark.parametrize("temperature", [1e-2, 1e-20, 1e-37, 1e-38, 1e-39, 1e-45, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}])
def test_low_temperatures_tend_to_greedy(temperature, shift, settings):
    for seed in range(5):
        logits_V = logits(seed).round() + shift  # with ties
        ids = [
            choose(logits_V, [1], Sampling(temperature=temperature, seed=s, **settings), 0) for s in range(5)
        ]
        if temperature > 1e-15:  # equal logits are drawn as long as noise tells them apart
            assert all(logits_V[token] == logits_V.max() for token in ids)
        else:
            assert set(ids) == {int(logits_V.argmax())}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(top_p=0.5)])
def test_logits_that_are_not_finite_are_named(value, sampling):
    logits_V = logits()
    logits_V[7] = value
    with pytest.raises(ModelError, match=r"position 2 are not finite \(the largest is (nan|inf)\)"):
        choose(logits_V, [1, 2], sampling, 0)
    with pytest.raises(ModelError, match="-inf"):
        choose(torch.full((5,), -math.inf), [1, 2], sampling, 0)
    masked_V = torch.full((5,), -math.inf)
    masked_V[3] = -4.0
    assert choose(masked_V, [1, 2], sampling, 0) == 3


def test_requests_that_cannot_be():
    for settings in (
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"num_samples": 0},
        {"num_samples": 10**9},
        {"logprobs": -1},
        {"stop": ("",)},
        {"stop": (3,)},
        {"stop": "ab"},
        {"stop": None},
        {"stop": {"a": 1}},
        {"max_new_tokens": True},
        {"max_new_tokens": "5"},
        {"max_new_tokens": math.inf},
        {"num_samples": 2.0},
        {"logprobs": True},
        {"logprobs": None},
        {"prompt_logprobs": "no"},
        {"prompt_logprobs": 1},
        {"sampling": {"temperature": 1}},
    ):
        with pytest.raises(ConfigError):
            Request((1,), **settings)
    for prompt in ((1, 2.0), (1, "2"), (None,), "12", torch.ones(1, 2), (1, torch.nan)):
        with pytest.raises(RequestError, match="expected an integer"):
            Request(prompt)
    for prompt in (np.array([1, 2]), torch.tensor([1, 2]), [1, 2]):
        assert Request(prompt) == Request((1, 2)) and type(Request(prompt).prompt[0]) is int
    assert Sampling(temperature=0, top_p=0.5).is_greedy and not Sampling(top_k=2).is_greedy
