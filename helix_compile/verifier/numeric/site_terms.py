"""Every kind of site in the terms of the layer checks: a query and cached entries whose product is the scores.

An entry is [first | second]: latent and rope part (MLA), or K and V of all KV heads side by side (grouped-query). A query
has the widths of an entry: of grouped-query attention it is 0 but at its KV head's channels of K. Scores are then
scale * query . entry for every kind. Where an indexer chooses, its key [I] lies behind; attention does not read it. This
file shares no code with the runtime, which it is there to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import all_rows
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.matches import AttentionMatch, Grouped, Latent, permuted
from helix_compile.verifier.contract import head_places

Parts = tuple[Tensor, Tensor]
Past = tuple[Tensor, ...]  # both parts, and the index key where there is one


@dataclass(frozen=True)
class LatentTerms:
    """MLA: an entry is [latent | rope part]."""

    match: AttentionMatch
    kind: Latent

    def query_parts(self, values: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Parts:
        """The original's own query [B, T, H, *], in the widths of both parts of an entry."""
        match, kind = self.match, self.kind
        q = permuted(values[match.q].double(), match.q_form, "BTHC")
        rope = permuted(values[kind.q_rope_value or match.q].double(), kind.q_rope_form, "BTHC")
        w_uk = kind.w_uk.of(tensors[prefix + kind.w_uk.param].double())
        absorbed = torch.einsum("bthd,hdr->bthr", q[..., list(kind.q_nope)], w_uk)
        return absorbed, rope[..., list(kind.q_rope)]

    def local_query(self, decode: fx.Node, values: dict[str, Any]) -> Tensor:
        """The q that a rank's decode op got, of all rows -> [B, T, h, first + second] against the rank's entries."""
        return torch.cat([values[all_rows(n).name].double() for n in decode.args[:2]], dim=-1)

    def weighted(self, weights: Tensor, entries: Tensor, first_head: int = 0) -> Tensor:
        """Weights [T, h, S] of heads from `first_head` on over a rank's entries [S, *]: [T, h, R], or [T, h, Dv]."""
        return torch.einsum("ths,sr->thr", weights, entries[:, : self.kind.kv_lora_rank])

    def roped(self) -> slice:
        """Channels of an entry that are turned by its position; of an index key some are."""
        return slice(self.kind.kv_lora_rank, None)


@dataclass(frozen=True)
class GroupedTerms:
    """Grouped-query attention: an entry is [K of all KV heads | V of all]. As LatentTerms.

    `group` query heads read one KV head; on ranks zero heads may be among them.
    """

    match: AttentionMatch
    kind: Grouped
    group: int

    def query_parts(self, values: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Parts:
        """Q at its KV head's channels of K; V has no part in the scores."""
        q = values[self.match.q].double().transpose(1, 2)
        first = self._spread_over_heads(q, self.kind.kv_heads)
        return first, q.new_zeros(*q.shape[:3], self.kind.kv_heads * self.kind.v_width)

    def local_query(self, decode: fx.Node, values: dict[str, Any]) -> Tensor:
        """As query_parts, against the KV heads that the rank caches."""
        q = values[all_rows(decode.args[0]).name].double()
        kv_heads = max(1, q.shape[2] // self.group)
        k = self._spread_over_heads(q, kv_heads)
        return torch.cat([k, k.new_zeros(*k.shape[:3], kv_heads * self.kind.v_width)], dim=-1)

    def weighted(self, weights: Tensor, entries: Tensor, first_head: int = 0) -> Tensor:
        """Each head's own V."""
        K_width, V_width = self.kind.k_width, self.kind.v_width
        kv_heads = entries.shape[1] // (K_width + V_width)
        v = entries[:, kv_heads * K_width :].reshape(len(entries), kv_heads, V_width)
        read = torch.tensor([(first_head + j) // self.group for j in range(weights.shape[1])])
        return torch.einsum("ths,shv->thv", weights, v[:, read])

    def roped(self) -> slice:
        """K."""
        return slice(0, self.kind.kv_heads * self.kind.k_width)

    def _spread_over_heads(self, q: Tensor, kv_heads: int) -> Tensor:
        """Q [..., h, Dk] -> [..., h, K * Dk], each at its KV head's channels."""
        wide = q.new_zeros(*q.shape[:-1], kv_heads, q.shape[-1])
        for j in range(q.shape[-2]):
            wide[..., j, j // self.group, :] = q[..., j, :]
        return wide.flatten(-2)


Terms = LatentTerms | GroupedTerms


def terms_of(match: AttentionMatch, layout: HelixLayout | None = None) -> Terms:
    """A site in these terms: the original's own, or with a layout what its ranks compute, zero heads included."""
    kind = match.kind
    if isinstance(kind, Latent):
        return LatentTerms(match, kind)
    assert isinstance(kind, Grouped)
    heads, groups = match.num_heads, kind.kv_heads
    if layout is not None:
        heads = len(head_places(heads, groups, layout))
        groups = -(-groups // layout.tpa) * layout.tpa
    return GroupedTerms(match, kind, heads // groups)


def seen_by(match: AttentionMatch, queries: Tensor, keys: Tensor) -> Tensor:
    """[T, S]: which keys at these positions a query at each of those sees."""
    back = queries[:, None] - keys[None]
    seen = back >= 0
    if match.window:
        seen = seen & (back < match.window)
    if match.chunk:
        seen = seen & (queries[:, None] // match.chunk == keys[None] // match.chunk)
    return seen


def past_of(match: AttentionMatch, *parts: Tensor) -> Past:
    """Entries [B, S, *] as the original caches them: [B, heads, S, width]; index keys as they are."""
    K = match.cache.heads or 1
    B, S = parts[0].shape[:2]
    split = tuple(part.reshape(B, S, K, -1).permute(0, 2, 1, 3).contiguous() for part in parts[:2])
    return (*split, *(part.contiguous() for part in parts[2:]))


def empty_past(match: AttentionMatch, B: int, S: int) -> Past:
    """A past of zeros, as the original caches it."""
    row = match.cache
    index = (torch.zeros(B, S, row.index),) if row.index else ()
    return (torch.zeros(B, row.heads or 1, S, row.first), torch.zeros(B, row.heads or 1, S, row.second), *index)


def entries_of(parts: Past) -> Past:
    """What the original caches, [B, heads, S, width] -> [B, S, heads * width]; index keys as they are."""
    flat = (x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1) for x in parts[:2])
    return (*flat, *parts[2:])


def given_length(match: AttentionMatch, S: int, T: int) -> int:
    """Tokens that are cached when a layer is run on T new ones behind S: an earlier layer has cached the new ones too."""
    return S + T if match.shared else S


def given_as(match: AttentionMatch, entries: Tensor) -> dict[str, Tensor]:
    """Entries [B, T, first + second] in the form of the nodes that make both parts: name -> value. The inverse of new_entries."""
    first, second = entries.split([match.cache.widths[0], entries.shape[-1] - match.cache.widths[0]], dim=-1)
    own = second[..., : match.cache.second * (match.cache.heads or 1)]
    return dict(zip(match.new[:2], past_of(match, first, own), strict=bool(match.new)))


def new_entries(match: AttentionMatch, values: dict[str, Any]) -> Past:
    """The entries [B, T, *] of the new tokens, by the original."""
    T = values[match.o_proj].shape[1]
    parts = [values[name][:, :, -T:] for name in match.shared] or [values[name] for name in match.new]
    return entries_of(tuple(part.double() for part in parts))


def on_rank(entries: Tensor, row: CacheRow, part: int, parts: int, of_zero_heads: float = 0.0) -> Tensor:
    """Whole entries [..., first + second] -> a rank's rows as its cache holds them: one of so many parts of the KV heads."""
    if not row.heads:
        return entries
    local = -(-row.heads // parts)
    rows = []
    for head in range(part * local, (part + 1) * local):
        if head >= row.heads:  # a zero head
            rows.append(entries.new_full((*entries.shape[:-1], row.first + row.second), of_zero_heads))
            continue
        k = entries[..., head * row.first : (head + 1) * row.first]
        start = row.widths[0] + head * row.second
        rows.append(torch.cat([k, entries[..., start : start + row.second]], dim=-1))
    return torch.stack(rows, dim=-2)


def side_by_side(rows: Tensor, row: CacheRow) -> Tensor:
    """A cache's rows [n, K, Dk + Dv] -> entries [n, K Dk + K Dv]; rows of a latent are entries."""
    if not row.heads:
        return rows
    return torch.cat([rows[..., : row.first].flatten(-2), rows[..., row.first :].flatten(-2)], -1)
