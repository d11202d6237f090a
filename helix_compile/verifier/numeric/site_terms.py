"""Both kinds of site in the terms of the layer checks: a query and cached entries whose product is the scores.

An entry is [first | second]: latent and rope part (MLA), or K and V of all KV heads side by side (grouped-query). A query
has the widths of an entry: of grouped-query attention it is 0 but at its KV head's channels of K. Scores are then
scale * query . entry for both kinds. This file shares no code with the runtime, which it is there to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.matches import AttentionMatch, GqaMatch, Site, permuted

Parts = tuple[Tensor, Tensor]


def query_parts(match: Site, values: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Parts:
    """The original's own query [B, T, H, *], in the widths of both parts of an entry."""
    if isinstance(match, GqaMatch):
        q = values[match.q].double().transpose(1, 2)
        first = spread_over_heads(q, 0, match)
        return first, q.new_zeros(*q.shape[:3], match.cache.widths[1])
    q = permuted(values[match.q].double(), match.q_form, "BTHC")
    rope = permuted(values[match.q_rope_value or match.q].double(), match.q_rope_form, "BTHC")
    w_uk = match.w_uk.of(tensors[prefix + match.w_uk.param].double())
    absorbed = torch.einsum("bthd,hdr->bthr", q[..., list(match.q_nope)], w_uk)
    return absorbed, rope[..., list(match.q_rope)]


def spread_over_heads(q: Tensor, first_head: int, match: GqaMatch, kv_heads: int = 0) -> Tensor:
    """Q [..., h, Dk] of heads from `first_head` on -> [..., h, K * Dk], each at its KV head's channels."""
    K, group = kv_heads or match.kv_heads, match.num_heads // match.kv_heads
    wide = q.new_zeros(*q.shape[:-1], K, q.shape[-1])
    for j in range(q.shape[-2]):
        wide[..., j, (first_head + j) // group, :] = q[..., j, :]
    return wide.flatten(-2)


def past_of(match: Site, first: Tensor, second: Tensor) -> Parts:
    """Entries [B, S, *] as the original caches them: [B, heads, S, width]."""
    K = match.cache.heads or 1
    B, S = first.shape[:2]
    return (
        first.reshape(B, S, K, -1).permute(0, 2, 1, 3).contiguous(),
        second.reshape(B, S, K, -1).permute(0, 2, 1, 3).contiguous(),
    )


def empty_past(match: Site, B: int, S: int) -> Parts:
    """A past of zeros, as the original caches it."""
    row = match.cache
    return torch.zeros(B, row.heads or 1, S, row.first), torch.zeros(B, row.heads or 1, S, row.second)


def entries_of(parts: Parts) -> Parts:
    """What the original caches, [B, heads, S, width] -> [B, S, heads * width]."""
    a, b = (x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1) for x in parts)
    return a, b


def new_entries(match: Site, values: dict[str, Any]) -> Parts:
    """The entries [B, T, *] of the new tokens, by the original."""
    first, second = (values[name].double() for name in match.new)
    return entries_of((first, second))


def on_rank(entries: Tensor, row: CacheRow, tpa_rank: int, tpa: int) -> Tensor:
    """Whole entries [..., first + second] -> a rank's rows as its cache holds them."""
    if not row.heads:
        return entries
    local = row.heads // tpa
    rows = []
    for head in range(tpa_rank * local, (tpa_rank + 1) * local):
        k = entries[..., head * row.first : (head + 1) * row.first]
        start = row.widths[0] + head * row.second
        rows.append(torch.cat([k, entries[..., start : start + row.second]], dim=-1))
    return torch.stack(rows, dim=-2)


def side_by_side(rows: Tensor, row: CacheRow) -> Tensor:
    """A cache's rows [n, K, Dk + Dv] -> entries [n, K Dk + K Dv]; rows of a latent are entries."""
    if not row.heads:
        return rows
    return torch.cat([rows[..., : row.first].flatten(-2), rows[..., row.first :].flatten(-2)], -1)


def local_query(match: Site, given: list[Tensor]) -> Tensor:
    """What the decode op of a rank got as q -> [B, T, h, first + second] against the rank's entries."""
    if isinstance(match, AttentionMatch):
        return torch.cat(given[:2], dim=-1)
    q = given[0]
    group = match.num_heads // match.kv_heads
    kv_heads = q.shape[2] // group
    k = spread_over_heads(q, 0, match, kv_heads)
    return torch.cat([k, k.new_zeros(*k.shape[:3], kv_heads * match.v_head_dim)], dim=-1)


def weighted(match: Site, weights: Tensor, entries: Tensor, first_head: int = 0) -> Tensor:
    """Weights [T, h, S] of heads from `first_head` on over a rank's entries [S, *]: [T, h, R], or [T, h, Dv]."""
    if isinstance(match, AttentionMatch):
        return torch.einsum("ths,sr->thr", weights, entries[:, : match.kv_lora_rank])
    group, row = match.num_heads // match.kv_heads, match.cache
    kv_heads = entries.shape[1] // (row.first + row.second)
    v = entries[:, kv_heads * row.first :].reshape(len(entries), kv_heads, row.second)
    read = torch.tensor([(first_head + j) // group for j in range(weights.shape[1])])
    return torch.einsum("ths,shv->thv", weights, v[:, read])
