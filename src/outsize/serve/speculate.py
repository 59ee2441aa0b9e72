"""Guessing ahead by copying: what followed the last time the text went like this (CopySpec, Dumitru et al., 2025).

A guess costs a token in a pass that is made anyway, and one that holds saves a pass. Guesses never change what is said:
each position's token is chosen with its own noise, and guesses hold as far as they are what is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from outsize.serve.schedule import Chunk, Sample

MATCH = 3
"""Tokens that must have occurred before."""

MOST_GUESSES = 16
"""Ahead of one sample, in a pass."""

_MEMORY = 0.8
"""Of what was known before, how much counts beside what is new."""


@dataclass(slots=True)
class _Record:
    """Of one sample: where each MATCH tokens were last followed by something, and how many guesses held."""

    last: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_read: int = 0
    share_held: float = 0.5
    num_wanted: int = 4

    def read(self, tokens: Sequence[int]) -> None:
        for end in range(max(self.num_read, MATCH), len(tokens)):
            self.last[tuple(tokens[end - MATCH : end])] = end
        self.num_read = max(self.num_read, len(tokens))


@dataclass(slots=True)
class _Cost:
    """Seconds of a pass as `fixed + per_token * tokens`: means over passes, the latest count most."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        for name, value in (
            ("weight", 1.0),
            ("tokens", num_tokens),
            ("seconds", seconds),
            ("squares", num_tokens**2),
            ("products", num_tokens * seconds),
        ):
            setattr(self, name, 0.98 * getattr(self, name) + value)

    def line(self) -> tuple[float, float]:
        """`(fixed, per_token)`, neither below zero; all fixed where passes were of one size."""
        if not self.weight:
            return 1.0, 0.0
        spread = self.weight * self.squares - self.tokens**2
        slope = (self.weight * self.products - self.tokens * self.seconds) / spread if spread > 1e-9 else 0.0
        slope = min(max(slope, 0.0), self.seconds / self.tokens)
        return (self.seconds - slope * self.tokens) / self.weight, slope


class Guesser:
    """Proposes tokens for samples that decode, as many as measured passes and guesses that held say are worth it."""

    def __init__(self) -> None:
        self.num_guessed = 0
        self.num_held = 0
        self._records: WeakKeyDictionary[Sample, _Record] = WeakKeyDictionary()
        self._cost = _Cost()
        self._num_decoding = 1

    def propose(self, sample: Sample, most: int) -> list[int]:
        """At most `most` guesses of what follows; none where the last tokens are new, or guessing does not pay."""
        record = self._records.setdefault(sample, _Record())
        tokens = sample.tokens
        record.read(tokens)
        place = record.last.get(tuple(tokens[-MATCH:]))
        if place is None or not self._pays(record):
            return []
        return tokens[place : place + min(most, record.num_wanted)]

    def learn(self, sample: Sample, num_guessed: int, num_held: int) -> None:
        """So many guesses held: more are made where all did, fewer where few did."""
        if not num_guessed:
            return
        self.num_guessed += num_guessed
        self.num_held += num_held
        record = self._records[sample]
        record.share_held = _MEMORY * record.share_held + (1 - _MEMORY) * num_held / num_guessed
        if num_held == num_guessed:
            record.num_wanted = min(2 * record.num_wanted, MOST_GUESSES)
        else:
            record.num_wanted = max(1, min(record.num_wanted, num_held + 1))

    @contextmanager
    def timing(self, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Inside, a pass runs."""
        start = time.perf_counter()
        yield
        num_tokens = sum(chunk.num_tokens + len(chunk.guesses) for chunk in chunks)
        self._cost.add(num_tokens, time.perf_counter() - start)
        self._num_decoding = max(1, sum(chunk.sample.is_decoding for chunk in chunks))

    def _pays(self, record: _Record) -> bool:
        """Whether a guess, which costs a token, saves more: its part of the passes that are not made."""
        fixed, per_token = self._cost.line()
        saved = fixed / self._num_decoding + per_token
        return record.share_held * saved > per_token
