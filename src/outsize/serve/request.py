"""What is asked of an engine, and what it answers: requests, tokens, completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from outsize.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Sampling()                        the likeliest each time (greedy)
    Sampling(temperature=0.8)         drawn from the model's probabilities, sharpened
    Sampling(top_p=0.9)               drawn from the likeliest tokens that together have this probability
    Sampling(top_k=40)                drawn from the 40 likeliest
    Sampling(min_p=0.05)              drawn from those with at least this part of the likeliest one's probability
    Sampling(repetition_penalty=1.2)  tokens that occurred are made less likely
    Sampling(temperature=1, seed=7)   the same seed gives the same tokens, whatever else runs
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise _refuse("temperature", self.temperature, "not zero or more", "0.8")
        if not isinstance(self.seed, int):
            raise _refuse("seed", self.seed, "no whole number", "1")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise _refuse("top_k", self.top_k, "no whole number from 1 on", "40")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _refuse("top_p", self.top_p, "not in (0, 1]", "0.9")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise _refuse("min_p", self.min_p, "not in [0, 1]", "0.05")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise _refuse("repetition_penalty", self.repetition_penalty, "not above zero", "1.2")

    @property
    def is_greedy(self) -> bool:
        """Whether no chance is involved."""
        is_plain = self.top_k is None and self.top_p is None and self.min_p is None
        return self.temperature == 0 or (self.temperature is None and is_plain)


_COUNTS = {"max_new_tokens": (1, 1 << 20), "num_samples": (1, 1024), "logprobs": (0, 1024)}
"""The least and the most of what a request counts: whatever it says, it takes little memory until it is admitted."""


def _refuse(name: str, value: float, why: str, example: str) -> ConfigError:
    return ConfigError(f"{name}: {value} is {why}", hint=f"pass --{name.replace('_', '-')} {example}")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as tokens, and how it is to be continued.

    `num_samples` continuations share the prompt's pages. `stop`: texts that end a continuation, and are not part of it.
    `logprobs`: so many of the likeliest tokens are told with each token. `prompt_logprobs`: the prompt's own are told.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_new_tokens: int = 100
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise _refuse(name, value, f"no whole number from {least} to {most:,}", str(max(least, 1)))
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ConfigError(f"stop: {self.stop} has what is no text, or empty", hint="leave it out")

    def check_prompt(self, positions: int | None) -> None:
        """Raise RequestError for a prompt without tokens, or too long for a model of so many positions (None: any)."""
        if not self.prompt:
            raise RequestError("the prompt holds no token", hint="pass a longer prompt")
        if positions is not None and len(self.prompt) >= positions:
            raise RequestError(
                f"the prompt has {len(self.prompt):,} tokens, the model {positions:,} positions",
                hint=f"pass at most {positions - 1:,} tokens, which leaves one to be generated",
            )


class Finish(StrEnum):
    """Why a continuation ended."""

    STOP = "stop"
    """The model said so, or a stop text came."""
    LENGTH = "length"
    """As many tokens as were asked for, or as the model has positions."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of sample `sample`; `text` is what it settles, which may be empty, or belong to earlier tokens.

    `logprob` is the model's own, before temperature and penalties; `likeliest` are pairs of token and log-probability.
    """

    sample: int
    id: int
    text: str
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """What became of one sample so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


class Stream:
    """The answer to a request: an iterator of its tokens, as they come.

    Iterating drives the engine where no token is waiting. `completions` hold what came so far, `prompt_logprobs` the
    log-probability of each token of the prompt but the first.
    """

    def __init__(
        self, request: Request, advance: Callable[[], None], watch: Callable[[Token], None] | None = None
    ) -> None:
        self.request = request
        self.completions = [Completion() for _ in range(request.num_samples)]
        self.prompt_logprobs: list[float] = []
        self._advance = advance
        self._watch = watch
        self._waiting: list[Token] = []

    @property
    def is_finished(self) -> bool:
        """Whether all samples ended."""
        return all(completion.finish is not None for completion in self.completions)

    def put(self, token: Token) -> None:
        """Called by the engine for each token."""
        completion = self.completions[token.sample]
        completion.tokens.append(token.id)
        completion.logprobs.append(token.logprob)
        completion.likeliest.append(token.likeliest)
        self._waiting.append(token)
        if self._watch is not None:
            self._watch(token)

    def __iter__(self) -> Iterator[Token]:
        while True:
            while self._waiting:
                yield self._waiting.pop(0)
            if self.is_finished:
                return
            self._advance()

    def wait(self) -> list[Completion]:
        """Let the engine run until all samples ended."""
        while not self.is_finished:
            self._advance()
        return self.completions
