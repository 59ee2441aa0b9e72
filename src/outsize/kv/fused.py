"""Attention over pages by torch's fused kernels, for devices.

The pages of a request are gathered into keys and values that lie together, and `scaled_dot_product_attention` takes the
kernel that fits. Heads that share a key are rows of one matrix, since not every kernel knows of them. Requests with one
token each, which is what decoding is, are gathered and attended together: otherwise a device would wait for its host, which
would give it a few small kernels per request and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from outsize.kv.pages import PAGE_TOKENS

# T tokens, B requests, H heads, G key heads, R = H / G, K key width, V value width, P pages, S = P * PAGE_TOKENS positions


@dataclass(frozen=True, slots=True)
class Singles:
    """Requests with one token in a pass: its place there, their pages, and how many positions it sees, itself included."""

    rows: torch.Tensor
    """`[B]`"""
    tables: torch.Tensor
    """`[B, P]`; where a request has fewer pages, any."""
    seen: torch.Tensor
    """`[B]`"""


def attend_singles(
    query_BHK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    singles: Singles,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`[B, H, V]`: one query of each request, over keys `[.., G, K, PAGE]` and values `[.., G, PAGE, V]`."""
    tables_BP, seen_B1 = singles.tables, singles.seen.unsqueeze(1)
    num_pages = tables_BP.shape[1]
    first_B1 = torch.zeros_like(seen_B1)
    if window is not None and -(-window // PAGE_TOKENS) + 1 < num_pages:
        # The last pages of each, as many as a window touches.
        num_pages = -(-window // PAGE_TOKENS) + 1
        first_B1 = (seen_B1 - window).clamp(min=0) // PAGE_TOKENS
        index_BP = first_B1 + torch.arange(num_pages, device=first_B1.device)
        tables_BP = tables_BP.gather(1, index_BP.clamp(max=tables_BP.shape[1] - 1))
    key_at_BS = first_B1 * PAGE_TOKENS + torch.arange(num_pages * PAGE_TOKENS, device=first_B1.device)
    is_seen_BS = key_at_BS < seen_B1
    if window is not None:
        is_seen_BS &= key_at_BS >= seen_B1 - window
    key_BGSK, value_BGSV = _gathered(keys, values, tables_BP)
    for part in (key_BGSK, value_BGSV):  # zero times what an earlier owner of a page left may be no number
        part.masked_fill_(~is_seen_BS[:, None, :, None], 0)
    output_BGRV: torch.Tensor = scaled_dot_product_attention(
        query_BHK.unflatten(1, (keys.shape[1], -1)),
        key_BGSK,
        value_BGSV,
        attn_mask=is_seen_BS[:, None, None, :],
        scale=scale,
    )
    return output_BGRV.flatten(1, 2)


def attend_one(
    query_THK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    position: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`[T, H, V]`: consecutive queries of one request, the first at `position`."""
    num_queries, groups = query_THK.shape[0], keys.shape[1]
    end = position + num_queries
    first_page = 0 if window is None else max(0, position - window + 1) // PAGE_TOKENS
    begin = first_page * PAGE_TOKENS
    key_1GSK, value_1GSV = _gathered(keys, values, table[None, first_page : -(-end // PAGE_TOKENS)])
    key_1GSK, value_1GSV = key_1GSK[:, :, : end - begin], value_1GSV[:, :, : end - begin]
    if position == 0 and (window is None or window >= num_queries):
        output_1HTV: torch.Tensor = scaled_dot_product_attention(
            query_THK.transpose(0, 1).unsqueeze(0),
            key_1GSK,
            value_1GSV,
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return output_1HTV[0].transpose(0, 1)
    query_at_T1 = torch.arange(position, end, device=query_THK.device).unsqueeze(1)
    key_at_S = torch.arange(begin, end, device=query_THK.device)
    is_seen_TS = key_at_S <= query_at_T1
    if window is not None:
        is_seen_TS &= key_at_S > query_at_T1 - window
    query_GRTK = query_THK.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    per_key = query_GRTK.shape[1]
    output_1GRTV: torch.Tensor = scaled_dot_product_attention(
        query_GRTK.flatten(1, 2).unsqueeze(0),
        key_1GSK,
        value_1GSV,
        attn_mask=is_seen_TS.repeat(per_key, 1),
        scale=scale,
    )
    output_GRTV: torch.Tensor = output_1GRTV[0].unflatten(1, (per_key, num_queries))
    return output_GRTV.permute(2, 0, 1, 3).flatten(1, 2)


def _gathered(
    keys: torch.Tensor, values: torch.Tensor, tables_BP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[B, G, S, K]` and values `[B, G, S, V]` of all positions on the pages."""
    key_BGSK = keys[tables_BP].permute(0, 2, 1, 4, 3).flatten(2, 3)
    value_BGSV = values[tables_BP].transpose(1, 2).flatten(2, 3)
    return key_BGSK, value_BGSV
