"""Which of this rank's slots the indexer chooses: exactly those that it chooses among all keys of the sequence.

    scores = index_scores(q, w, index keys)                             this rank's slots
    candidates = topk_candidates(scores)                                top-k partial over kvp
    candidates_P = reshard(candidates, stacked kvp:S(0) -> R)
    kth_score, kth_position = kth_candidate(candidates_P)               the same on every rank
                              kth_by_owners(candidates)                 or so, where the plan says "owner"
    slots, count = select_slots(scores, kth_score, kth_position)

A layer that attends to what an earlier one chose gets that one's slots and count: both caches share the ledger.
"""

from __future__ import annotations

from torch import fx

from helix_compile.ir.graph import add_input, aten, getitems, input_named, named, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.passes.rewrite.parts import handed_names, rank_example, stored_row
from helix_compile.plan.helix_plan import AttentionPlan, HelixPlan
from helix_compile.plan.matches import AttentionMatch, HandedSelection


def chosen_slots(
    graph: fx.Graph,
    match: AttentionMatch,
    site: AttentionPlan,
    cache: fx.Node,
    page_table: fx.Node,
    visible: fx.Node,
    plan: HelixPlan,
) -> list[fx.Node]:
    """(slots [B, T, m], count [B, T]) of one site."""
    selection = match.selection
    if isinstance(selection, HandedSelection):
        return [input_named(graph, "chosen", name) for name in handed_names(selection)]
    assert selection is not None
    cp, tokens_per_block = plan.layout.kvp, plan.options.tokens_per_block
    with made_from(graph, node_named(graph, selection.past)):
        stored = stored_row(graph, match, site, plan)
        dtype, start = node_named(graph, match.new[2]).meta["val"].dtype, stored.index_at
        width = selection.width * dtype.itemsize // stored.dtype.itemsize
        keys = named(graph, "index_cache", aten.slice.Tensor, cache, 2, start, start + width)
        if stored.dtype is not dtype:  # bytes
            keys = named(graph, "index_keys", aten.view.dtype, keys, dtype)
    q = _in_order(graph, "index_q", selection.query, selection.query_form, "BTJI")
    w = _in_order(graph, "index_weights", selection.weights, selection.weights_form, "BTJ")
    rank = add_input(graph, "step", "kvp_rank", rank_example(graph))
    with made_from(graph, node_named(graph, selection.indices)):
        scores = named(
            graph, "index_scores", helix.index_scores.default, q, w, keys, page_table, visible, selection.scale
        )
        ledger = (rank, selection.top_k, cp, tokens_per_block)
        best = named(graph, "candidates", helix.topk_candidates.default, scores, visible, *ledger)
        if cp > 1 and plan.topk_exchange == "owner":
            kth = named(graph, "kth", helix.kth_by_owners.default, best, visible, "kvp", cp, selection.top_k)
        else:
            best = graph.call_function(aten.unsqueeze.default, (best, 0))
            if cp > 1:
                best = named(graph, "candidates_P", helix.reshard.default, best, "kvp:S(0)", "R", cp)
            kth = named(graph, "kth_candidate", helix.kth_candidate.default, best, selection.top_k)
        bound = getitems(graph, kth, "kth_score", "kth_position")
        chosen = named(graph, "select_slots", helix.select_slots.default, scores, visible, *bound, *ledger)
        return getitems(graph, chosen, f"chosen_slots_{site.site}", f"chosen_count_{site.site}")


def _in_order(graph: fx.Graph, name: str, source: str, form: str, wanted: str) -> fx.Node:
    """A value whose dims are `form`, dims of one (1) dropped, in the order `wanted`."""
    value = node_named(graph, source)
    with made_from(graph, value):
        for dim in reversed([i for i, letter in enumerate(form) if letter == "1"]):
            value = graph.call_function(aten.squeeze.dim, (value, dim))
        form = form.replace("1", "")
        order = [form.index(letter) for letter in wanted]
        return value if order == sorted(order) else named(graph, name, aten.permute.default, value, order)
