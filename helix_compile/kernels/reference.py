"""Pure-torch definition of every helix:: compute op, on one page. This is the spec; kernels must agree with it.

    B sequences, T new tokens a sequence, H query heads, R kv_lora_rank, r rope width, V v_head_dim,
    P peers of an exchange, D model width, E experts, F FFN width, N tokens, S slots. h, e, f: this rank's share.
    Grouped-query attention: K KV heads, G = H / K; Dk, Dv widths of a key and of a value. Query head j reads KV head j // G.

lse is natural log, float32 or wider. lse = -inf means "no key seen", and then the partial output is 0. A dead
part may hold anything, NaN included: it is never multiplied by 0, it is not read.

A cache may be in FP8 (reference_fp8.py): then its dtype says the format, and of fp8_e4m3 `cache_scale`, a float32 scalar,
the scale. Attention is that to what the rows stand for.

torch.topk leaves ties open; in the router (biased grouped top-k as in DeepSeek-V3) the lower index wins, among groups and
among experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helix_compile.kernels.reference_fp8 import cached_rows, entries_of_rows
from helix_compile.layout.ledger import local_length, local_slot, owner_rank

SCORE_BYTES = 64 * 2**20  # scores [T, H, S] are built in chunks of T below this, so long steps stay small


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in: float32, or wider where the model is wider."""
    return torch.promote_types(dtype, torch.float32)


def shard_index_reference(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> tuple[Tensor, Tensor]:
    """Where this rank writes each new token and how much of its shard each query sees.

    Args:
        positions: [B, T] int64, absolute; -1 = padding.
        rank: 0-d int64, this rank's place on the kvp axis.
        cp: ranks that share the sequence.
        tokens_per_block: round-robin unit.

    Returns:
        slots [B, T] int64 (-1: not mine, or padding) and visible [B, T] int32 (local slots that the query at
        this position may see; 0 for padding).
    """
    mine = (owner_rank(positions, cp, tokens_per_block) == rank) & (positions >= 0)
    slots = torch.where(mine, local_slot(positions, cp, tokens_per_block), -1)
    visible = local_length(positions + 1, rank, cp, tokens_per_block).to(torch.int32)
    return slots, visible


def embed_rows_reference(ids: Tensor, rows: Tensor, first: Tensor) -> Tensor:
    """This rank's summand of the token embeddings: of a token whose row it holds that row, of any other zeros.

    Args:
        ids: [B, T] int64.
        rows: [v, D], rows of the table from `first` on.
        first: 0-d int64.

    Returns:
        [B, T, D]; over all ranks one summand of each token is not zero.
    """
    local = ids - first
    mine = (local >= 0) & (local < rows.shape[0])
    return torch.where(mine[..., None], rows[local.clamp(0, rows.shape[0] - 1)], 0)


def best_word_reference(logits: Tensor, first: Tensor, words: int) -> Tensor:
    """The largest logit of this rank's words and which word it is, the lowest of those that share it (as torch.argmax).

    Args:
        logits: [B, T, v], of the words from `first` on; behind the last word lie rows of zeros.
        first: 0-d int64.
        words: size of the vocabulary.

    Returns:
        [B, T, 1, 2] float64, which holds logits of any dtype and word ids exactly.
    """
    ids = first + torch.arange(logits.shape[-1], device=logits.device)
    real = logits.masked_fill(ids >= words, -torch.inf)
    place = real.argmax(dim=-1, keepdim=True)
    best = torch.stack([real.gather(-1, place).double(), (place + first).double()], dim=-1)
    return best


def top_words_reference(logits: Tensor, first: Tensor, words: int, count: int) -> Tensor:
    """The largest `count` logits of this rank's words (all, where it has fewer) and which they are, in any order.

    Args and result as of best_word_reference(), the result [B, T, count, 2]. Which of equal ones are among them is open.
    """
    ids = first + torch.arange(logits.shape[-1], device=logits.device)
    real = logits.masked_fill(ids >= words, -torch.inf)
    values, places = real.topk(min(count, logits.shape[-1]), dim=-1)
    return torch.stack([values.double(), (places + first).double()], dim=-1)


def best_of_words_reference(candidates: Tensor) -> Tensor:
    """The first of the largest: candidates [B, T, N, 2] in the order of the ranks, so of their words -> [B, T, 2]."""
    place = candidates[..., 0].argmax(dim=-1)
    return candidates.gather(2, place[..., None, None].expand(*place.shape, 1, 2)).squeeze(2)


def heads_of_rank_reference(x: Tensor, rank: Tensor, peers: int) -> Tensor:
    """Of heads that all peers have those that one of them attends with alone, or that its query heads read: [B, T, h, *].

    Args:
        x: [B, T, H, *]. One of H and `peers` divides the other.
        rank: 0-d int64, its place among the peers.
        peers: how many there are.

    Returns:
        H / peers heads in a row; one, which several peers have, where there are fewer heads than peers.
    """
    H = x.shape[2]
    first = rank * H // peers
    return x.index_select(2, first + torch.arange(max(1, H // peers), device=x.device))


def first_visible_reference(
    positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int, window: int, chunk: int
) -> Tensor:
    """The first slot of this rank's shard that each query sees, where attention forgets: [B, T] int32.

    Args:
        positions: [B, T] int64, absolute; -1 = padding.
        rank: 0-d int64, this rank's place on the kvp axis.
        cp: ranks that share the sequence.
        tokens_per_block: round-robin unit.
        window: a query at p sees keys in (p - window, p]; 0: no window.
        chunk: a query at p sees keys in [p // chunk * chunk, p]; 0: no chunks. One of both is not 0.
    """
    oldest = positions + 1 - window if window else positions // chunk * chunk
    first: Tensor = local_length(oldest.clamp(min=0), rank, cp, tokens_per_block)
    return first.to(torch.int32)


def cache_append_reference(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    visible: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    *,
    cache_scale: Tensor | None = None,
    index_key: Tensor | None = None,
) -> Tensor:
    """Write latent [B, T, R] and k_rope [B, T, r] at this rank's slots; return a copy of `visible`.

    The copy is what mla_decode consumes: "write before read" is a data edge that nothing can reorder.
    cache is [pages, page_size, R + r], page_table [B, pages of a sequence] int64. Of grouped-query attention latent is
    K [B, T, K, Dk], k_rope is V [B, T, K, Dv], and cache [pages, page_size, K, Dk + Dv]. `index_key` [B, T, I] lies behind
    FP8 values, in its own dtype; elsewhere it is a part of k_rope.
    """
    page_size = cache.shape[1]
    row, column = torch.nonzero(slots >= 0, as_tuple=True)
    slot = slots[row, column]
    page = page_table[row, slot // page_size]
    key = None if index_key is None else index_key[row, column]
    cache[page, slot % page_size] = cached_rows(latent[row, column], k_rope[row, column], cache, cache_scale, key)
    return visible.clone()


def mla_decode_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of q_latent [B, T, H, R] and q_rope [B, T, H, r] over this rank's shard.

    One KV head of width R + r; the values are its first R channels. A row sees slots < visible: local slots
    ascend in position, so that is exactly the causal mask; and none below `first` [B, T] int32, where that is given.
    Where these are a part of the sequences of a step, `batch` [all, *] has as many rows as there are in all, and nothing else of it
    is read: what a kernel chooses by their number, and bits may hang on, it chooses for all.
    Returns partial_o [B, T, H, R] in the dtype of q_latent and lse [B, T, H].
    """
    dtype, R, r = accumulation_dtype(q_latent.dtype), q_latent.shape[3], q_rope.shape[3]

    def attend_to(b: int, start: int, length: int) -> Attend:
        rows = _rows_of_sequence(cache, page_table[b], start, length)
        kv_SW = entries_of_rows(rows, R, r, dtype, cache_scale)
        return lambda q_THW, hidden_TS: _attend(q_THW, kv_SW, hidden_TS, scale, R)

    return _each_sequence(torch.cat([q_latent, q_rope], dim=-1), R, visible, first, attend_to)


# (q [T, H, *], hidden [T, S]) -> o [T, H, *], lse [T, H]
Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _each_sequence(
    q: Tensor, width: int, visible: Tensor, first: Tensor | None, attend_to: Callable[[int, int, int], Attend]
) -> tuple[Tensor, Tensor]:
    """partial_o [B, T, H, width] and lse [B, T, H]; attend_to(b, start, length) is attention to slots [start, length) of b.

    Slots that no query of a sequence sees are not read at all.
    """
    B, T, H, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    partial_o = q.new_zeros((B, T, H, width))
    lse = q.new_full((B, T, H), -torch.inf, dtype=dtype)
    oldest = torch.zeros_like(visible) if first is None else first
    lengths = visible.amax(dim=1).tolist() if T else [0] * B
    starts = torch.where(visible > oldest, oldest, visible.max()).amin(dim=1).tolist() if B * T else [0] * B
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start >= length:
            continue  # an empty shard: o = 0 and lse = -inf stand
        attend = attend_to(b, start, length)
        step = max(1, SCORE_BYTES // (H * (length - start) * dtype.itemsize))
        slots = torch.arange(start, length, device=q.device)
        for t in range(0, T, step):
            part = slice(t, t + step)
            hidden = (slots >= visible[b, part, None]) | (slots < oldest[b, part, None])
            o, lse[b, part] = attend(q[b, part].to(dtype), hidden)
            partial_o[b, part] = o.to(partial_o.dtype)
    return partial_o, lse


def _rows_of_sequence(cache: Tensor, pages: Tensor, start: int, length: int) -> Tensor:
    """Slots [start, length) of a sequence [length - start, *]; a view where its pages lie in a row."""
    page_size = cache.shape[1]
    skipped = start // page_size
    used = pages[skipped : -(-length // page_size)]
    first, wanted = int(used[0]), slice(start - skipped * page_size, length - skipped * page_size)
    if torch.equal(used, torch.arange(first, first + len(used), device=used.device)):
        return cache[first : first + len(used)].reshape(-1, cache.shape[2])[wanted]
    return cache[used].reshape(-1, cache.shape[2])[wanted]


def _attend(q_THW: Tensor, kv_SW: Tensor, hidden_TS: Tensor, scale: float, R: int) -> tuple[Tensor, Tensor]:
    T, H, W = q_THW.shape
    scores = (q_THW.reshape(T * H, W) @ kv_SW.T).mul_(scale).view(T, H, -1)
    weights, lse = _softmax(scores, hidden_TS)
    o = (weights.view(T * H, -1) @ kv_SW[:, :R]).view(T, H, R)
    return o, lse


def _softmax(scores: Tensor, hidden_TS: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse of scores [.., T, *, S], which are overwritten."""
    scores.masked_fill_(hidden_TS[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    alive = lse != -torch.inf  # not >: a NaN must reach the output
    return scores.sub_(torch.where(alive, lse, 0.0)[..., None]).exp_(), lse


def merge_lse_reference(partial_o_P: Tensor, lse_P: Tensor) -> Tensor:
    """Softmax-weighted sum over peers: partial_o_P [P, B, T, h, *], lse_P [P, B, T, h] -> [B, T, h, *].

    A peer with lse = -inf is not read; a row that no peer has seen is 0 (helix-algorithm, section 7).
    """
    dtype = lse_P.dtype
    alive = lse_P != -torch.inf  # not >: a NaN is a fault that must reach the output, not a dead part
    top = torch.where(alive, lse_P, torch.finfo(dtype).min).amax(dim=0)
    weights = torch.where(alive, torch.exp(lse_P - top), 0.0)
    total = weights.sum(dim=0)
    parts = torch.where(alive[..., None], partial_o_P.to(dtype), 0.0)
    merged = (parts * weights[..., None]).sum(dim=0)
    return (merged / torch.where(total > 0, total, 1.0)[..., None]).to(partial_o_P.dtype)


def total_lse_reference(lse_P: Tensor) -> Tensor:
    """Lse of all keys [B, T, h] of what each peer has of its own, lse_P [P, B, T, h]; -inf where no peer has seen any."""
    return torch.logsumexp(lse_P, dim=0)


def apply_sinks_reference(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax has one more logit a head, `sinks` [h], that stands for no value.

    o [B, T, h, *] is attention without it (or one part of a sum that is), lse [B, T, h] that of all keys: what is left
    of the weights is sigmoid(lse - sinks) of them. The sinks are not scaled as scores are.
    """
    left = torch.sigmoid(lse - sinks.to(lse.dtype))
    return (o.to(lse.dtype) * left[..., None]).to(o.dtype)


def rescale_by_lse_reference(partial_o: Tensor, lse: Tensor, lse_P: Tensor) -> Tensor:
    """This rank's partial_o [B, T, H, *] times its merge weight, so that a plain sum over peers is the merge."""
    dtype = lse.dtype
    total = torch.logsumexp(lse_P, dim=0)
    alive = lse != -torch.inf
    weight = torch.where(alive, torch.exp(lse - total), 0.0)
    scaled = torch.where(alive[..., None], partial_o.to(dtype), 0.0) * weight[..., None]
    return scaled.to(partial_o.dtype)


def moe_experts_reference(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first_expert: Tensor
) -> Tensor:
    """Sum over the chosen experts that this rank holds: x [N, D] -> [N, D], a partial sum over ep and tpf.

    Args:
        x: [N, D] tokens, the same on every rank.
        expert_ids: [N, k] int64, global expert numbers.
        weights: [N, k] routing weights.
        gate_up: [e, 2, f, D] local view, gate half first.
        down: [e, D, f] local view.
        first_expert: 0-d int64, global number of this rank's first expert.

    Only rows of local experts are computed. Sums are kept in float32 or wider and rounded once, to x's dtype.
    """
    dtype = accumulation_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    local_ids = expert_ids - first_expert
    for expert in range(gate_up.shape[0]):
        token, choice = torch.nonzero(local_ids == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        rows = x[token]
        gate, up = rows @ gate_up[expert, 0].T, rows @ gate_up[expert, 1].T
        y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out.index_add_(0, token, y.to(dtype) * weights[token, choice, None].to(dtype))
    return out.to(x.dtype)


def gqa_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of q [B, T, H, Dk] over this rank's shard of the cache.

    Args:
        q: rotated queries.
        k_cache: [pages, page_size, K, Dk].
        v_cache: [pages, page_size, K, Dv].
        page_table: [B, pages of a sequence] int64.
        visible: [B, T] int32. A row sees slots < visible: local slots ascend in position, so that is the causal mask.
        scale: of the scores.
        first: [B, T] int32. A row sees no slot below it; None: all from the first on.
        cache_scale: of a cache in FP8.
        batch: as in mla_decode.

    Returns:
        partial_o [B, T, H, Dv] in the dtype of q and lse [B, T, H].
    """
    dtype = accumulation_dtype(q.dtype)

    def attend_to(b: int, start: int, length: int) -> Attend:
        k_KSD, v_KSD = (
            entries_of_rows(_heads_of_sequence(cache, page_table[b], start, length), 0, 0, dtype, cache_scale)
            for cache in (k_cache, v_cache)
        )
        return lambda q_THD, hidden_TS: _attend_grouped(q_THD, k_KSD, v_KSD, hidden_TS, scale)

    return _each_sequence(q, v_cache.shape[3], visible, first, attend_to)


def _heads_of_sequence(cache: Tensor, pages: Tensor, start: int, length: int) -> Tensor:
    """Slots [start, length) of a sequence, heads first: [K, length - start, D]."""
    page_size = cache.shape[1]
    skipped = start // page_size
    used = pages[skipped : -(-length // page_size)]
    return cache[used].flatten(0, 1)[start - skipped * page_size : length - skipped * page_size].movedim(1, 0)


def _attend_grouped(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, hidden_TS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (T, H, Dk), (K, S, Dv) = q_THD.shape, v_KSD.shape
    q_KRD = q_THD.view(T, K, H // K, Dk).movedim(1, 0).reshape(K, -1, Dk)  # rows: T * G
    scores = (q_KRD @ k_KSD.mT).mul_(scale).view(K, T, H // K, S)
    weights, lse = _softmax(scores, hidden_TS)
    o = (weights.view(K, -1, S) @ v_KSD).view(K, T, H // K, Dv)
    return o.movedim(0, 1).reshape(T, H, Dv), lse.movedim(0, 1).reshape(T, H)


def moe_router_reference(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose top_k of E experts for each token.

    Args:
        logits: [N, E] float32.
        bias: [E], added to the scores for the choice alone.
        n_group: groups of E // n_group neighbours; a group scores the sum of its two best.
        topk_group: groups that experts may come from.
        top_k: experts a token.
        normalize: divide a token's weights by their sum (plus 1e-20).
        scale: factor of the weights.

    Returns:
        expert_ids [N, top_k] int64, best first by biased score, and weights [N, top_k]. A NaN ranks above all.
    """
    scores = logits.sigmoid()
    choice = scores + bias
    size = choice.shape[1] // n_group
    two_best = choice.unflatten(1, (n_group, size)).topk(min(2, size), dim=-1).values
    kept_groups = _best(two_best.sum(dim=-1), topk_group)
    kept = torch.zeros((choice.shape[0], n_group), dtype=torch.bool, device=choice.device)
    kept.scatter_(1, kept_groups, True)
    choice = choice.masked_fill(~kept.repeat_interleave(size, dim=1), -torch.inf)
    expert_ids = _best(choice, top_k)
    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids, weights * scale


def _best(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
