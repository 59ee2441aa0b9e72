"""The engine: requests in, tokens out, any number of them at once, in passes of one size.

    engine = Engine(model, tokenizer)
    stream = engine.submit(Request(prompt=(1, 15043)))
    for token in stream: ...

A model that cannot run over pages is served one request at a time by its own `generate` (`single.py`), behind the same
interface.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.errors import ModelError, UsageError
from outsize.kv import NotPageableError, PagePool
from outsize.serve.answer import Answer, end_tokens, num_tokens
from outsize.serve.draft import Draft
from outsize.serve.request import Finish, Request, Stream, Token
from outsize.serve.runner import Concurrency, Part, Runner
from outsize.serve.schedule import Chunk, Limits, Sample, Scheduler
from outsize.serve.single import SingleEngine
from outsize.serve.speculate import Guesser

_log = logging.getLogger(__name__)

Watch = Callable[[Token], None]


class Serves(Protocol):
    """What takes requests."""

    def submit(self, request: Request, watch: Watch | None = None) -> Stream:
        """Queue a request; `watch` is called with each of its tokens. Raises RequestError where it can never be served.

        A `watch` that raises ends its request with that error, and no other.
        """

    def cancel(self, stream: Stream) -> None:
        """End a request now, and free its pages. Any thread may call it, and any callback."""

    def step(self) -> None:
        """Do one pass, or one request where the model allows no more; what fails ends with the error, in its stream."""

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
    concurrency: Concurrency | None = None,
) -> Serves:
    """An engine for any causal model of transformers, plain or of Outsize.

    `kv`: memory of its KV cache, such as "2GiB"; else a quarter of what is free. `pass_tokens`: tokens that go through
    the model at once, at most. `concurrency`: the most sequences at once, and tokens of each, where known: memory is
    planned for them alone. `tokenizer`: for texts and stop texts. `deterministic`: tokens and log-probabilities have the
    same bits whatever else runs, slower. `draft`: a smaller model of the same tokens, which guesses ahead; it changes
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
            model,
            tokenizer,
            kv=kv,
            pass_tokens=pass_tokens,
            deterministic=deterministic,
            draft=draft,
            concurrency=concurrency,
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
        concurrency: Concurrency | None = None,
    ) -> None:
        """Raises NotPageableError where the model cannot run over pages, BudgetError where it does not fit."""
        # The draft comes first: what it takes is then there when the model's weights are placed.
        self.guesser = Guesser(
            None if draft is None else Draft(draft, pass_tokens=pass_tokens, concurrency=concurrency)
        )
        if self.guesser.draft is not None:
            self.guesser.draft.check_against(model)
        self.runner = Runner(model, kv, pass_tokens, deterministic=deterministic, concurrency=concurrency)
        pageable = self.runner.pageable
        limits = Limits(
            tokens=self.runner.pass_tokens,
            rows=self.runner.pass_rows,
            positions=pageable.most_positions,
            long_after=pageable.long_after,
            vocabulary=num_tokens(model),
        )
        self.scheduler = Scheduler(PagePool(self.runner.kv.num_pages), limits)
        self._answers: dict[int, Answer] = {}
        """By the identity of their streams, of requests that have not ended."""
        self._chosen: deque[tuple[Stream, Token, Finish | None]] = deque()
        """Tokens that were chosen and not handed out yet, with how they end their sample."""
        self._cancelled: deque[Stream] = deque()
        """Requests that ended, and may still have pages."""
        self._lock = threading.RLock()
        self._is_changing = False
        self._tokenizer = tokenizer
        self._ends = end_tokens(model)

    def submit(self, request: Request, watch: Watch | None = None) -> Stream:
        """Queue a request; `watch` is called with each of its tokens. Raises RequestError where it can never be served.

        Where another thread is in `step`, it waits for the end of that pass.
        """
        stream = Stream(request, self.step, watch)
        answer = Answer(stream, self._ends, self._tokenizer)
        with self._changing():
            self.scheduler.add(stream)
            self._answers[id(stream)] = answer
        self._release_cancelled()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a request now, from any thread or callback. Its pages are free at once, or when the pass under way ends."""
        stream.end(Finish.CANCELLED)
        self._cancelled.append(stream)
        self._release_cancelled()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.is_idle and not self._chosen

    def step(self) -> None:
        """One pass: admit, guess, compose, run, choose tokens; then hand them out.

        Of several threads one at a time makes its pass. A pass that fails ends its requests with the error, and a callback
        that raises ends its own; `step` itself raises interrupts alone, and goes on after them as if there had been none.
        """
        try:
            with self._lock:
                with self._changing():
                    self._run_pass()
                self._hand_out()
        finally:
            self._release_cancelled()

    def check(self) -> None:
        """Assert that every page is where the books say."""
        self.scheduler.check()
        self.guesser.check()

    def _run_pass(self) -> None:
        self._drop_cancelled()
        for sample in [sample for sample in self.scheduler.running if _is_over(sample)]:
            self._remove(sample)  # an interrupt came between its end and this
        samples = [*self.scheduler.running, *self.scheduler.waiting]
        try:
            if samples and self.runner.renew():
                self.scheduler.pages_lost()
            self.scheduler.admit()
            samples = list(self.scheduler.running)
            self.guesser.prepare(samples)
            chunks = self.scheduler.compose(self.guesser.propose)
            if not chunks:
                return
            samples = [chunk.sample for chunk in chunks]
            with self.guesser.timing(chunks):
                logits = self.runner.run([_part(chunk) for chunk in chunks], is_long=self._is_long(chunks))
        except Exception as error:
            self._fail(dict.fromkeys(sample.stream for sample in samples), error)
            self.check()
            return
        for chunk, logits_NV in zip(chunks, logits, strict=False):
            try:
                self._take(chunk, logits_NV)
            except BaseException as error:
                self._fail([chunk.sample.stream], error)
                if not isinstance(error, Exception):
                    raise  # what was not taken is computed again

    def _is_long(self, chunks: list[Chunk]) -> bool:
        return self.scheduler.is_long(chunks[0].sample)

    def _take(self, chunk: Chunk, logits_NV: torch.Tensor) -> None:
        """Choose the tokens whose logits came; guesses hold as far as they are what is chosen."""
        sample, stream = chunk.sample, chunk.sample.stream
        if _is_over(sample):
            return  # it was cancelled, or a sibling failed
        answer = self._answers[id(stream)]
        if chunk.tells_prompt:
            stream.prompt_logprobs += answer.prompt_logprobs(sample.num_computed, logits_NV)
        if chunk.num_tokens < sample.num_remaining:
            self.scheduler.computed(sample, chunk.num_tokens)
            return
        chosen: list[tuple[Token, Finish | None]] = []
        for row_V, guess in zip(logits_NV[-1 - len(chunk.guesses) :], (*chunk.guesses, None), strict=True):
            token, finish = answer.choose(sample.index, row_V, sample.tokens, sample.most_tokens)
            sample.tokens.append(token.id)
            chosen.append((token, finish))
            if finish is not None or token.id != guess:
                break
        num_right = len(chosen) - 1
        self.guesser.learn(sample, len(chunk.guesses), num_right)
        self.scheduler.computed(sample, chunk.num_tokens + num_right)
        if chosen[-1][1] is not None:
            self._remove(sample)
        elif self._has_turned(sample):
            self.scheduler.turned(sample)
        self._chosen += ((stream, token, finish) for token, finish in chosen)

    def _has_turned(self, sample: Sample) -> bool:
        long_after = self.scheduler.limits.long_after
        return long_after is not None and len(sample.tokens) == long_after + 1 > len(
            sample.stream.request.prompt
        )

    def _hand_out(self) -> None:
        """Give the chosen tokens to their streams. Callbacks run here, where the engine is ready for anything they do."""
        while self._chosen:
            stream = self._chosen[0][0]
            try:
                self._hand_out_one()
            except BaseException as error:
                with self._changing():
                    self._fail([stream], error)
                if not isinstance(error, Exception):
                    raise

    def _hand_out_one(self) -> None:
        stream, token, finish = self._chosen.popleft()
        completion = stream.completions[token.sample]
        if completion.finish is not None:
            return
        stream.put(token)
        completion.finish = completion.finish or finish
        if stream.is_finished:
            self._answers.pop(id(stream), None)

    def _fail(self, streams: Iterable[Stream], error: BaseException) -> None:
        self._repair()
        for stream in streams:
            stream.fail(error)
            self._drop(stream)

    def _repair(self) -> None:
        """Make the books right: an exception may have come in the midst of any change."""
        self.scheduler.repair()
        self.guesser.repair(set(self.scheduler.running))

    def _release_cancelled(self) -> None:
        """Free the pages of cancelled requests, unless a pass is under way: whoever makes it does so at its end."""
        while self._cancelled and not self._is_changing and self._lock.acquire(blocking=False):
            try:
                with self._changing():
                    self._drop_cancelled()
            finally:
                self._lock.release()

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            stream = self._cancelled[0]
            answer = self._answers.get(id(stream))
            has_missed = self._drop(stream)
            self._cancelled.popleft()
            if answer is not None and not has_missed:
                for index, completion in enumerate(stream.completions):
                    completion.text += answer.rest(index)

    def _drop(self, stream: Stream) -> bool:
        """Let go of all that is held for a request; whether tokens were chosen that it did not get."""
        for sample in [*self.scheduler.running, *self.scheduler.waiting]:
            if sample.stream is stream:
                self._remove(sample)
        self._answers.pop(id(stream), None)
        num_chosen = len(self._chosen)
        self._chosen = deque(entry for entry in self._chosen if entry[0] is not stream)
        return len(self._chosen) < num_chosen

    def _remove(self, sample: Sample) -> None:
        self.scheduler.remove(sample)
        self.guesser.forget(sample)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, this thread alone changes the state. Raises UsageError where it is about to already."""
        with self._lock:
            if self._is_changing:
                raise UsageError(
                    "the engine was called from within one of its own passes",
                    hint="call it from the callback of a request, or after step()",
                )
            try:
                self._is_changing = True
                yield
            except BaseException:
                self._repair()
                raise
            finally:
                self._is_changing = False


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
