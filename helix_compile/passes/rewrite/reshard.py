"""Attention -> FFN boundary: the gather of heads goes, o_proj is cut by rows over all ranks, one all_reduce.

    reshard(o, heads -> R) -> o_proj                      before
    o -> o_proj (this rank's columns) -> reshard(P -> R)  after: the heads a rank owns are the columns it holds

Zero heads go on to o_proj, whose columns for them are zero. A bias is added once, behind the sum.
"""

from __future__ import annotations

from torch import fx

from helix_compile.ir.graph import InputRef, erase_unused, input_named, is_call, node_named, placeholders, set_input
from helix_compile.ir.ops import helix
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.passes.rewrite.parts import behind_zero_heads, cut_input, own_linear, sum_over_world
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import LayerMatch


def reshard_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Move the reshard of every attention site from before o_proj to behind it."""
    plan = context.plan.body(match.body)
    for attention in match.attentions:
        o_proj = node_named(gm.graph, attention.o_proj)
        flat = o_proj.args[0]
        assert isinstance(flat, fx.Node)
        reader = flat
        for _ in range(0 if attention.gate is None else 2 if attention.gate.cast else 1):  # o_cast(o_gated(o, gate))
            assert isinstance(reader, fx.Node)
            reader = reader.args[0]
        gathered = behind_zero_heads(reader.args[0])
        if is_call(gathered, helix.reshard.default):
            reader.args = (gathered.args[0], *reader.args[1:])
        cut_input(gm.graph, attention.o_weight, plan)
        if attention.gate and attention.gate.linear:
            for rows in attention.gate.linear.params:
                # q has its own rows of a linear that made both: what is left of it is the gate's
                set_input(input_named(gm.graph, "param", rows.param), InputRef("param", rows.name))
                cut_input(gm.graph, rows.name, plan)
            own_linear(gm.graph, attention.gate.linear)
        sum_over_world(o_proj, context.plan.layout)
    erase_unused(gm.graph, keep=placeholders(gm.graph)[:1])
    propagate_shapes(gm.graph)
    return len(match.attentions)
