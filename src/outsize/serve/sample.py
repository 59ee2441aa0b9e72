"""The next token as a pure function of logits, history, seed, sample and position.

A draw is the largest of `score + noise` over the tokens that filters leave (the Gumbel-max trick). The noise of a token is
a hash of (seed, sample, position, token), in the manner of a counter-based generator (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011) with the mixing function of SplitMix64 (Steele et al., 2014). So no draw depends on
what else is computed, on how many were drawn before, or on whether a token was guessed ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from outsize.errors import ModelError
from outsize.serve.request import Sampling

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def choose(logits_V: torch.Tensor, tokens: Sequence[int], sampling: Sampling, sample: int) -> int:
    """The token that follows `tokens`, given the model's `logits_V` for it; its position is `len(tokens)`.

    Raises ModelError where the logits are not finite; `-inf` rules a token out.
    """
    check_finite(logits_V, len(tokens))
    scores_V = logits_V.float()
    if sampling.repetition_penalty != 1.0:
        scores_V = penalised(scores_V, tokens, sampling.repetition_penalty)
    if sampling.is_greedy:
        return int(scores_V.argmax())
    ids, scores = candidates(scores_V, sampling)
    return int(ids[(scores.double() + noise(ids, sampling.seed, sample, len(tokens))).argmax()])


def check_finite(logits_V: torch.Tensor, position: int) -> None:
    """Raise ModelError where no token can be chosen: a logit is nan or `inf`, or all are `-inf`."""
    largest = float(logits_V.max())
    if not math.isfinite(largest):
        raise ModelError(
            f"the logits of the token at position {position:,} are not finite (the largest is {largest})",
            hint='check the weights for nan and inf, or load with dtype="float32": fp16 overflows beyond 65,504',
        )


def penalised(scores_V: torch.Tensor, tokens: Sequence[int], penalty: float) -> torch.Tensor:
    """Scores of tokens that occurred, divided by `penalty` where positive, else multiplied (Keskar et al., 2019)."""
    seen = torch.tensor(sorted(set(tokens)), device=scores_V.device)
    seen = seen[seen < len(scores_V)]  # an embedding may have more rows than the head
    scores = scores_V[seen]
    return scores_V.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def candidates(scores_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids [C], scores [C])` of the tokens that may be drawn, the likeliest first where there is a filter.

    Temperature, then top-k, top-p and min-p, each on what the one before left, as transformers' `generate` has them.
    """
    scores = scores_V / (1.0 if sampling.temperature is None else sampling.temperature)
    if not math.isfinite(float(scores.max())):  # the quotients overflow: the limit is greedy
        return scores_V.argmax().view(1), scores_V.new_zeros(1)
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return torch.arange(scores.numel(), device=scores.device), scores
    scores, ids = torch.sort(scores, descending=True, stable=True)
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores, ids = scores[: sampling.top_k], ids[: sampling.top_k]
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1, rounded sums would cut the tail
        probabilities = scores.softmax(0)
        before = probabilities.cumsum(0) - probabilities
        keep = before < sampling.top_p
        keep[0] = True
        scores, ids = scores[keep], ids[keep]
    if sampling.min_p is not None:
        probabilities = scores.softmax(0)
        keep = probabilities >= sampling.min_p * probabilities[0]
        scores, ids = scores[keep], ids[keep]
    return ids, scores


def noise(ids: torch.Tensor, seed: int, sample: int, position: int) -> torch.Tensor:
    """Gumbel noise in fp64 for tokens `ids` (int64)."""
    key = 0
    for part in (seed, sample, position):
        key = _mixed(key + _STEP + part)
    bits = ids * _signed(_STEP) + _signed(key)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_MIX[0])
    bits = (bits ^ _shifted(bits, 27)) * _signed(_MIX[1])
    uniform = (_shifted(bits ^ _shifted(bits, 31), 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mixed(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MIX[1]) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit `value`."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A shift to the right that brings zeros in; torch's own repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def logprobs_of(
    logits_V: torch.Tensor, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of `token`, and the `count` likeliest tokens with theirs."""
    logprobs_V = logits_V.float().log_softmax(0)
    values, ids = logprobs_V.topk(min(count, logprobs_V.numel()))
    return float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
