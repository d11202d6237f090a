"""Ranks that hold the wrong weights, and plans that say what is not so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from helix_compile.mesh import HelixMesh
from helix_compile.module import HelixModule
from helix_compile.mutants.mutant import A2A, EXPERT, MIXED, edit_param, mutant, permute_ranks
from helix_compile.plan import BodyPlan


@mutant("o_proj rows in (kvp, tpa) order", 1, "parameters", MIXED)
def o_proj_order(compiled: HelixModule) -> None:
    permute_ranks(compiled, "o_proj.weight", [0, 2, 1, 3])


@mutant("kvp groups run through in reverse", 1, "plan")
def reversed_groups(compiled: HelixModule) -> None:
    mesh = HelixMesh(compiled.plan.layout)
    groups = {**mesh.groups, "kvp": tuple(g[::-1] for g in mesh.groups["kvp"])}
    mesh.__dict__["groups"] = groups  # the cached property of a frozen dataclass
    compiled.world.mesh = mesh


@mutant("every rank holds FFN shard 0", 2, "parameters")
def all_shard_zero(compiled: HelixModule) -> None:
    for ending in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
        permute_ranks(compiled, ending, [0, 0, 0, 0])


@mutant("two ranks swapped in a row-parallel weight only", 2, "parameters")
def down_swapped(compiled: HelixModule) -> None:
    permute_ranks(compiled, "mlp.down_proj.weight", [1, 0, 2, 3])


@mutant("FFN shards overlap by one row", 2, "parameters")
def overlap(compiled: HelixModule) -> None:
    edit_param(compiled, "mlp.gate_proj.weight", lambda w, r: w.roll(1, 0) if r else w)


@mutant("padding of the last shard is not zero", 2, "parameters", {**A2A, "cp": 3})
def dirty_padding(compiled: HelixModule) -> None:
    edit_param(compiled, "mlp.up_proj.weight", lambda w, r: w + 0.5 * (w == 0))
    edit_param(compiled, "mlp.gate_proj.weight", lambda w, r: w + 0.5 * (w == 0))
    edit_param(compiled, "mlp.down_proj.weight", lambda w, r: w + 0.5 * (w == 0))


@mutant("experts of the wrong ep coordinate", 2, "parameters", EXPERT)
def wrong_experts(compiled: HelixModule) -> None:
    permute_ranks(compiled, "experts.gate_up_proj", [2, 3, 0, 1])
    permute_ranks(compiled, "experts.down_proj", [2, 3, 0, 1])


@mutant("W_UK paired with the heads of a neighbour", 3, "parameters")
def shifted_heads(compiled: HelixModule) -> None:
    edit_param(compiled, ".w_uk", lambda w, r: w.roll(1, 0))


@mutant("W_UV cut for another head block", 3, "parameters", {**A2A, "v_up": "after"})
def shifted_values(compiled: HelixModule) -> None:
    permute_ranks(compiled, ".w_uv", [1, 2, 3, 0])


@mutant("one rank has an older router bias", 2, "parameters")
def stale_router(compiled: HelixModule) -> None:
    edit_param(compiled, "e_score_correction_bias", lambda b, r: -2 * b if r == 2 else b)


@mutant("merge option accepted and ignored", 9, "plan")
def ignored_merge(compiled: HelixModule) -> None:
    _options(compiled, merge="ag_rs")


@mutant("q_proj option accepted and ignored", 9, "plan")
def ignored_q_proj(compiled: HelixModule) -> None:
    _options(compiled, q_proj="gather")


@mutant("v_up option accepted and ignored", 9, "plan")
def ignored_v_up(compiled: HelixModule) -> None:
    chosen = compiled.plan.bodies[0].attentions[0].v_up
    _options(compiled, v_up="after" if chosen == "before" else "before")


@mutant("tokens_per_block option accepted and ignored", 9, "plan")
def ignored_block(compiled: HelixModule) -> None:
    _options(compiled, tokens_per_block=8)


@mutant("experts that do not divide are rounded down", 12, "plan", EXPERT)
def rounded_experts(compiled: HelixModule) -> None:
    def fewer(body: BodyPlan) -> BodyPlan:
        ffns = tuple(
            replace(f, experts_per_rank=f.experts_per_rank - 1) if f.experts_per_rank else f
            for f in body.ffns
        )
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

    def write(cache: Any, row: int, entries: Any, kvp_rank: int, start: int = 0) -> None:
        share = -(-len(entries) // compiled.plan.layout.kvp)
        mine = entries[kvp_rank * share : (kvp_rank + 1) * share]
        cache[ledger.page_table[row, 0], : len(mine)] = mine[: cache.shape[1]]

    ledger.write_sequence = write  # type: ignore[method-assign] # the fault


@mutant("two sequences share a page", 4, "cache")
def shared_page(compiled: HelixModule) -> None:
    compiled._ledger.page_table[1, -1] = compiled._ledger.page_table[0, 0]


def _options(compiled: HelixModule, **changed: Any) -> None:
    plan = compiled.plan
    compiled.plan = replace(plan, options=replace(plan.options, **changed))
