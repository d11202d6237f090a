"""The helix:: vocabulary: one schema, one fake and one torch reference per op, nothing else.

Compute ops keep their name through lowering. Moves (all_to_all_heads, reshard) say *what* is exchanged; passes/lower/collectives.py
turns each into `_c10d_functional` collectives. A move has no eager implementation: no rank alone can run it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from helix_compile.kernels.reference import (
    accumulation_dtype,
    cache_append_reference,
    gqa_decode_reference,
    merge_lse_reference,
    mla_decode_reference,
    moe_experts_reference,
    moe_router_reference,
    pack_heads_reference,
    rescale_by_lse_reference,
    shard_index_reference,
    unpack_heads_reference,
)
from helix_compile.kernels.reference_fused import rope_heads_reference

_LIBRARY = torch.library.Library("helix", "DEF")  # kept alive: dropping it unregisters the ops


def _define(schema: str, reference: Callable | None, fake: Callable) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if reference is not None:
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"helix::{name}", fake, lib=_LIBRARY)


def _shard_index_fake(positions: Tensor, rank: Tensor, cp: int, tokens_per_block: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)


def _cache_append_fake(
    cache: Tensor, page_table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor
) -> Tensor:
    return torch.empty_like(visible)


def _mla_decode_fake(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    lse = q_latent.new_empty(q_latent.shape[:3], dtype=accumulation_dtype(q_latent.dtype))
    return q_latent.new_empty(q_latent.shape), lse


def _gqa_decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v_cache.shape[3])), lse


def _all_to_all_heads_fake(partial_o: Tensor, lse: Tensor, axis: str, peers: int) -> tuple[Tensor, Tensor]:
    B, T, H, width = partial_o.shape
    chunk = (peers, B, T, H // peers)
    return partial_o.new_empty((*chunk, width)), lse.new_empty(chunk)


def _pack_heads_fake(partial_o: Tensor, lse: Tensor, peers: int) -> Tensor:
    if partial_o.dtype == lse.dtype:
        return lse.new_empty((peers, (partial_o.numel() + lse.numel()) // peers))
    n_bytes = partial_o.numel() * partial_o.dtype.itemsize + lse.numel() * lse.dtype.itemsize
    return lse.new_empty((peers, n_bytes // peers), dtype=torch.uint8)


def _unpack_heads_fake(buffer: Tensor, partial_o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    peers, (B, T, H), width = int(buffer.shape[0]), lse.shape[:3], partial_o.shape[3]
    chunk = (peers, B, T, H // peers)
    return partial_o.new_empty((*chunk, width)), lse.new_empty(chunk)


def _merge_lse_fake(partial_o_P: Tensor, lse_P: Tensor) -> Tensor:
    return partial_o_P.new_empty(partial_o_P.shape[1:])


def _rescale_by_lse_fake(partial_o: Tensor, lse: Tensor, lse_P: Tensor) -> Tensor:
    return torch.empty_like(partial_o)


def _moe_experts_fake(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first_expert: Tensor
) -> Tensor:
    return torch.empty_like(x)


def _moe_router_fake(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    chosen = (logits.shape[0], top_k)
    return logits.new_empty(chosen, dtype=torch.int64), logits.new_empty(chosen)


def _rope_heads_fake(q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    B, H, T, r = q_rope.shape
    return q_rope.new_empty((B, T, H, r))


def _reshard_fake(x: Tensor, source: str, target: str, size: int) -> Tensor:
    """A shard that is gathered grows `size` times along its dim, a sum that is scattered shrinks so."""
    shape = list(x.shape)
    if shard := _SHARD.search(source):
        shape[int(shard[1])] = shape[int(shard[1])] * size
    elif shard := _SHARD.search(target):
        shape[int(shard[1])] = shape[int(shard[1])] // size
    return x.new_empty(shape)


_SHARD = re.compile(r"S\((\d+)\)")


_define(
    "shard_index(Tensor positions, Tensor rank, int cp, int tokens_per_block) -> (Tensor, Tensor)",
    shard_index_reference,
    _shard_index_fake,
)


_define(
    "cache_append(Tensor(a!) cache, Tensor page_table, Tensor slots, Tensor visible, Tensor latent,"
    " Tensor k_rope) -> Tensor",
    cache_append_reference,
    _cache_append_fake,
)


_define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor page_table, Tensor visible,"
    " float scale) -> (Tensor, Tensor)",
    mla_decode_reference,
    _mla_decode_fake,
)


_define(
    "gqa_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor visible,"
    " float scale) -> (Tensor, Tensor)",
    gqa_decode_reference,
    _gqa_decode_fake,
)


_define("merge_lse(Tensor partial_o_P, Tensor lse_P) -> Tensor", merge_lse_reference, _merge_lse_fake)


_define(
    "rescale_by_lse(Tensor partial_o, Tensor lse, Tensor lse_P) -> Tensor",
    rescale_by_lse_reference,
    _rescale_by_lse_fake,
)


_define(
    "moe_experts(Tensor x, Tensor expert_ids, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor first_expert) -> Tensor",
    moe_experts_reference,
    _moe_experts_fake,
)


_define(
    "moe_router(Tensor logits, Tensor bias, int n_group, int topk_group, int top_k, bool normalize,"
    " float scale) -> (Tensor, Tensor)",
    moe_router_reference,
    _moe_router_fake,
)


_define(
    "rope_heads(Tensor q_rope, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    rope_heads_reference,
    _rope_heads_fake,
)


_define("pack_heads(Tensor partial_o, Tensor lse, int peers) -> Tensor", pack_heads_reference, _pack_heads_fake)


_define(
    "unpack_heads(Tensor(a) buffer, Tensor partial_o, Tensor lse) -> (Tensor(a), Tensor(a))",
    unpack_heads_reference,
    _unpack_heads_fake,
)


_define(
    "all_to_all_heads(Tensor partial_o, Tensor lse, str axis, int peers) -> (Tensor, Tensor)",
    None,
    _all_to_all_heads_fake,
)


_define("reshard(Tensor x, str source, str target, int size) -> Tensor", None, _reshard_fake)


helix = torch.ops.helix


MOVES = (helix.all_to_all_heads.default, helix.reshard.default)
