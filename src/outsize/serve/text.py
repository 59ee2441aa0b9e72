"""Tokens into text as they come: only what later tokens cannot change is given out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """The text of one sample. `add` gives what a token settles; at a stop text it ends, without it.

    Tokens are decoded together with those before them, since a tokenizer may write a token otherwise where a text begins.
    Bytes that are half a character, and what may be the beginning of a stop text, are held back.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = list(prompt[-6:])
        self._start = 0
        self._num_read = len(self._tokens)
        self._held = ""

    def add(self, token: int) -> str:
        """What is settled now."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._num_read])
        now = self._decode(self._tokens[self._start :])
        if now.endswith("�") or len(now) <= len(before):
            return ""
        self._start, self._num_read = self._num_read, len(self._tokens)
        return self._settle(now[len(before) :])

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.is_stopped:
            return ""
        before = self._decode(self._tokens[self._start : self._num_read])
        now = self._decode(self._tokens[self._start :])
        self._start = self._num_read = len(self._tokens)
        rest = self._settle(now[len(before) :])
        held, self._held = self._held, ""
        return rest + held

    def _settle(self, text: str) -> str:
        self._held += text
        places = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            settled, self._held = self._held[: min(places)[0]], ""
            return settled
        longest = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - longest
        settled, self._held = self._held[:cut], self._held[cut:]
        return settled

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` could be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
