"""What becomes a rank's share inside a body: parameters take the shard's shape, views forget the head count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.config.options import PAGE_SIZE
from helix_compile.ir.graph import (
    InputRef,
    add_input,
    aten,
    input_named,
    input_ref,
    inputs_of,
    is_call,
    named,
    node_named,
    placeholders,
    ring_name,
)
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import fake_mode_of, open_view
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import HeadPadding
from helix_compile.plan.cache_row import StoredRow, cache_shape, pages_per_sequence
from helix_compile.plan.helix_plan import AttentionPlan, BodyPlan, HelixPlan, OuterPlan, ParamShard
from helix_compile.plan.matches import AttentionMatch, HandedSelection, HeadLinear, HeadRows, LinearPart, UpWeight
from helix_compile.plan.ring import pages_of


def cut_input(graph: fx.Graph, name: str, body: BodyPlan | OuterPlan) -> None:
    """From here on this parameter is the rank's shard: its shape and its layout."""
    node, shard = input_named(graph, "param", name), body.shard(name)
    assert shard is not None, name
    node.meta["val"] = fake_shard(node, shard)
    node.meta["sharded"] = True


def cut_inputs(graph: fx.Graph, parts: Iterable[HeadRows | UpWeight], body: BodyPlan) -> None:
    """The same for each, with an input of its own where other parts may lie in one parameter."""
    for part in parts:
        if part.name != part.param:
            whole = input_named(graph, "param", part.param)
            with made_from(graph, whole):
                add_input(graph, "param", part.name, whole.meta["val"])
        cut_input(graph, part.name, body)


def own_linear(graph: fx.Graph, linear: HeadLinear) -> None:
    """Where one linear makes q and a gate: a linear for one of them, over this rank's part of its rows."""
    if not linear.parts:
        return
    both = node_named(graph, linear.node)
    params = [input_named(graph, "param", rows.name) for rows in linear.params]
    with made_from(graph, both), graph.inserting_before(both):
        own = named(graph, f"{linear.node}_{linear.role}", aten.linear.default, both.args[0], *params)
    for part in linear.parts:
        old = node_named(graph, part.node)
        with made_from(graph, old), graph.inserting_before(old):
            new = _in_form(graph, own, linear, part)
        old.replace_all_uses_with(new)


def _in_form(graph: fx.Graph, own: fx.Node, linear: HeadLinear, part: LinearPart) -> fx.Node:
    """Channels of a part, of what a linear makes [B, T, h * width], in the part's order of dims."""
    whole = part.stop - part.start == linear.width
    if part.form == "BT(HC)" and whole:
        return own
    heads = graph.call_function(aten.unflatten.int, (own, 2, [-1, linear.width]))
    if not whole:
        heads = graph.call_function(aten.slice.Tensor, (heads, 3, part.start, part.stop))
    if part.form == "BT(HC)":
        return graph.call_function(aten.flatten.using_ints, (heads, 2, 3))
    if part.form == "BTHC":
        return heads
    return graph.call_function(aten.permute.default, (heads, ["BTHC".index(letter) for letter in part.form]))


def open_views(graph: fx.Graph, names: tuple[str, ...], heads: int) -> None:
    """Views that write the head count get -1 there: a rank has fewer heads."""
    for name in names:
        view = node_named(graph, name)
        view.args = (view.args[0], open_view(view, heads))


def append_to_cache(
    graph: fx.Graph, match: AttentionMatch, plan: AttentionPlan, whole: HelixPlan, laid_out: Any, *args: int
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Append what the new tokens leave, K and V or latents by `laid_out(part, *args)`: (cache, page table, what is visible then).

    An index key goes behind the rope part, into the same row. Where an earlier layer has appended, nothing is left to do.
    """
    site, ring = plan.site, bool(plan.ring)
    keywords = scale_of(graph, site)
    slots, visible, page_table = (input_named(graph, "step", n) for n in step_names(plan.ring))
    cache = input_named(graph, *InputRef.cache(site, ring))
    if match.shared:
        return cache, page_table, input_named(graph, *InputRef.written(site, ring))
    parts = []
    for part in (node_named(graph, n) for n in match.new[:2]):
        with made_from(graph, part):
            laid = graph.call_function(laid_out, (part, *args))
            parts.append(heads_of_rank(graph, laid, whole.layout) if ring and match.cache.heads else laid)
    for key in (node_named(graph, n) for n in match.new[2:]):
        if cache.meta["val"].dtype is torch.uint8:  # it is not rounded as they are
            keywords["index_key"] = key
            continue
        with made_from(graph, key):
            parts[1] = named(graph, "rope_and_index_key", aten.cat.default, [parts[1], key], -1)
    with made_from(graph, *(node_named(graph, n) for n in match.past)):
        row = (cache, page_table, slots, visible, *parts)
        written = named(graph, "visible_now", helix.cache_append.default, *row, **keywords)
    return cache, page_table, written


def scale_of(graph: fx.Graph, site: int) -> dict[str, fx.Node]:
    """The scale of a site's cache, as the ops take it; nothing where it has none."""
    found = [n for n in inputs_of(graph, "scale") if input_ref(n) == InputRef.scale(site)]
    return {"cache_scale": found[0]} if found else {}


def reach_of(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan) -> dict[str, fx.Node]:
    """The first slots that the queries of a site see, as the attention op takes them; nothing where that is slot 0."""
    name = first_visible_of(match, site)
    return {"first": input_named(graph, "step", name)} if name else {}


def first_visible_of(match: AttentionMatch, site: AttentionPlan) -> str:
    """The step's input that says it; "" where nothing is forgotten."""
    return ring_name(match.first_visible) if site.ring else match.first_visible


def step_names(ring: int) -> tuple[str, str, str]:
    """The step's inputs that are slots, visible slots and page table of a cache; of one that has `ring` pages of a sequence."""
    names = ("slots", "visible", "page_table")
    return (ring_name(names[0]), ring_name(names[1]), ring_name(f"table_{ring}")) if ring else names


def heads_of_rank(graph: fx.Graph, x: fx.Node, layout: HelixLayout) -> fx.Node:
    """Heads of x [B, T, heads of this rank's tpa, *] that this rank's own query heads read, or that these are."""
    rank = add_input(graph, "step", "kvp_rank", rank_example(graph))
    return named(graph, "own_heads", helix.heads_of_rank.default, x, rank, layout.kvp)


def makes_its_heads(match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> bool:
    """Is q made of just the heads that a rank attends with?"""
    return match.cuts_query if site.ring else plan.options.q_proj == "replicate"


def query_of_rank(graph: fx.Graph, q: fx.Node, match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> fx.Node:
    """Q [B, T, heads that a rank makes, *] -> of those that it attends with."""
    if makes_its_heads(match, site, plan):
        return q
    return heads_of_rank(graph, q, plan.layout) if site.ring else gathered_query(graph, q, plan.layout)


def gathered_query(graph: fx.Graph, q: fx.Node, layout: HelixLayout) -> fx.Node:
    """Q [B, T, h, *] of the heads that a rank owns -> of all the heads that it computes."""
    source, target = ("world:S(2)", "tpa:S(2)") if layout.tpa > 1 else ("kvp:S(2)", "R")
    return named(graph, "q_gathered", helix.reshard.default, q, source, target, layout.kvp)


def without_zero_heads(graph: fx.Graph, o: fx.Node, padding: HeadPadding) -> fx.Node:
    """O [B, T, places, *] of all ranks -> [B, T, H, *] of the model's heads, in front of an o_proj that is still whole."""
    if padding.places == padding.heads:
        return o
    if padding.groups == padding.padded_groups == 1:
        return named(graph, "o_heads", aten.slice.Tensor, o, 2, 0, padding.heads)
    o = graph.call_function(aten.unflatten.int, (o, 2, [padding.padded_groups, padding.padded_group]))
    o = graph.call_function(aten.slice.Tensor, (o, 2, 0, padding.groups))
    o = graph.call_function(aten.slice.Tensor, (o, 3, 0, padding.group))
    return named(graph, "o_heads", aten.flatten.using_ints, o, 2, 3)


def behind_zero_heads(o: Any) -> Any:
    """What `without_zero_heads` took them from."""
    while is_call(o, aten.slice.Tensor, aten.unflatten.int, aten.flatten.using_ints):
        o = o.args[0]
    return o


def fake_shard(node: fx.Node, shard: ParamShard) -> Tensor:
    """Value of a parameter placeholder after its cut: what one rank holds."""
    old = node.meta["val"]
    with fake_mode_of(node.graph):
        return torch.empty(shard.shape, dtype=old.dtype, device=old.device)


def sum_over_world(node: fx.Node, layout: HelixLayout) -> fx.Node:
    """Put reshard(P -> R) behind a row-parallel node; the bias of a linear moves behind the sum."""
    if layout.world_size == 1:
        return node
    graph, users = node.graph, list(node.users)
    with made_from(graph, node), graph.inserting_after(node):
        total = named(graph, f"{node.name}_sum", helix.reshard.default, node, "world:P(sum)", "R", layout.world_size)
    result = total
    if is_call(node, aten.linear.default) and len(node.args) > 2 and node.args[2] is not None:
        bias = node.args[2]
        node.args = node.args[:2]
        with made_from(graph, node), graph.inserting_after(total):
            result = graph.call_function(aten.add.Tensor, (total, bias))
    for user in users:
        user.replace_input_with(node, result)
    return result


def step_examples(graph: fx.Graph, plan: HelixPlan, rings: Iterable[int] = ()) -> dict[str, Tensor]:
    """Values that stand for a step's inputs in a body while shapes are propagated; of caches with `rings` pages too (0: not one)."""
    B, T = placeholders(graph)[0].meta["val"].shape[:2]
    pages = pages_per_sequence(plan.options, plan.layout.kvp)
    examples = {}
    for ring in (0, *dict.fromkeys(filter(None, rings))):
        slots, visible, table = step_names(ring)
        examples[slots] = _example(graph, (B, T), torch.int64)
        examples[visible] = _example(graph, (B, T), torch.int32)
        examples[table] = _example(graph, (B, pages_of(plan.options.max_seq_len) if ring else pages), torch.int64)
    return examples


def handed_examples(graph: fx.Graph, selection: HandedSelection, plan: HelixPlan) -> dict[str, Tensor]:
    """The same for the slots that an earlier layer chose, and how many there are."""
    B, T = placeholders(graph)[0].meta["val"].shape[:2]
    most = min(selection.top_k, pages_per_sequence(plan.options, plan.layout.kvp) * PAGE_SIZE)
    slots, count = handed_names(selection)
    return {slots: _example(graph, (B, T, most), torch.int32), count: _example(graph, (B, T), torch.int32)}


def handed_names(selection: HandedSelection) -> tuple[str, str]:
    """What the inputs are called in which slots and count come."""
    return f"{selection.indices}_slots", f"{selection.indices}_count"


def stored_row(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> StoredRow:
    """How a site's cache holds a token."""
    dtype = node_named(graph, (*match.new, *match.shared)[0]).meta["val"].dtype
    return match.cache.stored(plan.options.cache_dtype, dtype, site.kv_parts(plan.layout))


def cache_example(graph: fx.Graph, match: AttentionMatch, site: AttentionPlan, plan: HelixPlan) -> Tensor:
    """The same for one site's cache."""
    stored = stored_row(graph, match, site, plan)
    return _example(graph, cache_shape(stored, plan.options, plan.layout, site.ring), stored.dtype)


def scale_example(graph: fx.Graph) -> Tensor:
    """The same for the scale of a cache in fp8_e4m3."""
    return _example(graph, (), torch.float32)


def rank_example(graph: fx.Graph) -> Tensor:
    """The same for a rank index."""
    return _example(graph, (), torch.int64)


def _example(graph: fx.Graph, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> Tensor:
    with fake_mode_of(graph):
        return torch.empty(shape, dtype=dtype, device=placeholders(graph)[0].meta["val"].device)
