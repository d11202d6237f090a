"""Faults inside ops: statistics, visibility, empty shards, owner arithmetic, cache writes, experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from helix_compile.verifier.mutants.mutant import EXPERT, MIXED, kernel_mutant

Pair = tuple[Tensor, Tensor]


def _reference(base: str, *args: Any) -> Any:
    return getattr(torch.ops.helix, base)(*args)


# merge by log-sum-exp


@kernel_mutant("plain mean of the parts", 6, "merge_lse")
def plain_mean(o: Tensor, lse: Tensor) -> Tensor:
    return o.mean(dim=0)


@kernel_mutant("base-2 weights from natural-log statistics", 6, "merge_lse")
def base_two(o: Tensor, lse: Tensor) -> Tensor:
    return _reference("merge_lse", o, lse * math.log(2))


@kernel_mutant("statistics of two ranks swapped", 6, "merge_lse")
def swapped_statistics(o: Tensor, lse: Tensor) -> Tensor:
    return _reference("merge_lse", o, torch.cat([lse[1:2], lse[:1], lse[2:]]))


@kernel_mutant("only the rank with the largest statistic counts", 6, "merge_lse")
def winner_only(o: Tensor, lse: Tensor) -> Tensor:
    best = lse.argmax(dim=0)[None, ..., None].expand(1, *o.shape[1:])
    return o.gather(0, best)[0]


@kernel_mutant("the merged sum is not divided", 6, "merge_lse")
def not_divided(o: Tensor, lse: Tensor) -> Tensor:
    weights = torch.exp(lse - lse.amax(dim=0)).nan_to_num(0)
    return (o * weights[..., None]).sum(dim=0).to(o.dtype)


@kernel_mutant("the last rank is left out of the merge", 6, "merge_lse")
def drops_a_rank(o: Tensor, lse: Tensor) -> Tensor:
    return _reference("merge_lse", o[:-1], lse[:-1])


@kernel_mutant("lse is the row's maximum, without the sum", 6, "mla_decode")
def maximum_only(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    count = visible[..., None].clamp(min=1).to(lse.dtype)
    return o, lse - torch.log(count) / 2


@kernel_mutant("lse in base 2", 6, "mla_decode")
def lse_base_two(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    return o, lse / math.log(2)


@kernel_mutant("weights are token counts", 6, "mla_decode")
def token_counts(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    return o, torch.log(visible[..., None].to(lse.dtype)).expand_as(lse).contiguous()


# the faults that tests/verifier/mutants/test_kernel_mutants.py puts into the kernels' source, by their effect on the op


@kernel_mutant("the mask of mla_decode is off by one slot", 7, "mla_decode")
def mask_off_by_one(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference("mla_decode", q, qr, cache, table, visible + (visible > 0), scale)


@kernel_mutant("exp in the place of exp2", 6, "mla_decode")
def exp_for_exp2(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    """Scores are in base 2 by then, so weights come out sharper than the statistics say."""
    lse = _reference("mla_decode", q, qr, cache, table, visible, scale)[1]
    return _reference("mla_decode", q, qr, cache, table, visible, scale / math.log(2))[0], lse


@kernel_mutant("the running maximum is stale, earlier slots are shrunk twice", 6, "mla_decode")
def stale_maximum(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    o_first, lse_first = _reference("mla_decode", q, qr, cache, table, visible // 2, scale)
    share = torch.where(lse_first == -torch.inf, 0.0, torch.exp(lse_first - lse))[..., None]
    total = share * share + 1 - share
    return ((o - o_first * share + o_first * share * share) / total).to(o.dtype), lse + torch.log(total[..., 0])


@kernel_mutant("the second half of a shard's slots is left out", 5, "mla_decode")
def split_dropped(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference("mla_decode", q, qr, cache, table, (visible + 1) // 2, scale)


@kernel_mutant("the rope part of the scores is not scaled", 8, "mla_decode")
def rope_unscaled(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference("mla_decode", q, qr / scale, cache, table, visible, scale)


# empty and short shards


@kernel_mutant("an empty shard says lse = 0", 5, "mla_decode")
def empty_is_zero(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    return o, torch.where(lse == -torch.inf, 0.0, lse)


@kernel_mutant("an empty shard says lse = +inf", 5, "mla_decode")
def empty_is_infinite(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference("mla_decode", q, qr, cache, table, visible, scale)
    return o, torch.where(lse == -torch.inf, torch.inf, lse)


@kernel_mutant("an empty shard attends to its stale first slot", 5, "mla_decode")
def empty_reads_one(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference("mla_decode", q, qr, cache, table, visible.clamp(min=1), scale)


@kernel_mutant("dead parts are multiplied by 0 and hold NaN", 5, "merge_lse")
def multiplies_dead_parts(o: Tensor, lse: Tensor) -> Tensor:
    o = torch.where((lse == -torch.inf)[..., None], torch.nan, o)
    weights = torch.softmax(lse, dim=0)[..., None]
    return (o * weights).sum(dim=0).to(o.dtype)


# which tokens a query sees, and who owns them


def _index(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    return _reference("shard_index", positions, rank, cp, tokens_per_block)


@kernel_mutant("the new token is missing everywhere", 7, "shard_index", kind="positions")
def misses_itself(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, _ = _index(positions, rank, cp, tokens_per_block)
    earlier = _index((positions - 1).clamp(min=-1), rank, cp, tokens_per_block)[1]
    return slots, torch.where(positions >= 0, earlier, 0)


@kernel_mutant("the new token is written and seen on every rank", 7, "shard_index", kind="positions")
def on_every_rank(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions, rank, cp, tokens_per_block)
    return torch.where((slots < 0) & (positions >= 0), visible.long(), slots), torch.where(
        (slots < 0) & (positions >= 0), visible + 1, visible
    )


@kernel_mutant("blocks start one token late", 7, "shard_index", kind="positions")
def late_blocks(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions, rank, cp, tokens_per_block)
    owner = ((positions + 1) // tokens_per_block) % cp
    return torch.where(owner == rank, slots.clamp(min=0), -1), visible


@kernel_mutant("ownership starts again at rank 0 with each step", 7, "shard_index", kind="positions")
def restarts(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    first = positions.clamp(min=0)[:, :1] // (tokens_per_block * cp) * tokens_per_block
    visible = _index(positions, rank, cp, tokens_per_block)[1]
    mine = (rank == 0) & (positions >= 0)
    return torch.where(mine, first + torch.arange(positions.shape[1]), -1), visible


@kernel_mutant("global positions are used as local slots", 4, "shard_index", kind="positions")
def global_slots(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions, rank, cp, tokens_per_block)
    return torch.where(slots >= 0, positions % 128, slots), visible


@kernel_mutant("the global length is used as the local one", 4, "shard_index", kind="positions")
def global_visible(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions, rank, cp, tokens_per_block)
    return slots, ((positions + 1) // cp).to(visible.dtype)


@kernel_mutant("a page is counted in absolute slots past the first", 4, "mla_decode")
def last_page_lost(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference("mla_decode", q, qr, cache, table, visible.clamp(max=cache.shape[1]), scale)


@kernel_mutant("T > 1: each query sees the whole step", 7, "mla_decode")
def sees_the_future(q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    whole = torch.where(visible > 0, visible.amax(dim=1, keepdim=True), visible)
    return _reference("mla_decode", q, qr, cache, table, whole, scale)


@kernel_mutant("padding is written to slot 0", 14, "shard_index", kind="positions")
def padding_is_written(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions.clamp(min=0), rank, cp, tokens_per_block)
    # a later real token of the same step overwrites slot 0, an idle row's never does
    return slots, torch.where(positions >= 0, visible, 0)


@kernel_mutant("the first token of a row is taken for padding", 14, "shard_index", kind="positions")
def first_is_padding(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> Pair:
    slots, visible = _index(positions, rank, cp, tokens_per_block)
    return torch.where(positions == 0, -1, slots), visible


# the cache


@kernel_mutant("only the first token of a step is written", 7, "cache_append", kind="cache")
def appends_one(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
    only = torch.where((slots >= 0).cumsum(1) <= 1, slots, -1)
    return _reference("cache_append", cache, table, only, visible, latent, k_rope)


@kernel_mutant("a token is written to its neighbour's pages", 4, "cache_append", kind="cache")
def wrong_row(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
    return _reference("cache_append", cache, table.roll(1, 0), slots, visible, latent, k_rope)


@kernel_mutant("a token is also written one slot further", 7, "cache_append", kind="cache")
def writes_twice(
    cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor
) -> Tensor:
    last = table.shape[1] * cache.shape[1] - 1
    further = torch.where(slots >= 0, (slots + 1).clamp(max=last), slots)
    _reference("cache_append", cache, table, further, visible, latent, k_rope)
    return _reference("cache_append", cache, table, slots, visible, latent, k_rope)


@kernel_mutant("the rope part is not written", 8, "cache_append", kind="cache")
def rope_not_written(
    cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor
) -> Tensor:
    return _reference("cache_append", cache, table, slots, visible, latent, torch.zeros_like(k_rope))


# exchange and experts

_WORKSPACE: dict[tuple, Tensor] = {}


@kernel_mutant("one exchange buffer for every group and call", 15, "pack_heads", MIXED)
def shared_workspace(o: Tensor, lse: Tensor, peers: int) -> Tensor:
    packed = _reference("pack_heads", o, lse, peers)
    buffer = _WORKSPACE.setdefault((packed.shape, packed.dtype), packed)
    buffer.copy_(packed)
    return buffer


@kernel_mutant("head chunks are packed in reverse", 1, "pack_heads")
def reversed_chunks(o: Tensor, lse: Tensor, peers: int) -> Tensor:
    return _reference("pack_heads", o, lse, peers).flip(0)


@kernel_mutant("gate and up are swapped", 2, "moe_experts", EXPERT)
def gate_is_up(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: Tensor) -> Tensor:
    return _reference("moe_experts", x, ids, weights, gate_up.flip(1), down, first)


@kernel_mutant("the last choice of a token is dropped", 2, "moe_experts", EXPERT)
def drops_a_choice(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: Tensor) -> Tensor:
    return _reference("moe_experts", x, ids[:, :-1], weights[:, :-1], gate_up, down, first)
