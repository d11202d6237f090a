"""Faults that only grouped-query attention can have: heads of another group, halves of the K/V cache, its own op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_compile.module import HelixModule
from helix_compile.mutants.mutant import (
    GQA_CATALOGUE,
    MIXED,
    edit_param,
    mutant,
    nodes_of,
    permute_ranks,
    recompile,
    replace_op,
)
from helix_compile.passes.fx_edit import node_named

Pair = tuple[Tensor, Tensor]


def _gqa(name: str, family: int, kind: str, options: dict[str, Any] | None = None) -> Any:
    return mutant(name, family, kind, options, GQA_CATALOGUE)


def _kernel(name: str, family: int, base: str = "gqa_decode", kind: str = "kernel") -> Any:
    """Register a mutant that replaces one op by the function that follows."""

    def register(kernel: Any) -> Any:
        @_gqa(name, family, kind)
        def apply(compiled: HelixModule) -> None:
            replace_op(compiled, base, kernel)

        return kernel

    return register


def _reference(*args: Any) -> Pair:
    return torch.ops.helix.gqa_decode(*args)


# which K/V head a query head reads


@_kernel("query heads are dealt to K/V heads in turn, not in groups", 3)
def dealt_in_turn(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    kv_heads = k.shape[2]
    by_group = torch.arange(q.shape[2]).unflatten(0, (-1, kv_heads)).T.flatten()
    o, lse = _reference(q[:, :, by_group], k, v, table, visible, scale)
    back = by_group.argsort()
    return o[:, :, back], lse[:, :, back]


@_kernel("query heads read the next group's K/V head", 3)
def next_group(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    return _reference(q, k.roll(1, 2), v.roll(1, 2), table, visible, scale)


@_kernel("every query head reads the first value head", 3)
def first_values(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    return _reference(q, k, v[:, :, :1].expand_as(v), table, visible, scale)


@_gqa("ranks of tpa hold each other's K and V rows", 3, "parameters", MIXED)
def kv_of_another_rank(compiled: HelixModule) -> None:
    for ending in ("k_proj.weight", "v_proj.weight"):
        permute_ranks(compiled, ending, [2, 3, 0, 1])


@_gqa("K rows of a rank are one head late, V rows are not", 3, "parameters")
def keys_one_head_late(compiled: HelixModule) -> None:
    width = nodes_of(compiled, "gqa_decode")[0].args[1].meta["val"].shape[3]
    edit_param(compiled, "k_proj.weight", lambda w, r: w.roll(width, 0))


# the halves of the cache


@_gqa("V is read one channel early", 4, "graph")
def values_one_channel_early(compiled: HelixModule) -> None:
    for _, body in compiled.graph.named_children():
        node = node_named(body.graph, "v_cache")
        cache, dim, start, stop = node.args
        node.args = (cache, dim, start - 1, stop - 1)
    recompile(compiled)


@_kernel("K and V change places in the cache", 4, "cache_append", kind="cache")
def swapped_halves(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # fmt: skip
    return torch.ops.helix.cache_append(cache, table, slots, visible, values, keys)


@_kernel("the last K/V head is not written", 4, "cache_append", kind="cache")
def last_head_lost(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # fmt: skip
    keys, values = keys.clone(), values.clone()
    keys[:, :, -1] = values[:, :, -1] = 0
    return torch.ops.helix.cache_append(cache, table, slots, visible, keys, values)


# norms, scale, visibility, statistics


@_gqa("the norms of query and key are swapped", 2, "parameters")
def norms_swapped(compiled: HelixModule) -> None:
    for rank in compiled.ranks:
        for name in [n for n in rank.params if n.endswith("q_norm.weight")]:
            other = name.replace("q_norm", "k_norm")
            rank.params[name], rank.params[other] = rank.params[other], rank.params[name]


@_kernel("grouped scores without the model's scale", 8)
def other_scale(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    return _reference(q, k, v, table, visible, scale * 0.97)


@_kernel("the mask of gqa_decode is off by one slot", 7)
def mask_off_by_one(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    return _reference(q, k, v, table, visible + (visible > 0), scale)


@_kernel("T > 1: each grouped query sees the whole step", 7)
def sees_the_future(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    whole = torch.where(visible > 0, visible.amax(dim=1, keepdim=True), visible)
    return _reference(q, k, v, table, whole, scale)


@_kernel("an empty shard of K/V says lse = 0", 5)
def empty_is_zero(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    o, lse = _reference(q, k, v, table, visible, scale)
    return o, torch.where(lse == -torch.inf, 0.0, lse)


@_kernel("statistics of a group are those of its first query head", 6)
def statistics_of_the_first(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:  # fmt: skip
    o, lse = _reference(q, k, v, table, visible, scale)
    grouped = lse.unflatten(2, (k.shape[2], -1))
    return o, grouped[..., :1].expand_as(grouped).flatten(2)


@_gqa("grouped attention over the cache is computed twice", 13, "graph")
def attends_twice(compiled: HelixModule) -> None:
    for decode in nodes_of(compiled, "gqa_decode"):
        with decode.graph.inserting_after(decode):
            decode.graph.call_function(decode.target, decode.args)
    recompile(compiled)
