"""Ranks that hold the wrong weights, plans that say what is not so, and faults of grouped-query attention alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.graph import node_named
from helix_compile.ir.stage import bodies_of
from helix_compile.layout.degrees import HelixMesh
from helix_compile.module import HelixModule
from helix_compile.plan.helix_plan import BodyPlan
from helix_compile.verifier.mutants.graph_mutants import attends_twice
from helix_compile.verifier.mutants.mutant import (
    A2A,
    EXPERT,
    FFN,
    GQA_CATALOGUE,
    MIXED,
    edit_param,
    helix_nodes,
    kernel_mutant,
    mutant,
    permute_ranks,
)

Pair = tuple[Tensor, Tensor]


_gqa = partial(mutant, catalogue=GQA_CATALOGUE)


def _kernel(name: str, family: int, base: str = "gqa_decode", kind: str = "kernel") -> Any:
    return kernel_mutant(name, family, base, kind=kind, catalogue=GQA_CATALOGUE)


def _reference(*args: Any) -> Pair:
    return torch.ops.helix.gqa_decode(*args)


# which K/V head a query head reads


@_kernel("query heads are dealt to K/V heads in turn, not in groups", 3)
def dealt_in_turn(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    kv_heads = k.shape[2]
    by_group = torch.arange(q.shape[2]).unflatten(0, (-1, kv_heads)).T.flatten()
    o, lse = _reference(q[:, :, by_group], k, v, table, visible, scale)
    back = by_group.argsort()
    return o[:, :, back], lse[:, :, back]


@_kernel("query heads read the next group's K/V head", 3)
def next_group(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference(q, k.roll(1, 2), v.roll(1, 2), table, visible, scale)


@_kernel("every query head reads the first value head", 3)
def first_values(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference(q, k, v[:, :, :1].expand_as(v), table, visible, scale)


_gqa("ranks of tpa hold each other's K and V rows", 3, "parameters", MIXED)(
    partial(permute_ranks, ending=("k_proj.weight", "v_proj.weight"), order=[2, 3, 0, 1])
)


@_gqa("K rows of a rank are one head late, V rows are not", 3, "parameters")
def keys_one_head_late(compiled: HelixModule) -> None:
    width = helix_nodes(compiled, "gqa_decode")[0].args[1].meta["val"].shape[3]
    edit_param(compiled, "k_proj.weight", lambda w, r: w.roll(width, 0))


# the halves of the cache


@_gqa("V is read one channel early", 4, "graph")
def values_one_channel_early(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        node = node_named(body.graph, "v_cache")
        cache, dim, start, stop = node.args
        node.args = (cache, dim, start - 1, stop - 1)


@_kernel("K and V change places in the cache", 4, "cache_append", kind="cache")
def swapped_halves(
    cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    return torch.ops.helix.cache_append(cache, table, slots, visible, values, keys)


@_kernel("the last K/V head is not written", 4, "cache_append", kind="cache")
def last_head_lost(
    cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
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
def other_scale(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference(q, k, v, table, visible, scale * 0.97)


@_kernel("the mask of gqa_decode is off by one slot", 7)
def mask_off_by_one(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    return _reference(q, k, v, table, visible + (visible > 0), scale)


@_kernel("T > 1: each grouped query sees the whole step", 7)
def sees_the_future(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    whole = torch.where(visible > 0, visible.amax(dim=1, keepdim=True), visible)
    return _reference(q, k, v, table, whole, scale)


@_kernel("an empty shard of K/V says lse = 0", 5)
def empty_is_zero(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference(q, k, v, table, visible, scale)
    return o, torch.where(lse == -torch.inf, 0.0, lse)


@_kernel("statistics of a group are those of its first query head", 6)
def statistics_of_the_first(q: Tensor, k: Tensor, v: Tensor, table: Tensor, visible: Tensor, scale: float) -> Pair:
    o, lse = _reference(q, k, v, table, visible, scale)
    grouped = lse.unflatten(2, (k.shape[2], -1))
    return o, grouped[..., :1].expand_as(grouped).flatten(2)


_gqa("grouped attention over the cache is computed twice", 13, "graph")(attends_twice)

mutant("o_proj rows in (kvp, tpa) order", 1, "parameters", MIXED)(
    partial(permute_ranks, ending="o_proj.weight", order=[0, 2, 1, 3])
)


@mutant("kvp groups run through in reverse", 1, "plan")
def reversed_groups(compiled: HelixModule) -> None:
    mesh = HelixMesh(compiled.plan.layout)
    groups = {**mesh.groups, "kvp": tuple(g[::-1] for g in mesh.groups["kvp"])}
    mesh.__dict__["groups"] = groups  # the cached property of a frozen dataclass
    compiled.world.mesh = mesh


mutant("every rank holds FFN shard 0", 2, "parameters")(partial(permute_ranks, ending=FFN, order=[0, 0, 0, 0]))
mutant("two ranks swapped in a row-parallel weight only", 2, "parameters")(
    partial(permute_ranks, ending=FFN[2], order=[1, 0, 2, 3])
)
mutant("FFN shards overlap by one row", 2, "parameters")(
    partial(edit_param, ending=FFN[0], edit=lambda w, r: w.roll(1, 0) if r else w)
)
mutant("padding of the last shard is not zero", 2, "parameters", {**A2A, "cp": 3})(
    partial(edit_param, ending=FFN, edit=lambda w, r: w + 0.5 * (w == 0))
)
mutant("experts of the wrong ep coordinate", 2, "parameters", EXPERT)(
    partial(permute_ranks, ending=("experts.gate_up_proj", "experts.down_proj"), order=[2, 3, 0, 1])
)
mutant("W_UK paired with the heads of a neighbour", 3, "parameters")(
    partial(edit_param, ending=".w_uk", edit=lambda w, r: w.roll(1, 0))
)
mutant("W_UV cut for another head block", 3, "parameters", {**A2A, "v_up": "after"})(
    partial(permute_ranks, ending=".w_uv", order=[1, 2, 3, 0])
)
mutant("one rank has an older router bias", 2, "parameters")(
    partial(edit_param, ending="e_score_correction_bias", edit=lambda b, r: -2 * b if r == 2 else b)
)


def _options(compiled: HelixModule, **changed: Any) -> None:
    plan = compiled.plan
    compiled.plan = replace(plan, options=replace(plan.options, **changed))


mutant("merge option accepted and ignored", 9, "plan")(partial(_options, merge="ag_rs"))
mutant("q_proj option accepted and ignored", 9, "plan")(partial(_options, q_proj="gather"))


@mutant("v_up option accepted and ignored", 9, "plan")
def ignored_v_up(compiled: HelixModule) -> None:
    chosen = compiled.plan.bodies[0].attentions[0].v_up
    _options(compiled, v_up="after" if chosen == "before" else "before")


mutant("tokens_per_block option accepted and ignored", 9, "plan")(partial(_options, tokens_per_block=8))


@mutant("experts that do not divide are rounded down", 12, "plan", EXPERT)
def rounded_experts(compiled: HelixModule) -> None:
    def fewer(body: BodyPlan) -> BodyPlan:
        ep = compiled.plan.layout.ep
        ffns = tuple(replace(f, experts=f.experts - ep) if f.experts else f for f in body.ffns)
        return replace(body, ffns=ffns)

    compiled.plan = replace(compiled.plan, bodies=tuple(map(fewer, compiled.plan.bodies)))


@mutant("the tail of an FFN that does not divide is cut off", 12, "plan", {**A2A, "cp": 3})
def tail_cut_off(compiled: HelixModule) -> None:
    name = next(n for n in compiled.ranks[0].params if n.endswith("mlp.gate_proj.weight"))
    width = compiled.ranks[0].params[name].shape[0]
    last = compiled.ranks[-1].params
    for ending in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        for name in [n for n in last if n.endswith(ending)]:
            last[name] = torch.where(torch.arange(width)[:, None] < width - 3, last[name], 0.0)


@mutant("a cache is imported in the order of the sender, not dealt block by block", 11, "cache")
def imported_in_a_row(compiled: HelixModule) -> None:
    ledger = compiled._ledger

    def write(cache: Any, row: int, entries: Any, kvp_rank: int, site: Any, start: int = 0) -> None:
        share = -(-len(entries) // compiled.plan.layout.kvp)
        mine = entries[kvp_rank * share : (kvp_rank + 1) * share]
        cache[ledger.page_table[row, 0], : len(mine)] = mine[: cache.shape[1]]

    ledger.write_sequence = write  # type: ignore[method-assign] # the fault


@mutant("two sequences share a page", 4, "cache")
def shared_page(compiled: HelixModule) -> None:
    compiled._ledger.page_table[1, -1] = compiled._ledger.page_table[0, 0]
