"""Find attention sites: anchor on attention, ask where V comes from, and try the one kind of site that this can be.

V is what the layer caches              grouped-query attention   gqa.py
V is made from what the layer caches    MLA                       mla.py
scores of two products over the cache   MLA, absorbed already     absorbed.py by mla.py
scores of two products over parts of K  MLA                       match_split_site in mla.py
"""

from __future__ import annotations

from torch import fx

from helix_compile.ir.elements import is_cached, trace_elements
from helix_compile.passes.match.anchor import Anchor, anchor_of, ends_attention
from helix_compile.passes.match.gqa import match_gqa_site
from helix_compile.passes.match.mla import in_order, match_absorbed_site, match_mla_site, match_split_site
from helix_compile.passes.match.reject import Reject
from helix_compile.passes.match.selection import with_selection
from helix_compile.plan.matches import AttentionMatch, MatchFailure

_PLAIN = ("BHTC", "BHSC", "BHSC", "BHTV", "BHTS")


def find_attention(graph: fx.Graph) -> list[AttentionMatch | MatchFailure]:
    """One entry per attention site of a body, in graph order."""
    results: list[AttentionMatch | MatchFailure] = []
    for node in graph.nodes:
        if ends_attention(node):
            try:
                results.append(with_selection(graph, _match_site(anchor_of(node))))
            except Reject as rejection:
                results.append(rejection.failure)
    return results


def _match_site(anchor: Anchor) -> AttentionMatch:
    node = anchor.node
    if anchor.mask is None:
        raise Reject("attention without a mask: a decode step over a cache needs the causal one", node, 1)
    used = trace_elements(anchor.v.node).used()
    cached = len(used) == 1 and is_cached(used[0])
    if len(anchor.pairs) > 1:
        if cached or "H" not in anchor.v.form:
            return match_absorbed_site(anchor)
        return match_split_site(anchor, in_order(anchor.v, "V"))
    v = in_order(anchor.v, "V")
    if not cached and anchor.shared_heads:
        raise Reject("grouped-query attention over a V that is not what the layer caches", node, 2)
    if not cached:
        return match_mla_site(anchor, v)
    ((q, k),) = anchor.pairs
    forms = (q.form, k.form, anchor.v.form, anchor.form, anchor.mask_form)
    if forms != _PLAIN:
        raise Reject(
            f"grouped-query attention with dims in another order ({', '.join(forms)}; nearest that works: q, K and V "
            "as [batch, heads, tokens, channels])",
            node,
            2,
        )
    return match_gqa_site(anchor, v)
