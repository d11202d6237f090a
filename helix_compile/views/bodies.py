"""The views of a compiled module's bodies, before and after: what the files of inspect() draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from helix_compile.ir.stage import body_of
from helix_compile.plan.helix_plan import BodyPlan, HelixPlan
from helix_compile.views.build_view import build_view, first_stages
from helix_compile.views.graph_view import GraphView


@dataclass(frozen=True)
class BodyViews:
    """One body before and after."""

    plan: BodyPlan
    before: GraphView
    after: GraphView


def body_views(plan: HelixPlan, stages: Mapping[str, fx.GraphModule], runs: bool = True) -> list[BodyViews]:
    """Views of every body in the first and the last stage there is.

    Args:
        plan: says what each collective sends.
        stages: stage name -> outer graph.
        runs: join small ops (see build_view).
    """
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    views = []
    for body in plan.bodies:
        made = first_stages(stages, body.name)
        egress = [
            (c.op, float(c.egress_bytes_per_rank_per_token / c.parts)) for c in body.collectives for _ in range(c.parts)
        ]
        graphs = (body_of(stage, body.name).graph for stage in (first, last))
        before, after = (build_view(g, body.name, first_stage=made, egress=egress, runs=runs) for g in graphs)
        views.append(BodyViews(body, before, after))
    return views
