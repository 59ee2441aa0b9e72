"""The bytes of pages, and one pass over them: a packed row of tokens of many requests.

A pass goes through the model as `[1, T]`: some consecutive tokens of each request, end to end. Linears see one matrix;
attention (`attention.py`) finds each token's request in the pass that travels with the call's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from outsize.block import align
from outsize.engine import Repeatable
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.kv.fused import Singles, attend_one, attend_singles
from outsize.kv.kernel import Units, load
from outsize.kv.pages import PAGE_TOKENS, SCRATCH, pages_for
from outsize.tier import HostArena, sent

# T tokens of the pass, H heads, G key heads, R = H / G, K key width, V value width, P pages, S positions seen, B requests
TILE_SCORES = 1 << 22
"""Scores that are held at once where attention runs in torch."""

TILE_MASK = 1 << 25
"""Places of a mask that are held at once where torch's fused attention runs: its kernels hold no scores."""

ROWS_PER_UNIT = 32
"""Queries that a unit of the kernel computes, over all heads that share a key: a page stays in cache for them."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token, and how far its queries see (`window` positions, themselves included)."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return self.kv_heads * (self.key_width + self.value_width) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` of a pass belong to one request, the first of them at `position`, with pages `table`."""

    start: int
    stop: int
    position: int
    table: Sequence[int]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer makes scores of queries and keys."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


def is_fused(device: torch.device) -> bool:
    """Whether torch's fused attention runs there: on a device; on a processor the kernel reads pages where they lie."""
    return device.type != "cpu"


class PagedKV:
    """Keys `[P, G, K, PAGE]` (transposed: one vector for each of K) and values `[P, G, PAGE, V]` of every layer.

    All are views of `pages [P, page_elements]`: the layers of a page lie together, each with its keys before its values,
    so that a page moves as one contiguous range.
    """

    @outside_inference_mode()
    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        contents: torch.Tensor,
        num_pages: int,
        most_positions: int | None = None,
    ) -> None:
        """Divide `contents`, one-dimensional, into pages.

        It holds `num_pages`; for dry runs, fewer that stand for them. `most_positions` limits one request; with None it
        may use all pages.
        """
        self.num_pages = num_pages
        self.most_pages = num_pages if most_positions is None else min(num_pages, pages_for(most_positions))
        self.num_bytes = num_pages * page_bytes(layers, contents.dtype)
        """Bytes of all pages."""
        self.pages = contents.view(-1, page_bytes(layers, contents.dtype) // contents.itemsize)
        self.dtype = contents.dtype
        self.device = contents.device
        self.kernel = load(self.dtype) if self.device.type == "cpu" else None
        """The compiled attention, where it reads pages of this type on this device."""
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        start = 0
        for index, layer in layers.items():
            groups, key_width, value_width = layer.kv_heads, layer.key_width, layer.value_width
            middle = start + groups * key_width * PAGE_TOKENS
            stop = middle + groups * PAGE_TOKENS * value_width
            self.keys[index] = self.pages[:, start:middle].unflatten(1, (groups, key_width, PAGE_TOKENS))
            self.values[index] = self.pages[:, middle:stop].unflatten(1, (groups, PAGE_TOKENS, value_width))
            start = stop


def unplanned_memory(num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros for pages that no arena of a run holds, one-dimensional. Raises BudgetError or torch.OutOfMemoryError."""
    if device.type == "cpu":
        region = HostArena(align(num_bytes)).allocate(num_bytes, "the KV cache")
        return region.tensor(dtype, num_bytes // dtype.itemsize)
    return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)


def page_bytes(layers: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes of one page in all layers, rounded up to what the disk tier can move directly."""
    return align(PAGE_TOKENS * sum(layer.token_bytes(dtype) for layer in layers.values()))


class Pass(Repeatable):
    """One packed row: where its tokens' keys and values go, and what each of its queries sees.

    It is an argument of the model's call; calls are told apart by the `repr` of such arguments, so all passes over as many
    pages have the same. Used again, it writes the same keys and values to the same places. With `one_by_one` no query's
    numbers depend on what else is in the pass; the compiled attention has that always.
    """

    def __init__(self, kv: PagedKV, segments: Sequence[Segment], *, one_by_one: bool = False) -> None:
        self.kv = kv
        self.one_by_one = one_by_one
        pages, offsets = [], []
        for segment in segments:
            for position in range(segment.position, segment.position + segment.stop - segment.start):
                pages.append(segment.table[position // PAGE_TOKENS] if segment.table else SCRATCH)
                offsets.append(position % PAGE_TOKENS)
        self._pages = sent(torch.tensor(pages, device="cpu"), kv.device)
        self._offsets = sent(torch.tensor(offsets, device="cpu"), kv.device)
        self._real = [segment for segment in segments if segment.table]
        self._dealt: dict[int, Units] = {}

    def __repr__(self) -> str:
        return f"<pass over {self.kv.num_pages} pages>"

    @property
    def pages_bytes(self) -> int:
        """Bytes of the pages that it reads and writes."""
        return self.kv.num_bytes

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Store `key [1, G, T, K]` and `value [1, G, T, V]`, and attend from `query [1, H, T, K]`: `[1, T, H, V]`.

        `mask` is None, and `options` hold what `probe.py` let through.
        """
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        keys[self._pages, :, :, self._offsets] = key[0].transpose(0, 1).to(keys.dtype)
        values[self._pages, :, self._offsets] = value[0].transpose(0, 1).to(values.dtype)
        scale = options.get("scaling")
        scoring = Scoring(
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            softcap=options.get("softcap"),
            window=options.get("sliding_window"),
            sinks=options.get("s_aux"),
        )
        query_THK = query[0].transpose(0, 1)
        kernel = self.kv.kernel
        if kernel is not None and self._real:
            output_THV = kernel.attend(
                query_THK.float().contiguous(),
                keys,
                values,
                self._units(query.shape[1] // keys.shape[1]),
                self._flat_tables,
                scale=scoring.scale,
                softcap=scoring.softcap or 0.0,
                window=scoring.window or 0,
                sinks=None if scoring.sinks is None else scoring.sinks.float().contiguous(),
            )
        elif is_fused(query.device) and not (self.one_by_one or scoring.softcap or scoring.sinks is not None):
            output_THV = self._fused(query_THK.to(keys.dtype), keys, values, scoring)
        else:
            output_THV = self._in_torch(query_THK, keys, values, scoring)
        return output_THV.to(query.dtype).unsqueeze(0)

    @cached_property
    def _flat_tables(self) -> torch.Tensor:
        """All tables end to end, for the kernel."""
        return torch.tensor(
            [page for segment in self._real for page in segment.table], dtype=torch.int32, device="cpu"
        )

    @cached_property
    def _tables(self) -> list[torch.Tensor]:
        return [sent(torch.tensor(segment.table, device="cpu"), self.kv.device) for segment in self._real]

    @cached_property
    def _singles(self) -> list[Singles]:
        """Requests with one token in the pass, in groups of like length that gather no more pages than one request has."""
        ones = sorted(
            (segment for segment in self._real if segment.stop - segment.start == 1),
            key=lambda segment: segment.position,
        )
        groups: list[list[Segment]] = []
        for segment in ones:
            pages = segment.position // PAGE_TOKENS + 1
            if not groups or pages * (len(groups[-1]) + 1) > self.kv.most_pages:
                groups.append([])
            groups[-1].append(segment)
        return [self._together(group) for group in groups]

    def _together(self, group: Sequence[Segment]) -> Singles:
        pages = group[-1].position // PAGE_TOKENS + 1
        tables = [(*segment.table[:pages], *[SCRATCH] * (pages - len(segment.table))) for segment in group]
        device = self.kv.device
        return Singles(
            rows=sent(torch.tensor([segment.start for segment in group], device="cpu"), device),
            tables=sent(torch.tensor(tables, device="cpu"), device),
            seen=sent(torch.tensor([segment.position + 1 for segment in group], device="cpu"), device),
        )

    def _units(self, group: int) -> Units:
        """The pass in units, for `group` heads to a key."""
        if group not in self._dealt:
            rows, items, table_start = max(1, ROWS_PER_UNIT // group), [], 0
            for segment in self._real:
                for start in range(segment.start, segment.stop, rows):
                    count = min(rows, segment.stop - start)
                    items.append((start, count, table_start, segment.position + start - segment.start))
                table_start += len(segment.table)
            self._dealt[group] = Units(items)
        return self._dealt[group]

    def _fused(
        self, query_THK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        output_THV = query_THK.new_zeros(*query_THK.shape[:2], values.shape[-1])
        for singles in self._singles:
            output_THV[singles.rows] = attend_singles(
                query_THK[singles.rows], keys, values, singles, scoring.scale, scoring.window
            )
        for segment, table in zip(self._real, self._tables, strict=True):
            count = segment.stop - segment.start
            if count > 1:
                per_key = query_THK.shape[1] // keys.shape[1]
                rows = max(1, TILE_MASK // (per_key * (segment.position + count)))
                for start in range(segment.start, segment.stop, rows):
                    stop = min(start + rows, segment.stop)
                    position = segment.position + start - segment.start
                    output_THV[start:stop] = attend_one(
                        query_THK[start:stop], keys, values, table, position, scoring.scale, scoring.window
                    )
        return output_THV

    def _in_torch(
        self, query_THK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        output_THV = query_THK.new_zeros(
            *query_THK.shape[:2], values.shape[-1], dtype=_wide(keys.dtype)
        )  # zeros for tokens of no request
        for segment, table in zip(self._real, self._tables, strict=True):
            num_seen = segment.position + segment.stop - segment.start
            rows = 1 if self.one_by_one else max(1, TILE_SCORES // (query_THK.shape[1] * num_seen))
            for start in range(segment.start, segment.stop, rows):
                stop = min(start + rows, segment.stop)
                position = segment.position + start - segment.start
                output_THV[start:stop] = attend_in_torch(
                    query_THK[start:stop], keys, values, table, position, scoring
                )
        return output_THV


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that scores and sums have: fp32, or the type of keys and values where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def attend_in_torch(
    query_THK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    position: int,
    scoring: Scoring,
) -> torch.Tensor:
    """`[T, H, V]`, in fp32 or wider: consecutive queries of one request, the first at `position`, over gathered pages."""
    num_queries, heads, _ = query_THK.shape
    groups, wide = keys.shape[1], _wide(keys.dtype)
    window = scoring.window or position + num_queries
    first_page = max(0, position - window + 1) // PAGE_TOKENS
    begin, end = first_page * PAGE_TOKENS, position + num_queries
    pages = table[first_page : -(-end // PAGE_TOKENS)]
    key_GKS = keys[pages].permute(1, 2, 0, 3).flatten(2)[..., : end - begin].to(wide)
    value_GSV = values[pages].transpose(0, 1).flatten(1, 2)[:, : end - begin].to(wide)
    query_GRTK = query_THK.to(wide).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    scores_GRTS = (query_GRTK.flatten(1, 2) @ key_GKS).unflatten(1, (-1, num_queries)) * scoring.scale
    if scoring.softcap:
        scores_GRTS = torch.tanh(scores_GRTS / scoring.softcap) * scoring.softcap
    query_at = torch.arange(position, end, device=query_THK.device).unsqueeze(1)
    key_at = torch.arange(begin, end, device=query_THK.device)
    scores_GRTS.masked_fill_((key_at > query_at) | (key_at <= query_at - window), -torch.inf)
    if scoring.sinks is not None:
        sinks_GRT1 = scoring.sinks.to(wide).view(groups, -1, 1, 1).expand(-1, -1, num_queries, 1)
        weights_GRTS = torch.cat([scores_GRTS, sinks_GRT1], -1).softmax(-1)[..., :-1]
    else:
        weights_GRTS = scores_GRTS.softmax(-1)
    output_GRTV: torch.Tensor = (weights_GRTS.flatten(1, 2) @ value_GSV).unflatten(1, (-1, num_queries))
    return output_GRTV.permute(2, 0, 1, 3).reshape(num_queries, heads, -1)
