"""Guessing ahead with a smaller model (Leviathan et al., "Fast inference via speculative decoding", 2023).

The draft draws each token with the noise that the position will be drawn with, so that where the two models agree, guesses
hold also at high temperatures. It runs over pages of its own, for all samples at once; samples that it has no pages for
are not guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from outsize.errors import ConfigError
from outsize.kv import NotPageableError, PagePool, pages_for
from outsize.serve.runner import Concurrency, Part, Runner
from outsize.serve.sample import choose
from outsize.serve.schedule import Sample

KV_SHARE = 0.03
"""Of the memory that is left, what the draft's pages take: the model and its own pages come after."""


@dataclass(slots=True)
class _State:
    """Of one sample: its pages, and the tokens that are computed in them, of which the last may be guesses that failed."""

    table: list[int]
    computed: list[int] = field(default_factory=list)

    def go_back(self, tokens: list[int]) -> None:
        """Keep what `tokens` begin with, but for the last of them, whose logits will be wanted."""
        while self.computed and self.computed[-1:] != tokens[len(self.computed) - 1 : len(self.computed)]:
            self.computed.pop()
        del self.computed[len(tokens) - 1 :]


class Draft:
    """A model that guesses for another."""

    def __init__(
        self, model: nn.Module, *, pass_tokens: int | None = None, concurrency: Concurrency | None = None
    ) -> None:
        """Raises ConfigError where the model cannot run over pages, BudgetError where it does not fit."""
        model.eval()
        try:
            self.runner = Runner(model, pass_tokens=pass_tokens, share=KV_SHARE, concurrency=concurrency)
        except NotPageableError as reason:
            raise ConfigError(
                f"{type(model).__name__} cannot guess: {reason}", hint="choose another draft"
            ) from reason
        if self.runner.pageable.long_after is not None:
            raise ConfigError(
                f"{type(model).__name__} cannot guess: it rotates long texts in another way",
                hint="choose another draft",
            )
        self.pool = PagePool(self.runner.kv.num_pages)
        self._states: dict[Sample, _State] = {}

    def check_against(self, model: Any) -> None:
        """Raise ConfigError where `model` has other tokens."""
        theirs = int(model.config.get_text_config(decoder=True).vocab_size)
        if self.runner.vocabulary != theirs:
            raise ConfigError(
                f"the draft knows {self.runner.vocabulary:,} tokens, the model {theirs:,}",
                hint="choose a draft of the same family",
            )

    def guess(self, wanted: Mapping[Sample, int]) -> dict[Sample, list[int]]:
        """So many tokens that may follow each sample; a pass for each, and more where a prompt is new."""
        guesses: dict[Sample, list[int]] = {}
        if self.runner.renew():
            for each in self._states.values():
                each.computed.clear()
        for sample in wanted:
            if (state := self._state_of(sample)) is not None:
                state.go_back(sample.tokens)
                guesses[sample] = []
        while parts := self._parts(wanted, guesses):
            logits = self.runner.run(list(parts.values()))
            for (sample, part), logits_NV in zip(parts.items(), logits, strict=False):
                self._states[sample].computed += part.tokens
                if part.rows:
                    tokens = [*sample.tokens, *guesses[sample]]
                    sampling = sample.stream.request.sampling
                    guesses[sample].append(choose(logits_NV[0], tokens, sampling, sample.index))
        return guesses

    def forget(self, sample: Sample) -> None:
        """A sample ended: its pages are free."""
        if (state := self._states.pop(sample, None)) is not None:
            self.pool.free(state.table)

    def repair(self, samples: Collection[Sample]) -> None:
        """Make the books right after an exception in the midst of a change; only `samples` are there still."""
        self._states = {sample: state for sample, state in self._states.items() if sample in samples}
        self.pool.repair(state.table for state in self._states.values())

    def check(self) -> None:
        """Assert that every page is where the books say."""
        self.pool.check(state.table for state in self._states.values())

    def _parts(self, wanted: Mapping[Sample, int], guesses: Mapping[Sample, list[int]]) -> dict[Sample, Part]:
        """The next pass: what is known and not computed of all samples that want more guesses."""
        parts: dict[Sample, Part] = {}
        left = self.runner.pass_tokens
        for sample, own in guesses.items():
            if len(own) < wanted[sample] and left and len(parts) < self.runner.pass_rows:
                state = self._states[sample]
                begin = len(state.computed)
                rest = [*sample.tokens, *own][begin:]
                tokens = rest[:left]
                rows = (len(tokens) - 1,) if len(tokens) == len(rest) else ()
                parts[sample] = Part(tokens, begin, state.table, rows)
                left -= len(tokens)
        return parts

    def _state_of(self, sample: Sample) -> _State | None:
        if sample not in self._states:
            needed = pages_for(sample.most_tokens)
            if needed > self.pool.num_free or sample.most_tokens > self.runner.pageable.most_positions:
                return None
            self._states[sample] = _State(self.pool.allocate(needed))
        return self._states[sample]
