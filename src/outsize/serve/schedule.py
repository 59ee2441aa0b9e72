"""Who goes through the model in the next pass: decodes first, then pieces of prompts (Holmes et al., "FastGen", 2024).

A request is admitted when the pages of all it may ever need are free, so none is ever put off half-way. A prompt that
begins as an earlier one shares its full pages. No tensor is here: the scheduler runs in tests without a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from outsize.errors import RequestError
from outsize.kv import PAGE_TOKENS, PagePool, pages_for, prefix_hashes
from outsize.serve.request import Stream

Propose = Callable[["Sample", int], list[int]]
"""Guesses of the tokens that follow a sample, at most so many."""


@dataclass(eq=False)
class Sample:
    """One continuation on its way: `tokens` are known, those before `num_computed` are in its pages."""

    stream: Stream
    index: int
    tokens: list[int]
    most_tokens: int
    """Of prompt and continuation."""
    table: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    salt: bytes | None = b""
    """Of its hashes: positions are rotated alike under one salt; None where that may change on the way."""
    num_computed: int = 0
    num_registered: int = 0

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not in its pages; at least one, whose logits are wanted."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last known token are computed."""
        return self.num_remaining == 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a sample has in a pass: its next `num_tokens` known tokens, then guesses; the last `num_rows` want their logits.

    Those are the last known token and the guesses, where it gets so far; with `tells_prompt` all.
    """

    sample: Sample
    num_tokens: int
    num_rows: int
    guesses: tuple[int, ...] = ()
    tells_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a pass (`tokens`, `rows` of logits), of a request (`positions`, and ids below `vocabulary`), and where rotations
    change (`long_after`).
    """

    tokens: int
    rows: int
    positions: int
    long_after: int | None = None
    vocabulary: int | None = None


class Scheduler:
    """Samples that wait, in the order of their coming, and those that run."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []
        self.num_shared_tokens = 0
        """Tokens of prompts that were found in pages."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not self.running

    def add(self, stream: Stream) -> None:
        """Queue a request's samples. Raises RequestError where it can never be served."""
        request, positions = stream.request, self.limits.positions
        request.check_prompt(positions, self.limits.vocabulary)
        most = min(len(request.prompt) + request.max_new_tokens, positions)
        if (needed := pages_for(most)) > self.pool.num_usable:
            room = self.pool.num_usable * PAGE_TOKENS
            raise RequestError(
                f"{len(request.prompt):,} tokens of prompt and up to {most - len(request.prompt):,} new ones need "
                f"{needed} pages of KV cache, there are {self.pool.num_usable}",
                hint=f"give more memory to the KV cache, or keep prompt and new tokens within {room:,}",
            )
        self.waiting += [
            Sample(stream, index, list(request.prompt), most) for index in range(request.num_samples)
        ]

    def admit(self) -> None:
        """Give pages to those that wait, in order, as long as there are enough; siblings wait for their prompt."""
        computing = {id(sample.stream) for sample in self.running if not sample.is_decoding}
        for sample in list(self.waiting):
            if id(sample.stream) in computing:
                continue
            if not self._give_pages(sample):
                return
            self.running.append(sample)
            self.waiting.remove(sample)
            computing.add(id(sample.stream))

    def _give_pages(self, sample: Sample) -> bool:
        needed, long_after = pages_for(sample.most_tokens), self.limits.long_after
        may_turn = long_after is not None and len(sample.tokens) <= long_after < sample.most_tokens
        sample.salt = None if may_turn else b"long" if self.is_long(sample) else b""
        sample.hashes = [] if sample.salt is None else prefix_hashes(sample.tokens, sample.salt)
        # The last token is computed always: its logits are wanted.
        known = sample.hashes[: (len(sample.tokens) - 1) // PAGE_TOKENS]
        shared = [] if sample.stream.request.prompt_logprobs else self.pool.match(known)
        if self.pool.num_free < needed - len(shared):
            self.pool.free(shared)
            return False
        sample.table = shared + self.pool.allocate(needed - len(shared))
        sample.num_computed = sample.num_registered = len(shared) * PAGE_TOKENS
        self.num_shared_tokens += sample.num_computed
        return True

    def compose(self, propose: Propose) -> list[Chunk]:
        """The next pass: at most so many tokens and rows as the limits say, and on one side of `long_after`."""
        order = sorted(self.running, key=lambda sample: not sample.is_decoding)
        if not order:
            return []
        is_long = self.is_long(order[0])
        tokens, rows = self.limits.tokens, self.limits.rows
        chunks: list[Chunk] = []
        for sample in order:
            if self.is_long(sample) != is_long:
                continue
            if not tokens or not rows:
                break
            chunk = self._chunk(sample, tokens, rows, propose)
            chunks.append(chunk)
            tokens -= chunk.num_tokens + len(chunk.guesses)
            rows -= chunk.num_rows
        # The next pass begins with who was left out; prompts keep their order, so that the first ends first.
        served = {id(chunk.sample) for chunk in chunks if chunk.sample.is_decoding}
        self.running.sort(key=lambda sample: id(sample) in served)
        return chunks

    def _chunk(self, sample: Sample, tokens: int, rows: int, propose: Propose) -> Chunk:
        if not sample.is_decoding:
            tells_prompt = _tells_prompt(sample)
            count = min(sample.num_remaining, tokens, rows if tells_prompt else tokens)
            num_rows = count if tells_prompt else int(count == sample.num_remaining)
            return Chunk(sample, count, num_rows, tells_prompt=tells_prompt)
        most = min(tokens - 1, rows - 1, sample.most_tokens - len(sample.tokens) - 1)
        if self.limits.long_after is not None and len(sample.tokens) <= self.limits.long_after:
            most = min(most, self.limits.long_after - len(sample.tokens))
        guesses = tuple(propose(sample, most)) if most > 0 else ()
        return Chunk(sample, 1, 1 + len(guesses), guesses)

    def is_long(self, sample: Sample) -> bool:
        """On which side of `long_after` a sample is."""
        return self.limits.long_after is not None and len(sample.tokens) > self.limits.long_after

    def computed(self, sample: Sample, num_tokens: int) -> None:
        """So many more of its known tokens are in its pages; full ones can be found from now on."""
        sample.num_computed += num_tokens
        end = min(sample.num_computed, len(sample.hashes) * PAGE_TOKENS)
        for start in range(sample.num_registered, end - PAGE_TOKENS + 1, PAGE_TOKENS):
            page = start // PAGE_TOKENS
            self.pool.register(sample.table[page], sample.hashes[page])
            sample.num_registered = start + PAGE_TOKENS

    def turned(self, sample: Sample) -> None:
        """A sample has grown past `long_after`: all its tokens are computed again, rotated in the other way."""
        sample.num_computed = 0

    def pages_lost(self) -> None:
        """What pages held is gone: all known tokens of the running samples are computed again, and no prefix is known."""
        self.pool.forget()
        for sample in self.running:
            sample.num_computed = sample.num_registered = 0
            if _tells_prompt(sample):
                sample.stream.prompt_logprobs.clear()

    def remove(self, sample: Sample) -> None:
        """A sample ended: its pages are free, and what they hold can be found until others need them, its answer too."""
        if sample in self.running:
            self.running.remove(sample)
            if sample.salt is not None:
                hashes = prefix_hashes(sample.tokens[: sample.num_computed], sample.salt)
                for page, digest in zip(sample.table, hashes, strict=False):
                    self.pool.register(page, digest)
            self.pool.free(sample.table)
            sample.table = []
        else:
            self.waiting.remove(sample)

    def repair(self) -> None:
        """Make the books right after an exception in the midst of a change."""
        running = set(self.running)
        self.waiting = deque(sample for sample in self.waiting if sample not in running)
        self.pool.repair(sample.table for sample in self.running)

    def check(self) -> None:
        """Assert that every page is where the books say."""
        self.pool.check(sample.table for sample in self.running)


def _tells_prompt(sample: Sample) -> bool:
    """Whether logits of the prompt are wanted that did not come yet; the first sample asks for them."""
    stream = sample.stream
    is_wanted = stream.request.prompt_logprobs and sample.index == 0
    return is_wanted and len(stream.prompt_logprobs) < len(stream.request.prompt) - 1
