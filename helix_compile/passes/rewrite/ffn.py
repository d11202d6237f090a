"""FFN on the same ranks: dense and shared experts over all N, routed experts over ep x tpf, one all_reduce.

dense    linear(gate rows), linear(up rows) -> act * up -> linear(down columns) -> reshard(P -> R)
routed   moe_experts(x, ids, weights, this rank's experts) + shared -> one reshard(P -> R) behind the addition
"""

from __future__ import annotations

from torch import fx

from helix_compile.errors import PassError
from helix_compile.ir.graph import add_input, aten, erase_unused, input_named, named, node_named, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.layout.degrees import HelixLayout
from helix_compile.passes.rewrite.parts import cut_input, rank_example, sum_over_world
from helix_compile.passes.runner import PassContext
from helix_compile.plan.helix_plan import BodyPlan
from helix_compile.plan.matches import DenseFFNMatch, LayerMatch, MoEMatch


def shard_ffn_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Cut every FFN of a body."""
    graph, layout, plan = gm.graph, context.plan.layout, context.plan.body(match.body)
    for ffn in match.dense_ffns:
        for name in (ffn.gate_weight, ffn.gate_bias, ffn.up_weight, ffn.up_bias, ffn.down_weight):
            if name:
                cut_input(graph, name, plan)
    seams = _seams(match)
    for moe in match.moes:
        routed = _experts(graph, moe, plan, layout)
        seams = [routed.name if s == moe.output else s for s in seams]
    for ffn in match.dense_ffns:
        if ffn.down not in seams:
            _refuse_inner_bias(ffn)
    for seam in seams:
        sum_over_world(node_named(graph, seam), layout)
    erase_unused(graph, keep=placeholders(graph)[:1])
    propagate_shapes(graph)
    return len(match.dense_ffns) + len(match.moes)


def _seams(match: LayerMatch) -> list[str]:
    """Nodes behind which the sum over ranks goes: two partial sums that are added need one."""
    shared = {m.shared for m in match.moes}
    alone = [f.down for f in match.dense_ffns if f.down not in shared]
    return alone + [m.seam for m in match.moes]


def _refuse_inner_bias(ffn: DenseFFNMatch) -> None:
    """A shared expert's bias would be added once a rank; no known model has one."""
    if ffn.down_bias:
        raise PassError(f"shared expert `{ffn.down}` has a bias ({ffn.down_bias}); not supported")


def _experts(graph: fx.Graph, match: MoEMatch, plan: BodyPlan, layout: HelixLayout) -> fx.Node:
    """Either Hugging Face form -> helix::moe_experts; the cast behind the original's sum goes with it."""
    output = node_named(graph, match.output)
    weights = [input_named(graph, "param", n) for n in (match.gate_up, match.down)]
    for name in (match.gate_up, match.down):
        cut_input(graph, name, plan)
    x, ids, probabilities = (node_named(graph, n) for n in (match.x, match.expert_ids, match.weights))
    rank = add_input(graph, "step", "ep_rank", rank_example(graph))
    with made_from(graph, output), graph.inserting_before(output):
        first = named(graph, "first_expert", aten.mul.Tensor, rank, -(-match.num_experts // layout.ep))
        routed = named(graph, "routed", helix.moe_experts.default, x, ids, probabilities, *weights, first)
    output.replace_all_uses_with(routed)
    return routed
