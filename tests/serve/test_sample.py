import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from outsize.errors import ConfigError
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
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError) as caught:
        Sampling(**settings)
    assert next(iter(settings)) in caught.value.message and caught.value.hint


def test_requests_that_cannot_be():
    for settings in (
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"num_samples": 0},
        {"num_samples": 10**9},
        {"logprobs": -1},
        {"stop": ("",)},
        {"stop": (3,)},
    ):
        with pytest.raises(ConfigError):
            Request((1,), **settings)
    assert Sampling(temperature=0, top_p=0.5).is_greedy and not Sampling(top_k=2).is_greedy
