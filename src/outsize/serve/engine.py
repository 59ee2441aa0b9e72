"""The engine: requests in, tokens out, any number of them at once, in passes of one size.

    engine = Engine(model, tokenizer)
    stream = engine.submit(Request(prompt=(1, 15043)))
    for token in stream: ...

A model that cannot run over pages is served one request at a time by its own `generate` (`single.py`), behind the same
interface.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.errors import ModelError
from outsize.kv import NotPageableError, PagePool
from outsize.serve.answer import Answer, end_tokens
from outsize.serve.draft import Draft
from outsize.serve.request import Finish, Request, Stream, Token
from outsize.serve.runner import Part, Runner
from outsize.serve.schedule import Chunk, Limits, Sample, Scheduler
from outsize.serve.single import SingleEngine
from outsize.serve.speculate import Guesser

_log = logging.getLogger(__name__)

Watch = Callable[[Token], None]


class Serves(Protocol):
    """What takes requests."""

    def submit(self, request: Request, watch: Watch | None = None) -> Stream:
        """Queue a request; `watch` is called with each of its tokens. Raises RequestError where it can never be served."""

    def cancel(self, stream: Stream) -> None:
        """End a request now, and free its pages."""

    def step(self) -> None:
        """Do one pass, or one request where the model allows no more."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""


def open_engine(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    kv: str | int | None = None,
    pass_tokens: int | None = None,
    deterministic: bool = False,
    draft: nn.Module | None = None,
) -> Serves:
    """An engine for any causal model of transformers, plain or of Outsize.

    `kv`: memory of its KV cache, such as "2GiB"; else a quarter of what is free. `pass_tokens`: tokens that go through
    the model at once, at most. `tokenizer`: for texts and stop texts. `deterministic`: tokens and log-probabilities have
    the same bits whatever else runs, slower. `draft`: a smaller model of the same tokens, which guesses ahead; it changes
    nothing in the output.

    Raises BudgetError where it does not fit, ModelError for what is no causal model, ConfigError for a draft that cannot
    be used.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        raise ModelError(
            f"{type(model).__name__} is no causal language model of transformers",
            hint="call it, or its own generate, as it is",
        )
    model.eval()
    try:
        return Engine(
            model, tokenizer, kv=kv, pass_tokens=pass_tokens, deterministic=deterministic, draft=draft
        )
    except NotPageableError as reason:
        _log.warning(
            "%s is served one request at a time, by its own generate: %s", type(model).__name__, reason
        )
        return SingleEngine(model, tokenizer)


class Engine:
    """Serves many requests over one model's pages."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        kv: str | int | None = None,
        pass_tokens: int | None = None,
        deterministic: bool = False,
        draft: nn.Module | None = None,
    ) -> None:
        """Raises NotPageableError where the model cannot run over pages, BudgetError where it does not fit."""
        # The draft comes first: what it takes is then there when the model's weights are placed.
        self.guesser = Guesser(None if draft is None else Draft(draft, pass_tokens=pass_tokens))
        if self.guesser.draft is not None:
            self.guesser.draft.check_against(model)
        self.runner = Runner(model, kv, pass_tokens, deterministic=deterministic)
        pageable = self.runner.pageable
        limits = Limits(
            self.runner.pass_tokens, self.runner.pass_rows, pageable.most_positions, pageable.long_after
        )
        self.scheduler = Scheduler(PagePool(self.runner.kv.num_pages), limits)
        self._answers: dict[int, Answer] = {}
        self._tokenizer = tokenizer
        self._ends = end_tokens(model)

    def submit(self, request: Request, watch: Watch | None = None) -> Stream:
        """Queue a request; `watch` is called with each of its tokens. Raises RequestError where it can never be served."""
        stream = Stream(request, self.step, watch)
        answer = Answer(stream, self._ends, self._tokenizer)
        self.scheduler.add(stream)
        self._answers[id(stream)] = answer
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a request now, and free its pages."""
        for sample in [*self.scheduler.running, *self.scheduler.waiting]:
            if sample.stream is stream:
                self._end(sample, Finish.CANCELLED)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.is_idle

    def step(self) -> None:
        """One pass: admit, guess, compose, run, and take what came of it."""
        self.scheduler.admit()
        self.guesser.prepare(self.scheduler.running)
        chunks = self.scheduler.compose(self.guesser.propose)
        if not chunks:
            return
        with self.guesser.timing(chunks):
            logits = self.runner.run([_part(chunk) for chunk in chunks], is_long=self._is_long(chunks))
        for chunk, logits_NV in zip(chunks, logits, strict=False):
            self._take(chunk, logits_NV)

    def _is_long(self, chunks: list[Chunk]) -> bool:
        return self.scheduler.is_long(chunks[0].sample)

    def _take(self, chunk: Chunk, logits_NV: torch.Tensor) -> None:
        """Choose the tokens whose logits came; guesses hold as far as they are what is chosen."""
        sample = chunk.sample
        if _is_over(sample):
            return  # who watches a sibling cancelled them all
        answer = self._answers[id(sample.stream)]
        if chunk.tells_prompt:
            answer.tell_prompt(sample.num_computed, logits_NV)
        self.scheduler.computed(sample, chunk.num_tokens)
        if sample.num_remaining:
            return
        num_right, finish = 0, None
        for row_V, guess in zip(logits_NV[-1 - len(chunk.guesses) :], (*chunk.guesses, None), strict=True):
            token, finish = answer.choose(sample.index, row_V, sample.tokens, sample.most_tokens)
            if _is_over(sample):
                return
            sample.tokens.append(token)
            if finish is not None or token != guess:
                break
            num_right += 1
        self.guesser.learn(sample, len(chunk.guesses), num_right)
        if finish is not None:
            self._end(sample, finish)
            return
        self.scheduler.computed(sample, num_right)
        if self._has_turned(sample):
            self.scheduler.turned(sample)

    def _has_turned(self, sample: Sample) -> bool:
        long_after = self.scheduler.limits.long_after
        return long_after is not None and len(sample.tokens) == long_after + 1 > len(
            sample.stream.request.prompt
        )

    def _end(self, sample: Sample, finish: Finish) -> None:
        self.scheduler.remove(sample)
        self.guesser.forget(sample)
        answer = self._answers[id(sample.stream)]
        answer.finish(sample.index, finish)
        if sample.stream.is_finished:
            del self._answers[id(sample.stream)]


def _is_over(sample: Sample) -> bool:
    return sample.stream.completions[sample.index].finish is not None


def _part(chunk: Chunk) -> Part:
    sample = chunk.sample
    begin = sample.num_computed
    tokens = (*sample.tokens[begin : begin + chunk.num_tokens], *chunk.guesses)
    return Part(tokens, begin, sample.table, range(len(tokens) - chunk.num_rows, len(tokens)))


@contextmanager
def closing_of(engine: Serves, stream: Stream) -> Iterator[Stream]:
    """Inside, `stream` is read; it is cancelled where its reader leaves early."""
    try:
        yield stream
    finally:
        if not stream.is_finished:
            engine.cancel(stream)
