"""MLA: the query is absorbed, so that it meets the latent itself.

q -> [q_nope | q_rope];  q_latent = q_nope W_UK
cache_append(latent, k_rope) at this rank's slots
partial_o, lse = mla_decode(q_latent, q_rope, cache)
                 mla_decode_slots(q_latent, q_rope, cache, slots, count)   where an indexer chooses (selection.py)
"""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.ir.graph import aten, getitems, input_named, named, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.passes.rewrite.parts import (
    append_to_cache,
    makes_its_heads,
    query_of_rank,
    reach_of,
    scale_of,
    stored_row,
)
from helix_compile.passes.rewrite.selection import chosen_slots
from helix_compile.plan.helix_plan import AttentionPlan, HelixPlan
from helix_compile.plan.matches import AttentionMatch, Latent


def latent_attention(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> list[fx.Node]:
    """(partial_o [B, T, Ht, R], lse) of one site."""
    kind = match.kind
    assert isinstance(kind, Latent)
    with made_from(graph, node_named(graph, match.q)):
        query = _absorbed_query(graph, match, kind, site, plan)
    cache, page_table, written = append_to_cache(graph, match, site, plan, aten.squeeze.dim, 1)
    scale = scale_of(graph, site.site)
    if match.selection:
        slots, count = chosen_slots(graph, match, site, cache, page_table, written, plan)
        if match.cache.index:
            with made_from(graph, *(node_named(graph, n) for n in (*match.past, *match.shared)[:2])):
                stored = stored_row(graph, match, site, plan)
                cache = named(graph, "latent_cache", aten.slice.Tensor, cache, 2, 0, stored.attended)
                if scale and stored.dtype is torch.uint8:
                    cache = named(graph, "latent_cache_fp8", aten.view.dtype, cache, torch.float8_e4m3fn)
        attended = named(
            graph,
            "mla_decode_slots",
            helix.mla_decode_slots.default,
            *query,
            cache,
            page_table,
            written,
            slots,
            count,
            match.scale,
            **scale,
        )
    else:
        attended = named(
            graph,
            "mla_decode",
            helix.mla_decode.default,
            *(*query, cache, page_table, written, match.scale),
            **{**reach_of(graph, match, site), **scale},
        )
    return getitems(graph, attended, "partial_o", "lse")


def _absorbed_query(
    graph: fx.Graph, match: AttentionMatch, kind: Latent, site: AttentionPlan, plan: HelixPlan
) -> list[fx.Node]:
    """q_latent [B, T, Ht, R] and q_rope [B, T, Ht, r]."""
    q = node_named(graph, match.q)
    of_rope = node_named(graph, kind.q_rope_value) if kind.q_rope_value else q
    q_nope, q_rope = _channels(graph, q, kind.q_nope), _channels(graph, of_rope, kind.q_rope)
    form, order = match.q_form.replace("C", "N").lower(), kind.w_uk.order.replace("d", "n")
    w_uk = input_named(graph, "param", kind.w_uk.name)
    with made_from(graph, node_named(graph, kind.w_uk.product)):
        q_latent = named(graph, "q_latent", aten.einsum.default, f"{form},{order}->bthr", [q_nope, w_uk])
    q_rope = _as_bthc(graph, q_rope, kind.q_rope_form)
    if makes_its_heads(match, site, plan):
        return [q_latent, q_rope]
    packed = query_of_rank(graph, named(graph, "q_packed", aten.cat.default, [q_latent, q_rope], -1), match, site, plan)
    split = graph.call_function(aten.split_with_sizes.default, (packed, [kind.kv_lora_rank, len(kind.q_rope)], -1))
    return getitems(graph, split, "q_latent", "q_rope")


def _as_bthc(graph: fx.Graph, q_rope: fx.Node, form: str) -> fx.Node:
    if form == "BTHC":
        return q_rope
    if form == "BHTC":
        return named(graph, "q_rope", aten.transpose.int, q_rope, 1, 2)
    return named(graph, "q_rope", aten.permute.default, q_rope, [form.index(letter) for letter in "BTHC"])


def _channels(graph: fx.Graph, q: fx.Node, channels: tuple[int, ...]) -> fx.Node:
    """Channels of q [*, *, *, Dk] in this order: one slice a run, joined where there are several."""
    if not channels:
        return graph.call_function(aten.slice.Tensor, (q, 3, 0, 0))
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    parts = [graph.call_function(aten.slice.Tensor, (q, 3, r[0], r[-1] + 1)) for r in runs]
    return parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 3))
