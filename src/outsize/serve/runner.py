"""Passes through a model: chunks of requests packed into one row, and the logits that are wanted.

For a model of Outsize its blocks stream by themselves: a pass visits each of them once, whatever it holds. Pages are
allocated before the model is placed, and it is placed for the largest pass there will be: memory stays under its cap with
any prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.config import format_bytes, parse_bytes
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.engine.runtime import Runtime, find_runtime
from outsize.errors import BudgetError, ConfigError
from outsize.kv import (
    PAGE_TOKENS,
    Pageable,
    PagedKV,
    Pass,
    Segment,
    page_bytes,
    pages_for,
    probe,
    switched,
    unplanned_memory,
)
from outsize.plan.workload import Call
from outsize.serve.fixed import TILE_ROWS, FixedTiles
from outsize.store import memory
from outsize.tier import DeviceRegion, Region

PASS_TOKENS = 512
"""Tokens of a pass: products are then near full speed on a CPU, and requests that decode do not wait long."""

PASS_TOKENS_ON_DEVICE = 8192
"""The same on an accelerator, whose weights come over a link: products hide that from here on."""

LOGIT_ELEMENTS = 1 << 24
"""Logits of one pass, at most: rows of them are limited, not the vocabulary."""

KV_SHARE = 0.25
"""Of the memory that is left, what pages take where nothing else is said, and no more than LONGEST whole requests."""

LONGEST = 16

FEWEST = 16
"""Pages, before a model is said not to fit."""


MOST_GUESSES = 16
"""Tokens that are guessed ahead of one sequence, in a pass."""


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The most that memory is planned for: `sequences` at once, each of `tokens`, prompt and answer together."""

    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive tokens of one request in a pass; `rows` are those, of them, whose logits are wanted."""

    tokens: Sequence[int]
    position: int
    table: Sequence[int]
    rows: Sequence[int]


class Runner:
    """A model with pages for its keys and values."""

    def __init__(
        self,
        model: nn.Module,
        kv: str | int | None = None,
        pass_tokens: int | None = None,
        *,
        deterministic: bool = False,
        share: float = KV_SHARE,
        concurrency: Concurrency | None = None,
        only_plan: bool = False,
    ) -> None:
        """`share`: of free memory, for pages, where neither `kv` nor `concurrency` says. With `only_plan` nothing is
        allocated, and `run` cannot be called.

        Raises NotPageableError where the model cannot run so, BudgetError where it does not fit.
        """
        if pass_tokens is not None and pass_tokens < 1:
            raise ConfigError(
                f"pass_tokens: {pass_tokens} is less than 1", hint=f"pass {PASS_TOKENS}, or leave it out"
            )
        self._runtime = runtime = find_runtime(model)
        self.model: Any = model
        self.deterministic = deterministic
        self.device = next(model.parameters()).device if runtime is None else runtime.model.torch_device
        self._sends = runtime is None  # a model of Outsize sends its arguments itself
        self.pageable: Pageable = probe(
            model,
            self._call if runtime is None else runtime.calls.walk,
        )
        if runtime is not None:
            runtime.visits.call.beside_logit_bytes = 0  # tokens are chosen row by row
        assert isinstance(model, PreTrainedModel)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._concurrency = concurrency
        self.pass_tokens = pass_tokens or (
            PASS_TOKENS if self.device.type == "cpu" else PASS_TOKENS_ON_DEVICE
        )
        self.pass_rows = max(1, min(self.pass_tokens, LOGIT_ELEMENTS // self.vocabulary))
        if concurrency is not None:
            most_rows = concurrency.sequences * (1 + MOST_GUESSES)
            self.pass_tokens = min(
                self.pass_tokens, max(concurrency.sequences * concurrency.tokens, most_rows)
            )
            self.pass_rows = min(self.pass_rows, most_rows)
        self.page_bytes = page_bytes(self.pageable.layers, self.pageable.dtype)
        self._region: Region | DeviceRegion | None = None
        """The memory of the pages in the model's run."""
        self.sizes = self._sizes(kv, share)
        """Numbers of pages to try, the largest first."""
        if only_plan:
            return
        for num_pages in self.sizes:
            try:
                self._open_pages(num_pages + 1)
                return
            except BudgetError:
                if num_pages == self.sizes[-1]:
                    raise

    def _open_pages(self, num_pages: int) -> None:
        """Place the model beside pages, and make them. Raises BudgetError, and then there are none.

        A model that trains and was not called yet is placed by its first call, or by the first pass.
        """
        runtime = self._runtime
        if runtime is not None and runtime.calls.waits_for_training:
            self.kv = self.stand_in(num_pages)
            with torch.no_grad(), switched(self.model), self._products():
                runtime.calls.expect(self._arguments(parts, self.kv) for parts in self._largest(self.kv))
            return
        self._settle(num_pages)
        self.kv = self._made(num_pages)

    def renew(self) -> bool:
        """Make the pages again if the model gave their memory to another call, or its weights changed.

        Returns whether that was so: what they held is lost. Raises BudgetError if they do not fit any more.
        """
        runtime = self._runtime
        if runtime is None or (self._region is not None and self._region is _pages_of(runtime)):
            return False
        if runtime.calls.waits_for_training:  # on as many tokens as a pass has: no batch was seen
            count = min(self.pass_tokens, self.pageable.most_positions)
            ids = torch.zeros(1, count, dtype=torch.long, device="cpu")
            with torch.no_grad():
                runtime.calls.settle_for({"input_ids": ids, "labels": ids, "use_cache": False})
        num_pages = self.kv.num_pages
        self._settle(num_pages)
        self.kv = self._made(num_pages)
        return True

    @outside_inference_mode()
    def stand_in(self, num_pages: int) -> PagedKV:
        """Two pages that stand for `num_pages` in dry runs, which write to all alike."""
        contents = unplanned_memory(2 * self.page_bytes, self.pageable.dtype, self.device)
        return PagedKV(self.pageable.layers, contents, num_pages, self.pageable.most_positions)

    @outside_inference_mode()
    def _made(self, num_pages: int) -> PagedKV:
        """Pages where blocks compute: in the arena of the model's run, if it has one. Raises BudgetError."""
        num_bytes, dtype = num_pages * self.page_bytes, self.pageable.dtype
        try:
            if self._runtime is None:
                contents = unplanned_memory(num_bytes, dtype, self.device)
            else:
                self._region = self._runtime.calls.take_pages(num_bytes)
                contents = self._region.tensor(dtype, num_bytes // dtype.itemsize)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"the KV cache takes {format_bytes(num_bytes)}, more than the device has free",
                hint=f"give less with kv=; {format_bytes(self._free_bytes())} are free",
            ) from error
        return PagedKV(self.pageable.layers, contents, num_pages, self.pageable.most_positions)

    @torch.no_grad()
    def _settle(self, num_pages: int) -> None:
        """Place the model's weights beside the pages, for the largest passes there will be, or find room for those beside
        what is placed. Raises BudgetError."""
        if self._runtime is not None:
            kv = self.stand_in(num_pages)
            with switched(self.model), self._products():
                for parts in self._largest(kv):
                    self._runtime.calls.settle_for(self._arguments(parts, kv))

    @torch.no_grad()
    def largest_and_decoding(self, num_pages: int, num_tokens: int) -> tuple[Call, Call]:
        """Dry runs of the largest pass beside `num_pages`, and of one that decodes a token of `num_tokens` sequences."""
        assert self._runtime is not None
        kv = self.stand_in(num_pages)
        largest = next(self._largest(kv))
        position = largest[0].position + len(largest[0].tokens) - 1
        decoding = [Part((1,), position, largest[0].table, (0,))] * num_tokens
        dry_run = self._runtime.calls.dry_run
        with switched(self.model), self._products():
            return dry_run(self._arguments(largest, kv)), dry_run(self._arguments(decoding, kv))

    @torch.no_grad()
    def run(self, parts: Sequence[Part], *, is_long: bool = False) -> list[torch.Tensor]:
        """One pass; for each part the logits `[rows, V]` that it wants.

        With `is_long` all positions are rotated as those of long sequences are, also where no part reaches so far.
        """
        long_after = self.pageable.long_after
        if is_long and long_after is not None:
            reach = max(part.position + len(part.tokens) for part in parts)
            if reach <= long_after:
                parts = [*parts, Part((0,), long_after, (), ())]
        with switched(self.model), self._products():
            logits_NV = self._call(self._arguments(parts, self.kv)).logits[0]
        if self._runtime is not None:
            self._runtime.calls.read_ahead()
        return list(logits_NV.split([len(part.rows) for part in parts] + [int(not _num_rows(parts))]))

    def _call(self, arguments: dict[str, Any]) -> Any:
        if self._sends:
            arguments = {
                name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
        return self.model(**arguments)

    def _products(self) -> AbstractContextManager[object]:
        return FixedTiles() if self.deterministic else nullcontext()  # type: ignore[no-untyped-call]

    def _arguments(self, parts: Sequence[Part], kv: PagedKV) -> dict[str, Any]:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        segments = []
        for part in parts:
            start = len(ids)
            ids += part.tokens
            positions += range(part.position, part.position + len(part.tokens))
            rows += [start + row for row in part.rows]
            segments.append(Segment(start, len(ids), part.position, part.table))
        if self.deterministic and (rest := -len(ids) % TILE_ROWS):
            segments.append(Segment(len(ids), len(ids) + rest, 0, ()))
            ids += [0] * rest
            # All alike: a high position would rotate all others as those of long sequences.
            positions += [0] * rest
        return {
            "input_ids": torch.tensor([ids], device="cpu"),
            "position_ids": torch.tensor([positions], device="cpu"),
            "logits_to_keep": torch.tensor(rows or [0], device="cpu"),
            "use_cache": False,
            "paged": Pass(kv, segments, one_by_one=self.deterministic),
        }

    def _largest(self, kv: PagedKV) -> Iterator[list[Part]]:
        """The passes that take most: as many tokens and rows as there may be, at the end of the longest request.

        Calls are told apart by whether an id is 0 and whether positions go on from one token to the next: one pass of
        each kind, so that no dry run is made in the midst of serving.
        """
        longest = min(self.pageable.most_positions, (kv.num_pages - 1) * PAGE_TOKENS)
        if self._concurrency is not None:
            longest = min(longest, self._concurrency.tokens)
        table = [1] * pages_for(longest)
        for token in (1, 0):
            for most in (longest, longest // 2):
                tokens, rows = self.pass_tokens, self.pass_rows
                parts = []
                while tokens:
                    count = min(tokens, most)
                    wanted = min(rows, count)
                    parts.append(Part([token] * count, longest - count, table, range(wanted)))
                    tokens, rows = tokens - count, rows - wanted
                yield parts

    def _sizes(self, kv: str | int | None, share: float) -> list[int]:
        """Pages to try: what was asked for; else a share of what is free, and less where weights then do not fit."""
        longest = pages_for(self.pageable.most_positions)
        if kv is None and self._concurrency is not None:
            return self._sizes_for(self._concurrency, share)
        if kv is None:
            most = min(int(share * self._free_bytes()) // self.page_bytes, LONGEST * longest)
            return [
                max(most >> half, 1) for half in range(max(1, most.bit_length() - FEWEST.bit_length() + 1))
            ]
        num_bytes = parse_bytes(kv, "kv=")
        if num_bytes < self.page_bytes:
            raise BudgetError(
                f"{format_bytes(num_bytes)} of KV cache hold no page of {PAGE_TOKENS} tokens, which takes "
                f"{format_bytes(self.page_bytes)}",
                hint=f"pass {format_bytes(longest * self.page_bytes)}, for a request of all its positions",
            )
        return [num_bytes // self.page_bytes]

    def _sizes_for(self, concurrency: Concurrency, share: float) -> list[int]:
        """Pages for all concurrent sequences within a `share` of what is free, then for half, and so on down to one."""
        one = pages_for(min(concurrency.tokens, self.pageable.most_positions))
        most = min(concurrency.sequences, max(1, int(share * self._free_bytes()) // (one * self.page_bytes)))
        return [max(most >> half, 1) * one for half in range(most.bit_length())]

    def _free_bytes(self) -> int:
        """Memory that is free where blocks compute."""
        if self._runtime is not None:
            return self._runtime.budget.free_bytes()
        if self.device.type == "cpu":
            return memory.available_bytes()
        return int(torch.cuda.mem_get_info(self.device)[0])


def _pages_of(runtime: Runtime) -> Region | DeviceRegion | None:
    """The pages that the run of a model has now."""
    executor = runtime.backing.executor
    return None if executor is None else executor.store.planes.pages


def _num_rows(parts: Sequence[Part]) -> int:
    return sum(len(part.rows) for part in parts)
