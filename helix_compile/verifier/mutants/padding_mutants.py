"""Zero heads and experts that are not zero, stand in the wrong place, or are chosen; and plans that hide them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.stage import nodes_of
from helix_compile.layout.heads import HeadPadding
from helix_compile.module import HelixModule
from helix_compile.plan.helix_plan import BodyPlan, ParamShard
from helix_compile.verifier.mutants.mutant import A2A, GQA_CATALOGUE, edit_param, mutant

PADDED: dict[str, Any] = {**A2A, "cp": 5, "pad_heads": True}  # 24 -> 25 heads; grouped: 12 -> 20, 3 -> 5 in each group
PADDED_EXPERTS: dict[str, Any] = {**A2A, "cp": 3, "ep": 3, "pad_heads": True}  # 8 -> 9 experts

mutant("rows of a zero head are not zero", 2, "parameters", PADDED)(
    partial(edit_param, ending="q_b_proj.weight", edit=lambda w, r: w + 0.5 * (w == 0))
)
mutant("o_proj's columns for a zero head are those of the head before", 2, "parameters", PADDED)(
    partial(edit_param, ending="o_proj.weight", edit=lambda w, r: _filled(w, 14) if r == 4 else w)
)
mutant("a zero head stands before the others of its rank", 2, "parameters", PADDED)(
    partial(edit_param, ending="o_proj.weight", edit=lambda w, r: w.roll(14, 1) if r == 4 else w)
)
mutant("the expert that no token chooses holds weights", 2, "parameters", PADDED_EXPERTS)(
    partial(edit_param, ending="experts.down_proj", edit=lambda w, r: torch.where(w == 0, w.mean() + 1, w))
)


def _filled(weight: Tensor, width: int) -> Tensor:
    return torch.cat([weight[:, :-width], weight[:, -2 * width : -width]], dim=1)


@mutant("ranks of ep count experts without those that are padded", 2, "graph", PADDED_EXPERTS)
def counted_rounded_down(compiled: HelixModule) -> None:
    for node in [n for n in nodes_of(compiled.graph) if n.name == "first_expert"]:
        node.args = (node.args[0], node.args[1] - 1)


@mutant("the plan has no word of zero heads", 12, "plan", PADDED)
def unsaid(compiled: HelixModule) -> None:
    compiled.plan = replace(compiled.plan, options=replace(compiled.plan.options, pad_heads=False))


@mutant("zero heads behind all groups in place of behind each", 3, "parameters", PADDED, GQA_CATALOGUE)
def behind_all_groups(compiled: HelixModule) -> None:
    """Consistently in q's rows and o_proj's columns: a head then reads another group's K and V."""
    real = [g * 5 + j for g in range(4) for j in range(3)]
    order = [*real, *(p for p in range(20) if p not in real)]

    def rows(weight: Tensor, rank: int) -> Tensor:
        return weight.unflatten(0, (20, -1))[order].flatten(0, 1)

    edit_param(compiled, "q_proj.weight", rows)
    for name in [n for n in compiled.ranks[0].params if n.endswith("o_proj.weight")]:
        whole = torch.cat([rank.params[name] for rank in compiled.ranks], dim=1)
        moved = whole.unflatten(1, (20, -1))[:, order].flatten(1, 2).chunk(5, dim=1)
        for rank, part in zip(compiled.ranks, moved, strict=True):
            rank.params[name] = part.contiguous()


@mutant("the plan pads groups at the end of all", 3, "plan", PADDED, GQA_CATALOGUE)
def planned_at_the_end(compiled: HelixModule) -> None:
    """The plan and what ranks hold agree, so that only the contract says otherwise."""
    at_the_end = HeadPadding(1, 12, 1, 20)

    def one_group(shard: ParamShard) -> ParamShard:
        return replace(shard, cuts=tuple(replace(c, padding=c.padding and at_the_end) for c in shard.cuts))

    def edited(body: BodyPlan) -> BodyPlan:
        return replace(body, param_shards=tuple(map(one_group, body.param_shards)))

    compiled.plan = replace(compiled.plan, bodies=tuple(map(edited, compiled.plan.bodies)))
    behind_all_groups(compiled)
