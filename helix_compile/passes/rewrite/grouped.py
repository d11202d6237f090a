"""Grouped-query attention: K and V are cached as they are, by KV heads.

k, v of the new tokens: this rank's KV heads (k_proj and v_proj are cut over tpa)
cache_append(k, v) at this rank's slots; cache [pages, page_size, K / tpa, Dk + Dv]; of a ring those that its own query heads read
partial_o, lse = gqa_decode(q, cache[..., :Dk], cache[..., Dk:])
"""

from __future__ import annotations

from torch import fx

from helix_compile.ir.graph import aten, getitems, named, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.passes.rewrite.parts import append_to_cache, query_of_rank, reach_of, scale_of
from helix_compile.plan.helix_plan import AttentionPlan, HelixPlan
from helix_compile.plan.matches import AttentionMatch


def grouped_attention(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> list[fx.Node]:
    """(partial_o [B, T, Ht, Dv], lse) of one site."""
    with made_from(graph, node_named(graph, match.q)):
        q = named(graph, "q_heads", aten.transpose.int, node_named(graph, match.q), 1, 2)
        q = query_of_rank(graph, q, match, site, plan)
    cache, page_table, written = append_to_cache(graph, match, site, plan, aten.transpose.int, 1, 2)
    row = match.cache
    with made_from(graph, *(node_named(graph, n) for n in (*match.past, *match.shared))):
        k_cache = named(graph, "k_cache", aten.slice.Tensor, cache, 3, 0, row.first)
        v_cache = named(graph, "v_cache", aten.slice.Tensor, cache, 3, row.first, row.first + row.second)
    attended = named(
        graph,
        "gqa_decode",
        helix.gqa_decode.default,
        *(q, k_cache, v_cache, page_table, written, match.scale),
        **{**reach_of(graph, match, site), **scale_of(graph, site.site)},
    )
    return getitems(graph, attended, "partial_o", "lse")
