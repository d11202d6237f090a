"""MLA sites -> absorbed attention over this rank's part of the latent cache, exchange over heads, merge.

    q -> [q_nope | q_rope];  q_latent = q_nope W_UK
    cache_append(latent, k_rope) at this rank's slots
    partial_o, lse = mla_decode(q_latent, q_rope, cache)         PartialSoftmax over kvp
    partial_o_P, lse_P = all_to_all_heads(partial_o, lse)        each rank owns H/N heads now
    o = merge_lse(partial_o_P, lse_P);  o = o W_UV
    reshard(o, heads over world -> R) -> o_proj, still whole

A grouped-query site has no latent: shard_gqa.py makes its (partial_o, lse), and there is no W_UK and no W_UV.

The stage equals the original: the last gather is what reshard_pass takes away.

Grouped-query sites -> attention over this rank's slots and KV heads: (partial_o, lse), as shard_attention.py exchanges them.

k, v of the new tokens: this rank's KV heads (k_proj and v_proj are cut over tpa)
cache_append(k, v) at this rank's slots; cache [pages, page_size, K / tpa, Dk + Dv]
partial_o, lse = gqa_decode(q, cache[..., :Dk], cache[..., Dk:])
"""

from __future__ import annotations

from torch import fx

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
from helix_compile.layout.degrees import HelixLayout
from helix_compile.passes.match.heads import gate_by_head
from helix_compile.passes.rewrite.parts import cache_example, cut_input, open_views, step_examples
from helix_compile.passes.runner import PassContext
from helix_compile.plan.helix_plan import AttentionPlan, BodyPlan
from helix_compile.plan.matches import AttentionMatch, GateMatch, GqaMatch, LayerMatch, Site


def shard_attention_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Rewrite every attention site of a body; see the module's picture."""
    graph, layout, plan = gm.graph, context.plan.layout, context.plan.body(match.body)
    for name, value in step_examples(graph, context.plan).items():
        add_input(graph, "step", name, value)
    caches = [cache_example(graph, attention, context.plan) for attention in match.attentions]
    for site, (attention, attention_plan) in enumerate(zip(match.attentions, plan.attentions, strict=True)):
        add_input(graph, *InputRef.cache(site), caches[site])
        _rewrite_site(graph, attention, attention_plan, plan, layout)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (output.args[0][0],)
    # fx keeps attention as "seeded": erase by use, so that no linear over the whole context stays
    erase_unused(graph, keep=placeholders(graph)[:1])
    propagate_shapes(graph)
    return len(match.attentions)


def _rewrite_site(graph: fx.Graph, match: Site, plan: AttentionPlan, body: BodyPlan, layout: HelixLayout) -> None:
    for name in (match.q_weight, match.q_bias):
        if name:
            cut_input(graph, name, body)
    open_views(graph, match.head_views, match.num_heads)
    anchor, o_proj = node_named(graph, match.anchor), node_named(graph, match.o_proj)
    w_uv = None
    if isinstance(match, AttentionMatch):
        w_uk = _shard_input(graph, match.w_uk.param, "w_uk", body)
        w_uv = _shard_input(graph, match.w_uv.param, "w_uv", body)
    with graph.inserting_before(anchor), made_from(graph, anchor):
        if isinstance(match, GqaMatch):
            partial_o, lse = gqa_attention(graph, match, plan, body, layout)
        else:
            with made_from(graph, node_named(graph, match.q)):
                q_latent, q_rope = _absorbed_query(graph, match, plan, w_uk, layout)
            partial_o, lse = _local_attention(graph, match, plan, q_latent, q_rope)
        if plan.v_up == "before":
            partial_o = _raised(graph, match, "partial_o_up", partial_o, w_uv)
        o = _merge(graph, plan, partial_o, lse)
        if plan.v_up == "after":
            o = _raised(graph, match, "o_up", o, w_uv)
        if layout.world_size > 1:
            o = named(graph, "o_whole", helix.reshard.default, o, "world:S(2)", "R", layout.world_size)
    # a gate may be computed behind attention: what reads it stands at its place
    place = node_named(graph, match.gate.product) if match.gate else anchor
    with graph.inserting_before(place), made_from(graph, anchor):
        if match.gate:
            o = _gated(graph, match, match.gate, o)
        with made_from(graph, o_proj.args[0]):
            flat = named(graph, "o_flat", aten.flatten.using_ints, o, 2, 3)
    o_proj.args = (flat, *o_proj.args[1:])


def _raised(graph: fx.Graph, match: Site, name: str, o: fx.Node, w_uv: fx.Node | None) -> fx.Node:
    """O [B, T, h, R] by W_UV: [B, T, h, V]."""
    assert isinstance(match, AttentionMatch)
    product = f"bthr,{match.w_uv.order.replace('d', 'v')}->bthv"
    with made_from(graph, node_named(graph, match.v_up)):
        return named(graph, name, aten.einsum.default, product, [o, w_uv])


def _gated(graph: fx.Graph, match: Site, gate: GateMatch, o: fx.Node) -> fx.Node:
    """O [B, T, h, V] times its gate."""
    open_views(graph, gate.head_views, match.num_heads)
    with made_from(graph, node_named(graph, gate.product)):
        value = node_named(graph, gate.value)
        for op, *args in gate_by_head(value, gate.form, match.v_head_dim):
            value = graph.call_function(op, (value, *args))
        return named(graph, "o_gated", aten.mul.Tensor, o, value)


def _absorbed_query(
    graph: fx.Graph, match: AttentionMatch, plan: AttentionPlan, w_uk: fx.Node, layout: HelixLayout
) -> tuple[fx.Node, fx.Node]:
    """q_latent [B, T, Ht, R] and q_rope [B, T, Ht, r]."""
    q = node_named(graph, match.q)
    of_rope = node_named(graph, match.q_rope_value) if match.q_rope_value else q
    q_nope, q_rope = _channels(graph, q, match.q_nope), _channels(graph, of_rope, match.q_rope)
    form, order = match.q_form.replace("C", "N").lower(), match.w_uk.order.replace("d", "n")
    with made_from(graph, node_named(graph, match.k_up)):
        q_latent = named(graph, "q_latent", aten.einsum.default, f"{form},{order}->bthr", [q_nope, w_uk])
    q_rope = _as_bthc(graph, q_rope, match.q_rope_form)
    if plan.q_proj == "replicate":
        return q_latent, q_rope
    packed = named(graph, "q_packed", aten.cat.default, [q_latent, q_rope], -1)
    source, target = ("world:S(2)", "tpa:S(2)") if layout.tpa > 1 else ("kvp:S(2)", "R")
    packed = named(graph, "q_gathered", helix.reshard.default, packed, source, target, layout.kvp)
    sizes = [match.kv_lora_rank, match.qk_rope_head_dim]
    split = graph.call_function(aten.split_with_sizes.default, (packed, sizes, -1))
    q_latent, q_rope = getitems(graph, split, "q_latent", "q_rope")
    return q_latent, q_rope


def _as_bthc(graph: fx.Graph, q_rope: fx.Node, form: str) -> fx.Node:
    if form == "BTHC":
        return q_rope
    if form == "BHTC":
        return named(graph, "q_rope", aten.transpose.int, q_rope, 1, 2)
    return named(graph, "q_rope", aten.permute.default, q_rope, [form.index(letter) for letter in "BTHC"])


def _channels(graph: fx.Graph, q: fx.Node, channels: tuple[int, ...]) -> fx.Node:
    """Channels of q [*, *, *, Dk] in this order: one slice a run, joined where there are several."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    parts = [graph.call_function(aten.slice.Tensor, (q, 3, r[0], r[-1] + 1)) for r in runs]
    return parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 3))


def _local_attention(
    graph: fx.Graph, match: AttentionMatch, plan: AttentionPlan, q_latent: fx.Node, q_rope: fx.Node
) -> list[fx.Node]:
    """Append what is new, then attend to this rank's shard: (partial_o, lse)."""
    slots, visible, page_table = (input_named(graph, "step", n) for n in ("slots", "visible", "page_table"))
    cache = input_named(graph, "cache", f"cache_{plan.site}")
    latent, k_rope = (_squeezed(graph, node_named(graph, n)) for n in match.new)
    past = [node_named(graph, n) for n in match.past]
    with made_from(graph, *past):
        written = named(
            graph, "visible_now", helix.cache_append.default, cache, page_table, slots, visible, latent, k_rope
        )
    attended = named(
        graph, "mla_decode", helix.mla_decode.default, q_latent, q_rope, cache, page_table, written, match.scale
    )
    return getitems(graph, attended, "partial_o", "lse")


def _squeezed(graph: fx.Graph, new: fx.Node) -> fx.Node:
    with made_from(graph, new):
        return graph.call_function(aten.squeeze.dim, (new, 1))


def _merge(graph: fx.Graph, plan: AttentionPlan, partial_o: fx.Node, lse: fx.Node) -> fx.Node:
    """Exact output [B, T, h, *] of the heads that this rank owns."""
    if plan.kvp == 1:
        return partial_o
    if plan.merge == "a2a":
        exchanged = named(graph, "exchanged", helix.all_to_all_heads.default, partial_o, lse, "kvp", plan.kvp)
        parts = getitems(graph, exchanged, "partial_o_P", "lse_P")
        return named(graph, "o", helix.merge_lse.default, *parts)
    stacked = graph.call_function(aten.unsqueeze.default, (lse, 0))
    lse_P = named(graph, "lse_P", helix.reshard.default, stacked, "kvp:S(0)", "R", plan.kvp)
    rescaled = named(graph, "rescaled_o", helix.rescale_by_lse.default, partial_o, lse, lse_P)
    return named(graph, "o", helix.reshard.default, rescaled, "kvp:P(sum)", "kvp:S(2)", plan.kvp)


def _shard_input(graph: fx.Graph, param: str, suffix: str, body: BodyPlan) -> fx.Node:
    whole = input_named(graph, "param", param)
    with made_from(graph, whole):
        node = add_input(graph, "param", f"{param}.{suffix}", whole.meta["val"])
    cut_input(graph, f"{param}.{suffix}", body)
    return node


def gqa_attention(
    graph: fx.Graph, match: GqaMatch, plan: AttentionPlan, body: BodyPlan, layout: HelixLayout
) -> list[fx.Node]:
    """(partial_o, lse) of one site, at the graph's insertion point."""
    for name in (match.k_weight, match.k_bias, match.v_weight, match.v_bias):
        if name:
            cut_input(graph, name, body)
    open_views(graph, (*match.k_views, *match.v_views), match.kv_heads)
    with made_from(graph, node_named(graph, match.q)):
        q = _query(graph, match, plan, layout)
    slots, visible, page_table = (input_named(graph, "step", n) for n in ("slots", "visible", "page_table"))
    cache = input_named(graph, "cache", f"cache_{plan.site}")
    past = [node_named(graph, n) for n in match.past]
    k, v = (_tokens_first(graph, node_named(graph, n)) for n in match.new)
    with made_from(graph, *past):
        written = named(graph, "visible_now", helix.cache_append.default, cache, page_table, slots, visible, k, v)
        width = match.q_head_dim
        k_cache = named(graph, "k_cache", aten.slice.Tensor, cache, 3, 0, width)
        v_cache = named(graph, "v_cache", aten.slice.Tensor, cache, 3, width, width + match.v_head_dim)
    attended = named(
        graph, "gqa_decode", helix.gqa_decode.default, q, k_cache, v_cache, page_table, written, match.scale
    )
    return getitems(graph, attended, "partial_o", "lse")


def _query(graph: fx.Graph, match: GqaMatch, plan: AttentionPlan, layout: HelixLayout) -> fx.Node:
    """Q [B, T, Ht, Dk]."""
    q = named(graph, "q_heads", aten.transpose.int, node_named(graph, match.q), 1, 2)
    if plan.q_proj == "replicate":
        return q
    source, target = ("world:S(2)", "tpa:S(2)") if layout.tpa > 1 else ("kvp:S(2)", "R")
    return named(graph, "q_gathered", helix.reshard.default, q, source, target, layout.kvp)


def _tokens_first(graph: fx.Graph, new: fx.Node) -> fx.Node:
    """[B, K, T, D] -> [B, T, K, D]."""
    with made_from(graph, new):
        return graph.call_function(aten.transpose.int, (new, 1, 2))
