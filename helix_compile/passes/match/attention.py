"""Find attention sites: anchor on attention, ask where V comes from, and try the one kind of site that this can be.

V is what the layer caches              grouped-query attention   match_gqa.py
V is made from what the layer caches    MLA                       match_mla.py
scores of two products over the cache   MLA, absorbed already     match_absorbed.py by match_mla.py
scores of two products over parts of K  MLA                       match_split_site in match_mla.py
"""

from __future__ import annotations

from torch import fx

from helix_compile.ir.elements import is_cache_update, trace_elements
from helix_compile.ir.graph import aten, calls
from helix_compile.passes.match.anchor import (
    SDPA,
    Anchor,
    SpelledAnchor,
    anchor_of,
    is_spelled,
    softmax_of,
    spelled_anchor,
)
from helix_compile.passes.match.contractions import PRODUCTS
from helix_compile.passes.match.gqa import match_gqa_site
from helix_compile.passes.match.mla import in_order, match_absorbed_site, match_mla_site, match_split_site
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import AttentionMatch, MatchFailure

_PLAIN = ("BHTC", "BHSC", "BHSC", "BHTV", "BHTS")


def find_attention(graph: fx.Graph) -> list[AttentionMatch | MatchFailure]:
    """One entry per attention site of a body, in graph order."""
    sites = calls(graph, SDPA)
    sites += [n for n in calls(graph, aten.matmul.default, aten.bmm.default) if softmax_of(n)]
    spelled = [n for n in calls(graph, *PRODUCTS) if is_spelled(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    results: list[AttentionMatch | MatchFailure] = []
    for node in sorted(dict.fromkeys(sites + spelled), key=order.__getitem__):
        try:
            results.append(_spelled_site(node) if node in spelled else _match_site(anchor_of(node)))
        except Reject as rejection:
            results.append(rejection.failure)
    return results


def _spelled_site(node: fx.Node) -> AttentionMatch:
    """A site of products in any order of dims: scores of one product over K, or absorbed already."""
    spelled = spelled_anchor(node)
    if len(spelled.pairs) > 1:
        _check_mask(spelled)
        v = trace_elements(spelled.v.node)
        if "H" in spelled.v.form and not (len(v.used()) == 1 and is_cache_update(v.used()[0])):
            return match_split_site(spelled, in_order(spelled.v.node, spelled.v.form, "V"))
        return match_absorbed_site(spelled)
    ((q, k),) = spelled.pairs
    anchor = Anchor(
        spelled.node,
        q.node,
        k.node,
        spelled.v.node,
        spelled.mask,
        spelled.scale,
        False,
        q.form,
        k.form,
        spelled.v.form,
        spelled.out_form.replace("C", "V"),
        spelled.form,
    )
    return _match_site(anchor)


def _match_site(anchor: Anchor) -> AttentionMatch:
    _check_mask(anchor)
    node, v = anchor.node, in_order(anchor.v, anchor.v_form, "V")
    used = v.used()
    if len(used) == 1 and is_cache_update(used[0]):
        forms = (anchor.q_form, anchor.k_form, anchor.v_form, anchor.form, anchor.mask_form)
        if forms != _PLAIN:
            raise Reject(
                f"grouped-query attention with dims in another order ({', '.join(forms)}; nearest that works: q, K and V "
                "as [batch, heads, tokens, channels])",
                node,
                2,
            )
        return match_gqa_site(anchor, v)
    if anchor.shared_heads:
        raise Reject("grouped-query attention over a V that is not what the layer caches", node, 2)
    return match_mla_site(anchor, v)


def _check_mask(anchor: Anchor | SpelledAnchor) -> None:
    if anchor.mask is None:
        raise Reject("attention without a mask: a decode step over a cache needs the causal one", anchor.node, 1)
