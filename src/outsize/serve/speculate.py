"""Guessing ahead: copying what followed the last time the text went like this (CopySpec, Dumitru et al., 2025), or a draft.

Copies begin with one token after a long match. Where they hold, as in a text that is edited, there are soon many, after
short matches, and right after what was changed; texts that follow begin so too. Elsewhere each that fails makes the next
one wait for a match twice as long.

A guess costs a token in a pass that is made anyway, and one that holds saves a pass. Guesses never change what is said:
each position's token is chosen with its own noise, and guesses hold as far as they are what is chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from outsize.errors import in_short
from outsize.serve.draft import Draft
from outsize.serve.runner import MOST_GUESSES
from outsize.serve.schedule import Chunk, Sample

_log = logging.getLogger(__name__)

MATCH = 3
"""Tokens that must have occurred before, in a text that is being copied."""

LONG_MATCH = 16
"""The same in any other, to begin with; twice as many after each guess that failed."""

COPYING = 0.25
"""Of what was said, so much that held as a guess makes a text one that is being copied."""

PRIOR_TOKENS = 32
"""Said before a text of its own says more of it than those before."""

NEAR = 12
"""Tokens after one that was changed, among which a copy may go on."""

_MEMORY = 0.8
"""Of what was known before, how much counts beside what is new."""

_FADING = 0.02
"""How much of it is lost with each token that is not guessed."""


@dataclass(slots=True)
class _Trust:
    """In one way of guessing for one sample: the share of guesses that held, and how many are made at once."""

    share_held: float = 0.5
    num_wanted: int = 4

    def learn(self, num_guessed: int, num_held: int) -> None:
        """More guesses at once where all held, fewer where few did."""
        self.share_held = _MEMORY * self.share_held + (1 - _MEMORY) * num_held / num_guessed
        if num_held == num_guessed:
            self.num_wanted = min(2 * self.num_wanted, MOST_GUESSES)
        else:
            self.num_wanted = max(1, min(self.num_wanted, num_held + 1))

    def fade(self) -> None:
        """Nothing was guessed this time: what was learned counts a little less, so that guessing is tried again."""
        self.share_held += _FADING * (0.5 - self.share_held)


@dataclass(slots=True)
class _Record:
    """Of one sample: where some tokens were last followed by something, and what guessing was worth."""

    last: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_read: int = 0
    prior: float = 0.0
    """The share of texts before that held as a copied guess."""
    num_said: int = 0
    num_held: int = 0
    """Of copied guesses."""
    place: int = 0
    """Of the token that a copy goes on with."""
    long_match: int = LONG_MATCH
    copied: _Trust = field(default_factory=lambda: _Trust(num_wanted=1))
    drafted: _Trust = field(default_factory=_Trust)
    guesses: list[int] = field(default_factory=list)
    """For the next pass."""
    is_copied: bool = False

    def copies(self, tokens: Sequence[int], num_said: int) -> list[int]:
        """What followed the last few tokens the last time they occurred; over again, where that is not much.

        Of the tokens, the last `num_said` were said by the model.
        """
        self.num_said = num_said
        for end in range(max(self.num_read, MATCH), len(tokens)):
            self.last[tuple(tokens[end - MATCH : end])] = end
        self.num_read = max(self.num_read, len(tokens))
        place = self.last.get(tuple(tokens[-MATCH:]))
        if self.is_copying:
            place = self._near(tokens) if place is None else place
        elif (
            place is not None
            and tokens[max(0, place - self.long_match) : place] != tokens[-self.long_match :]
        ):
            return []
        if place is None:
            return []
        self.place = place
        count = len(tokens) - place
        return [tokens[place + index % count] for index in range(self.copied.num_wanted)]

    @property
    def is_copying(self) -> bool:
        """Whether enough of what was said held as a guess; at first, of what others said before."""
        held = self.num_held + self.prior * PRIOR_TOKENS
        return held > COPYING * (self.num_said + PRIOR_TOKENS)

    def _near(self, tokens: Sequence[int]) -> int | None:
        """Where the copy may go on after what was changed: after the next token like the last one."""
        for place in range(self.place + 1, min(self.place + NEAR, len(tokens))):
            if tokens[place - 1] == tokens[-1]:
                return place
        return None

    def learn(self, num_guessed: int, num_held: int) -> None:
        """So many guesses were made, and so many held."""
        if not self.is_copied:
            self.drafted.learn(num_guessed, num_held)
            return
        self.num_held += num_held
        self.place += num_held
        if num_held == num_guessed:
            self.long_match = max(LONG_MATCH, self.long_match // 2)
        elif not num_held:
            self.long_match *= 2
        self.copied.learn(num_guessed, num_held)


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
    """Guesses for samples that decode, as many as measured passes and guesses that held say are worth it."""

    def __init__(self, draft: Draft | None = None) -> None:
        self.draft = draft
        self.num_guessed = 0
        self.num_held = 0
        self._records: dict[Sample, _Record] = {}
        self._said = 0.0
        """Tokens of samples that ended, the latest count most."""
        self._held = 0.0
        """Of them, those that were copied guesses."""
        self._cost = _Cost()
        self._num_decoding = 1
        self._draft_s = 0.0
        """Seconds that a guess of the draft takes."""

    def prepare(self, samples: Iterable[Sample]) -> None:
        """Guess for the next pass: copied where the text went like this before, else drafted, for all at once."""
        wanted: dict[Sample, int] = {}
        for sample in samples:
            if not sample.is_decoding:
                continue
            record = self._records.get(sample)
            if record is None:
                record = self._records[sample] = _Record(prior=self._held / self._said if self._said else 0.0)
                record.copied.num_wanted = 4 if record.is_copying else 1
            num_said = len(sample.tokens) - len(sample.stream.request.prompt)
            record.guesses, record.is_copied = record.copies(sample.tokens, num_said), True
            if record.guesses and self._pays(record.copied):
                continue
            record.guesses, record.is_copied = [], False
            record.copied.fade()
            room = sample.most_tokens - len(sample.tokens) - 1
            if self.draft is None or room <= 0:
                continue
            if self._pays(record.drafted, self._draft_s):
                wanted[sample] = min(record.drafted.num_wanted, room)
            else:
                record.drafted.fade()
        if self.draft is not None and wanted:
            start = time.perf_counter()
            try:
                drafted = self.draft.guess(wanted)
            except Exception as error:  # guesses are never needed
                _log.warning("the draft failed and is not used any more: %s", in_short(error))
                self.draft = None
                return
            for sample, guesses in drafted.items():
                self._records[sample].guesses = guesses
            a_guess_s = (time.perf_counter() - start) / sum(wanted.values())
            self._draft_s = _MEMORY * self._draft_s + (1 - _MEMORY) * a_guess_s

    def propose(self, sample: Sample, most: int) -> list[int]:
        """At most `most` of the guesses that were made for a sample."""
        record = self._records.get(sample)
        return [] if record is None else record.guesses[:most]

    def learn(self, sample: Sample, num_guessed: int, num_held: int) -> None:
        """So many guesses were in a pass, and so many held."""
        if not num_guessed:
            return
        self.num_guessed += num_guessed
        self.num_held += num_held
        self._records[sample].learn(num_guessed, num_held)

    def forget(self, sample: Sample) -> None:
        """A sample ended."""
        record = self._records.pop(sample, None)
        if record is not None:
            self._said = _MEMORY * self._said + record.num_said
            self._held = _MEMORY * self._held + record.num_held
        if self.draft is not None:
            self.draft.forget(sample)

    def repair(self, samples: Collection[Sample]) -> None:
        """Forget all but `samples`, after an exception in the midst of a change."""
        self._records = {sample: record for sample, record in self._records.items() if sample in samples}
        if self.draft is not None:
            self.draft.repair(samples)

    def check(self) -> None:
        """Assert that every page of the draft is where the books say."""
        if self.draft is not None:
            self.draft.check()

    @contextmanager
    def timing(self, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Inside, a pass runs."""
        start = time.perf_counter()
        yield
        num_tokens = sum(chunk.num_tokens + len(chunk.guesses) for chunk in chunks)
        self._cost.add(num_tokens, time.perf_counter() - start)
        self._num_decoding = max(1, sum(chunk.sample.is_decoding for chunk in chunks))

    def _pays(self, trust: _Trust, guess_s: float = 0.0) -> bool:
        """Whether a guess, which costs a token and `guess_s`, saves more: its part of the passes that are not made."""
        fixed, per_token = self._cost.line()
        saved = fixed / self._num_decoding + per_token
        return trust.share_held * saved > per_token + guess_s
