"""Grouped-query sites -> attention over this rank's slots and KV heads: (partial_o, lse), as shard_attention.py exchanges them.

k, v of the new tokens: this rank's KV heads (k_proj and v_proj are cut over tpa)
cache_append(k, v) at this rank's slots; cache [pages, page_size, K / tpa, Dk + Dv]
partial_o, lse = gqa_decode(q, cache[..., :Dk], cache[..., Dk:])
"""

from __future__ import annotations

from torch import fx

from helix_compile.layout import HelixLayout
from helix_compile.matches import GqaMatch
from helix_compile.ops import helix
from helix_compile.passes.cut_inputs import cut_input, open_views
from helix_compile.passes.fx_edit import aten, getitems, input_named, named, node_named
from helix_compile.plan import AttentionPlan, BodyPlan
from helix_compile.provenance import made_from


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
    slots, visible, page_table = (
        input_named(graph, "step", n) for n in ("slots", "visible", "page_table")
    )
    cache = input_named(graph, "cache", f"cache_{plan.site}")
    past = [node_named(graph, n) for n in match.past]
    k, v = (_tokens_first(graph, node_named(graph, n)) for n in match.new)
    with made_from(graph, *past):
        written = named(
            graph,
            "visible_now",
            helix.cache_append.default,
            cache,
            page_table,
            slots,
            visible,
            k,
            v,
        )
        width = match.q_head_dim
        k_cache = named(graph, "k_cache", aten.slice.Tensor, cache, 3, 0, width)
        v_cache = named(graph, "v_cache", aten.slice.Tensor, cache, 3, width, width + match.v_head_dim)  # fmt: skip
    attended = named(
        graph, "gqa_decode", helix.gqa_decode.default,
        q, k_cache, v_cache, page_table, written, match.scale,
    )  # fmt: skip
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
