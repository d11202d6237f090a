"""Find attention sites: anchor on attention, ask where V comes from, and try the one kind of site that this can be.

V is what the layer caches              grouped-query attention   match_gqa.py
V is made from what the layer caches    MLA                       match_mla.py
"""

from __future__ import annotations

from torch import fx

from helix_compile.matches import MatchFailure, Site
from helix_compile.passes.attention_anchor import SDPA, anchor_of, softmax_of
from helix_compile.passes.fx_edit import aten, calls
from helix_compile.passes.index_provenance import is_cache_update, trace_elements
from helix_compile.passes.match_gqa import match_gqa_site
from helix_compile.passes.match_heads import Reject
from helix_compile.passes.match_mla import match_mla_site


def find_attention(graph: fx.Graph) -> list[Site | MatchFailure]:
    """One entry per attention site of a body, in graph order."""
    sites = calls(graph, SDPA)
    sites += [n for n in calls(graph, aten.matmul.default, aten.bmm.default) if softmax_of(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    results: list[Site | MatchFailure] = []
    for node in sorted(sites, key=order.__getitem__):
        try:
            results.append(_match_site(node))
        except Reject as rejection:
            results.append(rejection.failure)
    return results


def _match_site(node: fx.Node) -> Site:
    anchor = anchor_of(node)
    if anchor.mask is None:
        raise Reject(
            "attention without a mask: a decode step over a cache needs the causal one", node, 1
        )
    v = trace_elements(anchor.v)
    used = v.used()
    if len(used) == 1 and is_cache_update(used[0]):
        return match_gqa_site(anchor, v)
    if anchor.shared_heads:
        raise Reject("grouped-query attention over a V that is not what the layer caches", node, 2)
    return match_mla_site(anchor, v)
