"""Attention -> FFN boundary: the gather of heads goes, o_proj is cut by rows over all ranks, one all_reduce.

    reshard(o, heads -> R) -> o_proj                      before
    o -> o_proj (this rank's columns) -> reshard(P -> R)  after: the heads a rank owns are the columns it holds

A bias is added once, behind the sum.
"""

from __future__ import annotations

from torch import fx

from helix_compile.graph_pass import PassResult
from helix_compile.layout import HelixLayout
from helix_compile.matches import LayerMatch
from helix_compile.ops import helix
from helix_compile.passes.cut_inputs import cut_input
from helix_compile.passes.fx_edit import (
    aten,
    erase_unused,
    is_call,
    named,
    node_named,
    placeholders,
)
from helix_compile.passes.propagate import propagate_shapes
from helix_compile.plan import BodyPlan
from helix_compile.provenance import made_from


def reshard_pass(
    gm: fx.GraphModule, *, match: LayerMatch, plan: BodyPlan, layout: HelixLayout
) -> PassResult:
    """Move the reshard of every attention site from before o_proj to behind it."""
    for attention in match.attentions:
        o_proj = node_named(gm.graph, attention.o_proj)
        flat = o_proj.args[0]
        assert isinstance(flat, fx.Node)
        reader = flat.args[0] if attention.gate else flat
        assert isinstance(reader, fx.Node)
        gathered = reader.args[0]
        if is_call(gathered, helix.reshard.default):
            reader.args = (gathered.args[0], *reader.args[1:])
        cut_input(gm.graph, attention.o_weight, plan)
        if attention.gate is not None:
            for name in (attention.gate.weight, attention.gate.bias):
                if name:
                    cut_input(gm.graph, name, plan)
        sum_over_world(o_proj, layout)
    erase_unused(gm.graph, keep=placeholders(gm.graph)[:1])
    propagate_shapes(gm.graph)
    return PassResult(gm, len(match.attentions))


def sum_over_world(node: fx.Node, layout: HelixLayout) -> fx.Node:
    """Put reshard(P -> R) behind a row-parallel node; the bias of a linear moves behind the sum."""
    if layout.world_size == 1:
        return node
    graph, users = node.graph, list(node.users)
    with made_from(graph, node), graph.inserting_after(node):
        total = named(
            graph,
            f"{node.name}_sum",
            helix.reshard.default,
            node,
            "world:P(sum)",
            "R",
            layout.world_size,
        )
    result = total
    if is_call(node, aten.linear.default) and len(node.args) > 2 and node.args[2] is not None:
        bias = node.args[2]
        node.args = node.args[:2]
        with made_from(graph, node), graph.inserting_after(total):
            result = graph.call_function(aten.add.Tensor, (total, bias))
    for user in users:
        user.replace_input_with(node, result)
    return result
