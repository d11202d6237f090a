"""Pure-torch definition of the ops of sparse attention: which keys a query sees, and attention to those alone. The spec.

    scores = index_scores(q, w, index keys)             this rank's slots, float32 or wider
    candidates = topk_candidates(scores)                its best, each (score, position)
    bound = kth_candidate(candidates of all ranks)      the worst key that is still chosen
    slots, count = select_slots(scores, bound)          this rank's chosen slots
    partial_o, lse = mla_decode_slots(q, cache, slots, count)

One total order, here and across ranks: score descending, then position ascending. A key that is chosen has fewer than k
before it anywhere, so fewer than k on its own rank: no rank can hold back a key that is needed.

    B sequences, T new tokens a sequence, J index heads, I their width, n slots of a shard, m candidates of a rank,
    P peers. NaN stands before every number, so it reaches the output; -0.0 is 0.0.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from helix_compile.kernels.reference import Attend, _attend, _each_sequence, _rows_of_sequence, accumulation_dtype
from helix_compile.kernels.reference_fp8 import entries_of_rows
from helix_compile.layout.ledger import position_of_slot

NOWHERE = torch.iinfo(torch.int32).max  # position of a candidate that is none: behind every other


def index_scores_reference(
    q: Tensor, w: Tensor, index_cache: Tensor, page_table: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Scores of this rank's slots: sum over index heads of w * relu(scale * q . key).

    Args:
        q: [B, T, J, I] rotated index queries.
        w: [B, T, J] weights of the heads.
        index_cache: [pages, page_size, I] index keys, one head; may be a part of wider rows.
        page_table: [B, pages of a sequence] int64.
        visible: [B, T] int32. A row sees slots < visible.
        scale: of the products, before relu.

    Returns:
        [B, T, n] in float32 or wider, n = pages of a sequence * page_size; -inf from `visible` on.
    """
    B, T = q.shape[:2]
    dtype = accumulation_dtype(q.dtype)
    scores = q.new_full((B, T, page_table.shape[1] * index_cache.shape[1]), -torch.inf, dtype=dtype)
    for b, longest in enumerate(visible.amax(dim=1).tolist() if T else [0] * B):
        if not longest:
            continue
        keys = _rows_of_sequence(index_cache, page_table[b], 0, longest).to(dtype)
        for t in range(T):
            by_head = (q[b, t].to(dtype) @ keys.T).mul_(scale).relu_()
            scores[b, t, :longest] = w[b, t].to(dtype) @ by_head
        hidden = torch.arange(longest, device=q.device) >= visible[b, :, None]
        scores[b, :, :longest].masked_fill_(hidden, -torch.inf)
    return scores


def _ordered(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [*, n], best first, and where they stood; of equal ones the earlier first. A NaN is before all."""
    return torch.sort(scores + 0.0, dim=-1, descending=True, stable=True)  # + 0.0: -0.0 is 0.0


def topk_candidates_reference(
    scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int
) -> Tensor:
    """This rank's best keys of each query, as (score, position).

    Args:
        scores: [B, T, n] of index_scores.
        visible: [B, T] int32.
        rank: 0-d int64, this rank's place on the kvp axis.
        top_k: keys that a query sees, over all ranks together.
        cp: ranks that share the sequence.
        tokens_per_block: round-robin unit.

    Returns:
        [B, T, m, 2], m = min(top_k, n), positions ascending: the bits of the score and the absolute position; int32 of
        float32 scores, int64 of float64. A NaN has the bits of torch.nan. Behind the visible keys the score is -inf and
        the position NOWHERE.
    """
    best, slot = (x[..., :top_k] for x in _ordered(scores))
    # one rank alone may hold all k: m is not k / cp
    alive = torch.arange(best.shape[-1], device=scores.device) < visible[..., None]
    position = torch.where(alive, position_of_slot(slot, rank, cp, tokens_per_block), NOWHERE)
    best = torch.where(best.isnan(), torch.nan, best).masked_fill(~alive, -torch.inf)
    position, by_position = torch.sort(position, dim=-1)  # only what is no candidate is at the same place
    bits = best.gather(-1, by_position).view(_bits(scores.dtype))
    return torch.stack([bits, position.to(bits.dtype)], dim=-1)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype.itemsize == 8 else torch.int32


def kth_candidate_reference(candidates_P: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The last key that is chosen, out of all ranks' candidates [P, B, T, m, 2], in any order.

    Returns:
        score [B, T], float32 (float64 of int64 candidates), and position [B, T] int64 of the k-th in the total order;
        -inf and NOWHERE where fewer than top_k are visible: then all are chosen.
    """
    score = candidates_P[..., 0].contiguous().view(_scores_of(candidates_P.dtype)).movedim(0, -2).flatten(-2)
    position = candidates_P[..., 1].long().movedim(0, -2).flatten(-2)
    position, by_position = torch.sort(position, dim=-1, stable=True)
    score, by_score = _ordered(score.gather(-1, by_position))
    position = position.gather(-1, by_score)
    if score.shape[-1] < top_k:
        return score.new_full(score.shape[:-1], -torch.inf), position.new_full(score.shape[:-1], NOWHERE)
    return score[..., top_k - 1].clone(), position[..., top_k - 1].clone()


def rows_for_owners_reference(candidates: Tensor, peers: int) -> Tensor:
    """Candidates [B, T, m, 2] by the rank that decides on their query: [P, ceil(B * T / P), m, 2], rows dealt in order.

    Behind the last query are rows without a candidate (-inf, NOWHERE).
    """
    rows = candidates.flatten(0, 1)
    each = -(-rows.shape[0] // peers)
    spare = rows.new_full((peers * each - rows.shape[0], *rows.shape[1:]), NOWHERE)
    # a number, not a tensor of the host: a copy to the device can't be recorded in a CUDA graph
    form = "<d" if candidates.dtype is torch.int64 else "<f"
    spare[..., 0] = int.from_bytes(struct.pack(form, -math.inf), "little", signed=True)
    return torch.cat([rows, spare]).unflatten(0, (peers, each))


def _scores_of(bits: torch.dtype) -> torch.dtype:
    return torch.float64 if bits is torch.int64 else torch.float32


def pack_kth_reference(score: Tensor, position: Tensor) -> Tensor:
    """The k-th keys that an owner found, score and position [n, 1], as one buffer [n, 2]."""
    bits = score.view(_bits(score.dtype))
    return torch.cat([bits, position.to(bits.dtype)], dim=1)


def unpack_kth_reference(buffer: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all owners [P * n, 2] as score and position [B, T], the sizes of `visible`."""
    rows = buffer[: visible.numel()]
    score = rows[:, 0].contiguous().view(_scores_of(buffer.dtype))
    return score.view(visible.shape), rows[:, 1].long().view(visible.shape)


def select_slots_reference(
    scores: Tensor,
    visible: Tensor,
    kth_score: Tensor,
    kth_position: Tensor,
    rank: Tensor,
    top_k: int,
    cp: int,
    tokens_per_block: int,
) -> tuple[Tensor, Tensor]:
    """This rank's slots that are not behind the k-th key, ascending.

    Args:
        scores: [B, T, n] of index_scores.
        visible: [B, T] int32.
        kth_score: [B, T], see kth_candidate.
        kth_position: [B, T] int64.
        rank: 0-d int64.
        top_k: keys that a query sees, over all ranks together.
        cp: ranks that share the sequence.
        tokens_per_block: round-robin unit.

    Returns:
        slots [B, T, m] int32, m = min(top_k, n), of which the first count [B, T] int32 count; 0 behind them.
    """
    n = scores.shape[-1]
    slot = torch.arange(n, device=scores.device)
    position = position_of_slot(slot, rank, cp, tokens_per_block)
    score, bound = scores + 0.0, kth_score[..., None]
    # not >: a NaN is before every number
    before = (score > bound) | (score.isnan() & ~bound.isnan())
    tied = (score == bound) | (score.isnan() & bound.isnan())
    chosen = (before | (tied & (position <= kth_position[..., None]))) & (slot < visible[..., None])
    count = chosen.sum(dim=-1).to(torch.int32)
    m = min(top_k, n)
    slots = torch.sort(torch.where(chosen, slot, n), dim=-1).values[..., :m]
    return torch.where(slots < n, slots, 0).to(torch.int32), count


def mla_decode_slots_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    slots: Tensor,
    count: Tensor,
    scale: float,
    *,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mla_decode over chosen slots alone.

    Args:
        q_latent: [B, T, H, R] absorbed queries.
        q_rope: [B, T, H, r].
        cache: [pages, page_size, R + r]; may be a part of wider rows.
        page_table: [B, pages of a sequence] int64.
        visible: [B, T] int32, as cache_append returned it: what is chosen was written before. Every chosen slot is below it.
        slots: [B, T, m] int32, local; see select_slots.
        count: [B, T] int32: how many of them count. The others are not read.
        scale: of the scores.
        cache_scale: of a cache in fp8_e4m3.
        batch: as in mla_decode.

    Returns:
        partial_o [B, T, H, R] in the dtype of q_latent and lse [B, T, H]; 0 and -inf where count is 0.
    """
    dtype, R, r = accumulation_dtype(q_latent.dtype), q_latent.shape[3], q_rope.shape[3]
    q = torch.cat([q_latent, q_rope], dim=-1)
    outputs = []
    for t in range(q.shape[1]):  # each query has rows of its own

        def attend_to(b: int, start: int, length: int, t: int = t) -> Attend:
            chosen = slots[b, t, start:length].long()
            page = page_table[b, chosen // cache.shape[1]]
            rows = entries_of_rows(cache[page, chosen % cache.shape[1]], R, r, dtype, cache_scale)
            return lambda q_THW, hidden_TS: _attend(q_THW, rows, hidden_TS, scale, R)

        outputs.append(_each_sequence(q[:, t : t + 1], R, count[:, t : t + 1], None, attend_to))
    if not outputs:
        return _each_sequence(q, R, count, None, lambda *_: lambda q_THW, hidden_TS: (q_THW, q_THW[..., 0]))
    o, lse = zip(*outputs, strict=True)
    return torch.cat(o, dim=1), torch.cat(lse, dim=1)
