"""Attention sites -> attention over this rank's part of the cache, exchange over heads, merge.

    partial_o, lse = <the kind's own>                            PartialSoftmax over kvp
    partial_o_P, lse_P = all_to_all_heads(partial_o, lse)        each rank owns H/N heads now
    o = merge_lse(partial_o_P, lse_P);  o = o W_UV               where there is a W_UV; or before the exchange
    o = apply_sinks(o, total_lse(lse_P), sinks)                  where there are sinks: once, on what is merged
    reshard(o, heads over world -> R) -> o_proj, still whole

Where every rank holds the last tokens (a site's `ring`) o is whole at once, of the heads that the rank owns.

How a kind makes its query and attends to its shard is in a file of its own: KINDS says where.

The stage equals the original: the last gather is what reshard_pass takes away.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from helix_compile.config.options import FP8_E4M3
from helix_compile.ir.graph import (
    InputRef,
    add_input,
    aten,
    erase_unused,
    getitems,
    input_named,
    named,
    node_named,
    placeholders,
)
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.passes.match.heads import gate_by_head
from helix_compile.passes.rewrite.grouped import grouped_attention
from helix_compile.passes.rewrite.handed import values_handed_on
from helix_compile.passes.rewrite.latent import latent_attention
from helix_compile.passes.rewrite.parts import (
    cache_example,
    cut_input,
    cut_inputs,
    first_visible_of,
    handed_examples,
    open_views,
    own_linear,
    scale_example,
    step_examples,
    without_zero_heads,
)
from helix_compile.passes.runner import PassContext
from helix_compile.plan.helix_plan import AttentionPlan, BodyPlan, HelixPlan
from helix_compile.plan.matches import AttentionMatch, GateMatch, Grouped, HandedSelection, Latent, LayerMatch

# kind -> what makes (partial_o, lse) of a site, at the graph's insertion point
KINDS: dict[type, Callable[[fx.Graph, AttentionMatch, AttentionPlan, HelixPlan], list[fx.Node]]] = {
    Latent: latent_attention,
    Grouped: grouped_attention,
}


def shard_attention_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Rewrite every attention site of a body; see the module's picture."""
    graph, plan = gm.graph, context.plan.body(match.body)
    pairs = list(zip(match.attentions, plan.attentions, strict=True))
    for name, value in step_examples(graph, context.plan, [site.ring for site in plan.attentions]).items():
        add_input(graph, "step", name, value)
    for name in dict.fromkeys(filter(None, (first_visible_of(a, site) for a, site in pairs))):
        add_input(graph, "step", name, input_named(graph, "step", "visible").meta["val"])
    caches = [cache_example(graph, attention, site, context.plan) for attention, site in pairs]
    for attention in match.attentions:
        if isinstance(attention.selection, HandedSelection):
            for name, value in handed_examples(graph, attention.selection, context.plan).items():
                add_input(graph, "chosen", name, value)
    for site, attention in enumerate(match.attentions):
        if attention.shared:
            add_input(
                graph,
                *InputRef.written(site, bool(plan.attentions[site].ring)),
                input_named(graph, "step", "visible").meta["val"],
            )
    for site, (attention, attention_plan) in enumerate(pairs):
        add_input(graph, *InputRef.cache(site, bool(attention_plan.ring)), caches[site])
        if context.plan.options.cache_dtype == FP8_E4M3:
            add_input(graph, *InputRef.scale(site), scale_example(graph))
        _rewrite_site(graph, attention, attention_plan, plan, context.plan)
    output = next(n for n in graph.nodes if n.op == "output")
    hidden = output.args[0][0]
    handed = values_handed_on(graph, match, context)
    output.args = ((hidden, *handed),) if handed else (hidden,)
    # fx keeps attention as "seeded": erase by use, so that no linear over the whole context stays
    erase_unused(graph, keep=placeholders(graph)[:1])
    propagate_shapes(graph)
    return len(match.attentions)


def _rewrite_site(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan, body: BodyPlan, plan: HelixPlan) -> None:
    for linear in (match.q_proj, *match.kind.linears):
        open_views(graph, linear.views, linear.heads)
    cut_inputs(graph, [part for _, part in match.cuts], body)
    own_linear(graph, match.q_proj)
    if match.sinks:
        cut_input(graph, match.sinks.name, body)
    anchor, o_proj = node_named(graph, match.anchor), node_named(graph, match.o_proj)
    N = plan.layout.world_size
    with graph.inserting_before(anchor), made_from(graph, anchor):
        partial_o, lse = KINDS[type(match.kind)](graph, match, site, plan)
        if site.v_up == "before":
            partial_o = _raised(graph, match, "partial_o_up", partial_o)
        sinks = input_named(graph, "param", match.sinks.name) if match.sinks else None
        o = _merge(graph, plan, partial_o, lse, sinks, alone=bool(site.ring) or plan.layout.kvp == 1)
        if site.v_up == "after":
            o = _raised(graph, match, "o_up", o)
        if N > 1:
            o = named(graph, "o_whole", helix.reshard.default, o, "world:S(2)", "R", N)
            o = without_zero_heads(graph, o, site.padding(plan.layout))
    # a gate may be computed behind attention: what reads it stands at its place
    reader = node_named(graph, match.gate.product) if match.gate else anchor
    with graph.inserting_before(reader), made_from(graph, anchor):
        if match.gate:
            o = _gated(graph, match, match.gate, o)
        with made_from(graph, o_proj.args[0]):
            flat = named(graph, "o_flat", aten.flatten.using_ints, o, 2, 3)
    o_proj.args = (flat, *o_proj.args[1:])


def _raised(graph: fx.Graph, match: AttentionMatch, name: str, o: fx.Node) -> fx.Node:
    """O [B, T, h, R] by W_UV: [B, T, h, V]."""
    w_uv = match.kind.v_up
    assert w_uv is not None
    product = f"bthr,{w_uv.order.replace('d', 'v')}->bthv"
    with made_from(graph, node_named(graph, w_uv.product)):
        return named(graph, name, aten.einsum.default, product, [o, input_named(graph, "param", w_uv.name)])


def _gated(graph: fx.Graph, match: AttentionMatch, gate: GateMatch, o: fx.Node) -> fx.Node:
    """O [B, T, h, V] times its gate."""
    if gate.linear:
        open_views(graph, gate.linear.views, gate.linear.heads)
    with made_from(graph, node_named(graph, gate.product)):
        value = node_named(graph, gate.value)
        for op, *args in gate_by_head(value, gate.form, match.v_head_dim):
            value = graph.call_function(op, (value, *args))
        gated = named(graph, "o_gated", aten.mul.Tensor, o, value)
        dtype = node_named(graph, match.anchor).meta["val"].dtype
        return named(graph, "o_cast", aten._to_copy.default, gated, dtype=dtype) if gate.cast else gated


def _merge(
    graph: fx.Graph, plan: HelixPlan, partial_o: fx.Node, lse: fx.Node, sinks: fx.Node | None, alone: bool
) -> fx.Node:
    """Exact output [B, T, h, *] of the heads that this rank owns; `alone`: it has seen all that these see."""
    cp = plan.layout.kvp
    if alone:
        return partial_o if sinks is None else named(graph, "o", helix.apply_sinks.default, partial_o, lse, sinks)
    if plan.options.merge == "a2a":
        exchanged = named(graph, "exchanged", helix.all_to_all_heads.default, partial_o, lse, "kvp", cp)
        parts, lse_P = getitems(graph, exchanged, "partial_o_P", "lse_P")
        merged = named(graph, "o" if sinks is None else "o_merged", helix.merge_lse.default, parts, lse_P)
        if sinks is None:
            return merged
        total = named(graph, "lse_total", helix.total_lse.default, lse_P)
        return named(graph, "o", helix.apply_sinks.default, merged, total, sinks)
    stacked = graph.call_function(aten.unsqueeze.default, (lse, 0))
    lse_P = named(graph, "lse_P", helix.reshard.default, stacked, "kvp:S(0)", "R", cp)
    rescaled = named(graph, "rescaled_o", helix.rescale_by_lse.default, partial_o, lse, lse_P)
    if sinks is not None:  # one factor for all parts of a sum is a factor of the sum
        total = named(graph, "lse_total", helix.total_lse.default, lse_P)
        rescaled = named(graph, "rescaled_o_sinks", helix.apply_sinks.default, rescaled, total, sinks)
    return named(graph, "o", helix.reshard.default, rescaled, "kvp:P(sum)", "kvp:S(2)", cp)
