"""Pure-torch definition of helix::gqa_decode. This is the spec; kernels must agree with it.

    B sequences, T new tokens a sequence, H query heads, K KV heads (both of this rank), G = H / K, S slots,
    Dk, Dv widths of a key and of a value. Query head j reads KV head j // G.

lse is natural log, float32 or wider. lse = -inf means "no key seen", and then the partial output is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.kernels.reference import SCORE_BYTES, accumulation_dtype


def gqa_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of q [B, T, H, Dk] over this rank's shard of the cache.

    Args:
        q: rotated queries.
        k_cache: [pages, page_size, K, Dk].
        v_cache: [pages, page_size, K, Dv].
        page_table: [B, pages of a sequence] int64.
        visible: [B, T] int32. A row sees slots < visible: local slots ascend in position, so that is the causal mask.
        scale: of the scores.

    Returns:
        partial_o [B, T, H, Dv] in the dtype of q and lse [B, T, H].
    """
    B, T, H, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    partial_o = q.new_zeros((B, T, H, v_cache.shape[3]))
    lse = q.new_full((B, T, H), -torch.inf, dtype=dtype)
    longest = visible.amax(dim=1).tolist() if T else [0] * B
    for b in range(B):
        if longest[b] == 0:
            continue  # an empty shard: o = 0 and lse = -inf stand
        k_KSD, v_KSD = (
            _heads_of_sequence(cache, page_table[b], longest[b]).to(dtype)
            for cache in (k_cache, v_cache)
        )
        step = max(1, SCORE_BYTES // (H * longest[b] * dtype.itemsize))
        for t in range(0, T, step):
            part = slice(t, t + step)
            o, row_lse = _attend(q[b, part].to(dtype), k_KSD, v_KSD, visible[b, part], scale)
            partial_o[b, part] = o.to(partial_o.dtype)
            lse[b, part] = row_lse
    return partial_o, lse


def _heads_of_sequence(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` slots of a sequence, heads first: [K, length, D]."""
    used = pages[: -(-length // cache.shape[1])]
    return cache[used].flatten(0, 1)[:length].movedim(1, 0)


def _attend(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, visible_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (T, H, Dk), (K, S, Dv) = q_THD.shape, v_KSD.shape
    q_KRD = q_THD.view(T, K, H // K, Dk).movedim(1, 0).reshape(K, -1, Dk)  # rows: T * G
    scores = (q_KRD @ k_KSD.mT).mul_(scale).view(K, T, H // K, S)
    hidden = torch.arange(S, device=k_KSD.device) >= visible_T[:, None]
    scores.masked_fill_(hidden[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    alive = lse != -torch.inf  # not >: a NaN must reach the output
    weights = scores.sub_(torch.where(alive, lse, 0.0)[..., None]).exp_()
    o = (weights.view(K, -1, S) @ v_KSD).view(K, T, H // K, Dv)
    return o.movedim(0, 1).reshape(T, H, Dv), lse.movedim(0, 1).reshape(T, H)
