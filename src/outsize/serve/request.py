"""What is asked of an engine, and what it answers: requests, tokens, completions."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real
from typing import Any

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
        for name, (bound, expected, example) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name == "repetition_penalty":
                object.__setattr__(self, name, _number(name, value, bound, expected, example))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", _integer("top_k", self.top_k, 1, math.inf, "40"))
        object.__setattr__(self, "seed", _integer("seed", self.seed, -math.inf, math.inf, "1"))

    @property
    def is_greedy(self) -> bool:
        """Whether no chance is involved."""
        is_plain = self.top_k is None and self.top_p is None and self.min_p is None
        return self.temperature == 0 or (self.temperature is None and is_plain)


_NUMBERS: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a finite number of at least 0", "0.8"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1", "0.9"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1", "0.05"),
    "repetition_penalty": (lambda x: 1e-4 <= x <= 1e4, "a number from 0.0001 to 10,000", "1.2"),
}
"""What each number of `Sampling` may be. A stronger penalty would overflow fp32 scores."""

_COUNTS = {"max_new_tokens": (1, 1 << 20), "num_samples": (1, 1024), "logprobs": (0, 1024)}
"""The least and the most of what a request counts: whatever it says, it takes little memory until it is admitted."""


def _refuse(name: str, value: object, expected: str, example: str, why: str = "out of range") -> ConfigError:
    return ConfigError(f"{name}: {value!r} is {why}, expected {expected}", hint=f"for example {example}")


def _number(name: str, value: Any, is_allowed: Callable[[float], bool], expected: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refuse(name, value, expected, example, "of the wrong type")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not is_allowed(number):
        raise _refuse(name, value, expected, example)
    return number


def _integer(name: str, value: Any, least: float, most: float, example: str) -> int:
    bounds = [f"at least {least:,}"] * math.isfinite(least) + [f"at most {most:,}"] * math.isfinite(most)
    expected = " of ".join(["an integer", " and ".join(bounds)][: 1 + len(bounds)])
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refuse(name, value, expected, example, "of the wrong type")
    number = int(value)
    if not least <= number <= most:
        raise _refuse(name, value, expected, example)
    return number


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
        object.__setattr__(self, "prompt", _tokens(self.prompt))
        for name, (least, most) in _COUNTS.items():
            value = _integer(name, getattr(self, name), least, most, str(max(least, 1)))
            object.__setattr__(self, name, value)
        if not isinstance(self.sampling, Sampling):
            raise _refuse("sampling", self.sampling, "a Sampling", "Sampling()", "of the wrong type")
        if not isinstance(self.prompt_logprobs, bool):
            raise _refuse("prompt_logprobs", self.prompt_logprobs, "a bool", "True", "of the wrong type")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(stop, str) for stop in self.stop):
            raise _refuse("stop", self.stop, "a tuple of strings", '("END",)', "of the wrong type")
        if "" in self.stop:
            raise ConfigError(
                "stop: a string is empty", hint="leave it out, or pass text that ends the output"
            )
        object.__setattr__(self, "stop", tuple(self.stop))

    def check_prompt(self, positions: int | None, vocabulary: int | None) -> None:
        """Raise RequestError for a prompt that a model cannot take.

        The model has `positions` positions and the tokens `0` to `vocabulary - 1` (None: any number).
        """
        if not self.prompt:
            raise RequestError("the prompt holds no token", hint="pass a longer prompt")
        if vocabulary is not None:
            for place, token in enumerate(self.prompt, 1):
                if not 0 <= token < vocabulary:
                    raise RequestError(
                        f"token {place} of the prompt is {token:,}, the model has tokens 0 to {vocabulary - 1:,}",
                        hint="use the tokenizer that belongs to the model",
                    )
        if positions is not None and len(self.prompt) >= positions:
            raise RequestError(
                f"the prompt has {len(self.prompt):,} tokens, the model {positions:,} positions",
                hint=f"pass at most {positions - 1:,} tokens, which leaves one to be generated",
            )


def _tokens(prompt: Any) -> tuple[int, ...]:
    """The prompt as integers; arrays of them are taken as well."""
    tokens = []
    for place, token in enumerate(prompt, 1):
        try:
            tokens.append(operator.index(token))
        except TypeError as error:
            raise RequestError(
                f"token {place} of the prompt is {token!r}, expected an integer",
                hint="pass the tokenizer's input_ids of one text",
            ) from error
    return tuple(tokens)


class Finish(StrEnum):
    """Why a continuation ended."""

    STOP = "stop"
    """The model said so, or a stop text came."""
    LENGTH = "length"
    """As many tokens as were asked for, or as the model has positions."""
    CANCELLED = "cancelled"
    ERROR = "error"
    """A pass or a callback raised; the stream has the error."""


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
    log-probability of each token of the prompt but the first, `error` the exception that ended the request, if one did:
    whoever iterates or waits then gets it raised.
    """

    def __init__(
        self, request: Request, advance: Callable[[], None], watch: Callable[[Token], None] | None = None
    ) -> None:
        self.request = request
        self.completions = [Completion() for _ in range(request.num_samples)]
        self.prompt_logprobs: list[float] = []
        self.error: Exception | None = None
        self._advance = advance
        self._watch = watch
        self._waiting: deque[Token] = deque()

    @property
    def is_finished(self) -> bool:
        """Whether all samples ended."""
        return all(completion.finish is not None for completion in self.completions)

    def put(self, token: Token) -> None:
        """Called by the engine for each token. Raises what the callback raises."""
        completion = self.completions[token.sample]
        completion.tokens.append(token.id)
        completion.logprobs.append(token.logprob)
        completion.likeliest.append(token.likeliest)
        completion.text += token.text
        self._waiting.append(token)
        if self._watch is not None:
            self._watch(token)

    def end(self, finish: Finish) -> None:
        """End all samples that have not ended."""
        for completion in self.completions:
            completion.finish = completion.finish or finish

    def fail(self, error: BaseException) -> None:
        """End with an error, which is raised to whoever reads the stream; an interrupt is raised as a RequestError."""
        if not isinstance(error, Exception):
            cause, error = (
                error,
                RequestError(f"{type(error).__name__} ended the request", hint="submit it again"),
            )
            error.__cause__ = cause
        self.error = error
        self.end(Finish.ERROR)

    def __iter__(self) -> Iterator[Token]:
        while True:
            is_last = self.is_finished  # asked first: another thread may drive the engine
            while self._waiting:
                yield self._waiting.popleft()
            if is_last:
                break
            self._advance()
        if self.error is not None:
            raise self.error

    def wait(self) -> list[Completion]:
        """Let the engine run until all samples ended."""
        while not self.is_finished:
            self._advance()
        if self.error is not None:
            raise self.error
        return self.completions
