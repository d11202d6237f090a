"""Typing rules of the helix:: ops, of the packing around an exchange, and of collectives.

Between a collective and its wait_tensor a value is Pending; only wait_tensor takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.ir.collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, WAIT
from helix_compile.ir.ops import helix
from helix_compile.ir.sizes import hint_of, shape_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import (
    Chosen,
    Layout,
    Mark,
    PartialSoftmax,
    PartialTopK,
    PerRank,
    format_layout,
    normal_form,
    parse_layout,
)
from helix_compile.passes.typing.aten_rules import Result, Rule, Violation, require


def _shard_index(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    positions, rank = (of(a) for a in node.args[:2])
    require(not positions, f"positions are {format_layout(positions)}")
    if node.args[2] == 1 and not rank:  # of caches that every rank holds by itself
        return ({}, {})
    require(degrees.kvp == 1 or rank == {"kvp": PerRank()}, f"the rank is {format_layout(rank)}")
    require(node.args[2] == degrees.kvp, f"cp is {node.args[2]}, the mesh has {degrees.kvp}")
    return (dict(rank), dict(rank))


def _first_visible(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    of_slots = _shard_index(node, of, degrees)
    assert isinstance(of_slots, tuple)
    return of_slots[0]


def _cache_append(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    cache, _, slots, visible = (of(a) for a in node.args[:4])
    # a cache with heads holds those of the rank's tpa, and so does what is appended
    heads = _heads(degrees) if len(shape_of(node.args[0])) == 4 else {}
    if _alone(visible, cache, degrees):
        heads = _own_heads(degrees) if len(shape_of(node.args[0])) == 4 else {}
    require(slots == visible, "slots and visible are not of one rank")
    require(
        cache == {**visible, **heads},
        f"cache is {format_layout(cache)}, visible {format_layout(visible)}: not of one rank",
    )
    # a fused form takes the norm's weight and RoPE's tables besides
    require(
        all(_as_cached(of(a), heads) for a in node.args[4:6])
        and not any(of(a) for a in (node.args[1], *node.args[6:], *node.kwargs.values()) if isinstance(a, fx.Node)),
        "what is appended must be whole on every rank (K and V: the rank's heads)",
    )
    return dict(visible)


def _mla_decode(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    q_latent, q_rope, cache, table, visible = (of(a) for a in node.args[:5])
    require(q_latent == q_rope, f"q is {format_layout(q_latent)} and {format_layout(q_rope)}")
    alone = _alone(visible, cache, degrees)
    heads = _owned(degrees) if alone else _heads(degrees)
    require(q_latent == heads, f"q is {format_layout(q_latent)}, expected {format_layout(heads)}")
    require(cache == visible and not table, "cache and visible are not of one rank")
    _check_keywords(node, of, visible)
    return (dict(heads), dict(heads)) if alone else _partials(heads, degrees)


def _index_scores(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    q, w, cache, table, visible = (of(a) for a in node.args[:5])
    require(
        not (q or w), "q and the weights of the indexer must be whole on every rank: all must choose by the same scores"
    )
    require(cache == visible and not table, "index cache and visible are not of one rank")
    return {"kvp": PartialTopK()} if degrees.kvp > 1 else {}


def _ranks_scores(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Layout:
    """Scores, what is visible of them, and behind these the rank and the ledger's numbers."""
    scores, visible, rank = of(node.args[0]), of(node.args[1]), of(node.args[-4])
    own: Layout = {"kvp": PartialTopK()} if degrees.kvp > 1 else {}
    require(scores == own, f"scores are {format_layout(scores)}, expected {format_layout(own)}")
    per_rank: Layout = {"kvp": PerRank()} if degrees.kvp > 1 else {}
    require(visible == rank == per_rank, f"visible is {format_layout(visible)}, the rank {format_layout(rank)}")
    require(node.args[-2] == degrees.kvp, f"cp is {node.args[-2]}, the mesh has {degrees.kvp}")
    return own


def _kth_candidate(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """One rank's candidates alone say nothing: the union of local top-ks is another algorithm.

    All ranks' candidates are the same on every rank, or each has those of its own queries (dim 1).
    """
    candidates = of(node.args[0])
    owned = candidates == normal_form({"kvp": Shard(1)}, degrees)
    require(not candidates or owned, f"candidates are {format_layout(candidates)}, expected those of all ranks")
    peers = shape_of(node.args[0])[0]
    require(peers == degrees.kvp, f"candidates of {peers} ranks, kvp has {degrees.kvp}")
    found: Layout = {"kvp": Shard(0)} if candidates else {}
    return (found, dict(found))


def _kth_by_owners(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    candidates, visible = of(node.args[0]), of(node.args[1])
    require(candidates == {"kvp": PartialTopK()}, f"candidates are {format_layout(candidates)}")
    require(visible == {"kvp": PerRank()}, f"visible is {format_layout(visible)}")
    require(node.args[2:4] == ("kvp", degrees.kvp), f"owners over {node.args[2:4]}")
    return ({}, {})


def _rows_for_owners(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    candidates = of(node.args[0])
    require(candidates == {"kvp": PartialTopK()}, f"candidates are {format_layout(candidates)}")
    require(node.args[1] == degrees.kvp, f"rows for {node.args[1]} owners, kvp has {degrees.kvp}")
    return dict(candidates)


def _pack_kth(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    score, position = (of(a) for a in node.args)
    owned = normal_form({"kvp": Shard(0)}, degrees)
    require(score == position == owned, f"k-th keys are {format_layout(score)}, expected {format_layout(owned)}")
    return dict(score)


def _unpack_kth(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Of `visible` the sizes alone are read."""
    require(not of(node.args[0]), f"k-th keys are {format_layout(of(node.args[0]))}, expected those of all owners")
    return ({}, {})


def _select_slots(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    scores = _ranks_scores(node, of, degrees)
    score, position = (of(a) for a in node.args[2:4])
    require(not (score or position), "the k-th key must be the same on every rank")
    out: Layout = {"kvp": Chosen()} if scores else {}
    return (out, dict(out))


def _embed_rows(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Rows of a table that is cut over all ranks, counted from each rank's own first one."""
    ids, rows, first = (of(a) for a in node.args)
    cut: Layout = {"world": Shard(0)} if degrees.world_size > 1 else {}
    own: Layout = {"world": PerRank()} if degrees.world_size > 1 else {}
    require(not ids, f"ids are {format_layout(ids)}, expected whole")
    require(rows == cut, f"the table is {format_layout(rows)}, expected {format_layout(cut)}")
    require(first == own, f"the first row is {format_layout(first)}, expected {format_layout(own)}")
    return {"world": Partial("sum")} if cut else {}


def _best_word(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Candidates of each rank, side by side."""
    logits, first = (of(a) for a in node.args[:2])
    own: Layout = {"world": PerRank()} if degrees.world_size > 1 else {}
    require(
        set(logits.values()) <= {Shard(2)}, f"logits are {format_layout(logits)}, expected words cut over the ranks"
    )
    require(first == own, f"the first word is {format_layout(first)}, expected {format_layout(own)}")
    return dict(logits)


def _best_of_words(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    require(not of(node.args[0]), f"the best of {format_layout(of(node.args[0]))}, expected candidates of all ranks")
    return {}


def _mla_decode_slots(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    q_latent, q_rope, cache, table, visible, slots, count = (of(a) for a in node.args[:7])
    heads = _heads(degrees)
    require(q_latent == q_rope == heads, f"q is {format_layout(q_latent)}, expected {format_layout(heads)}")
    per_rank: Layout = {"kvp": PerRank()} if degrees.kvp > 1 else {}
    chosen: Layout = {"kvp": Chosen()} if degrees.kvp > 1 else {}
    require(cache == visible == per_rank and not table, "cache and visible are not of one rank")
    require(
        slots == count == chosen,
        f"slots are {format_layout(slots)}, count {format_layout(count)}, expected chosen ones",
    )
    _check_keywords(node, of, visible)
    return _partials(heads, degrees)


def _gqa_decode(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Query heads and KV heads are cut over tpa, the slots of a sequence over kvp.

    Or all slots that a query sees are on each rank, and query heads are those that it owns; of KV heads it has what these read.
    """
    q, k_cache, v_cache, table, visible = (of(a) for a in node.args[:5])
    alone = _alone(visible, k_cache, degrees)
    heads = _owned(degrees) if alone else _heads(degrees)
    require(q == heads, f"q is {format_layout(q)}, expected {format_layout(heads)}")
    require(
        k_cache == v_cache == (_own_heads(degrees) if alone else {**visible, **heads}),
        f"caches are {format_layout(k_cache)}, {format_layout(v_cache)}, visible {format_layout(visible)}",
    )
    require(not table, "the page table must be whole on every rank")
    _check_keywords(node, of, visible)
    return (dict(heads), dict(heads)) if alone else _partials(heads, degrees)


def _heads_of_rank(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Heads of a tpa rank -> of its ranks each its own; KV heads are more than one's where they are fewer than these."""
    x, rank = (of(a) for a in node.args[:2])
    require(x == _heads(degrees), f"the value is {format_layout(x)}, expected {format_layout(_heads(degrees))}")
    require(rank == {"kvp": PerRank()}, f"the rank is {format_layout(rank)}")
    require(node.args[2] == degrees.kvp, f"heads for {node.args[2]} ranks, kvp has {degrees.kvp}")
    return _owned(degrees) if hint_of(shape_of(node.args[0])[2]) % degrees.kvp == 0 else _own_heads(degrees)


def _check_keywords(node: fx.Node, of: Callable[[Any], Layout], visible: Layout) -> None:
    """What a query sees on a rank has both its ends from that rank; a scale is the same on all."""
    first, scale = node.kwargs.get("first"), node.kwargs.get("cache_scale")
    require(first is None or of(first) == visible, "the first visible slots and the visible ones are not of one rank")
    require(scale is None or not of(scale), "the scale of the cache must be whole on every rank")


def _alone(visible: Layout, cache: Layout, degrees: HelixLayout) -> bool:
    """Does every rank have by itself all that its queries see?"""
    return degrees.kvp > 1 and not visible and "kvp" not in cache


def _owned(degrees: HelixLayout) -> Layout:
    """Heads that a rank owns after an exchange, or attends with alone."""
    return {"world": Shard(2)} if degrees.world_size > 1 else {}


def _own_heads(degrees: HelixLayout) -> Layout:
    """KV heads that a rank's own query heads read; several ranks may have the same."""
    return {"world": PerRank()} if degrees.world_size > 1 else {}


def _as_cached(layout: Layout, heads: Layout) -> bool:
    """Is it the rank's heads? Those of a shard of all are what each rank has for itself."""
    return layout == heads or ("world" in heads and layout == {"world": Shard(2)})


def _heads(degrees: HelixLayout) -> Layout:
    """The layout of q and of a cache with heads: dim 2 is cut over tpa."""
    if degrees.tpa == 1:
        return {}
    return parse_layout("tpa:S(2)" if degrees.kvp > 1 else "world:S(2)")


def _partials(heads: Layout, degrees: HelixLayout) -> Result:
    out = {**heads, **({"kvp": PartialSoftmax()} if degrees.kvp > 1 else {})}
    return (out, dict(out))


def _exchanged(layout: Layout, degrees: HelixLayout) -> Layout:
    """Each rank owns whole partials of its own heads: dim 3 of [P, B, T, h, ...]."""
    require(layout.get("kvp") == PartialSoftmax(), f"nothing to exchange in {format_layout(layout)}")
    require(set(layout) <= {"kvp", "tpa"}, f"can't exchange {format_layout(layout)}")
    return {"world": Shard(3)}


def _all_to_all_heads(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    partial_o, lse = (of(a) for a in node.args[:2])
    require(partial_o == lse, f"o is {format_layout(partial_o)}, lse {format_layout(lse)}")
    require(node.args[2:] == ("kvp", degrees.kvp), f"exchange over {node.args[2:]}")
    return (_exchanged(partial_o, degrees), _exchanged(lse, degrees))


def _merge_lse(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    parts, lse = (of(a) for a in node.args)
    require(parts == lse == {"world": Shard(3)}, f"merge of {format_layout(parts)}, {format_layout(lse)}")
    peers = shape_of(node.args[0])[0]
    require(peers == degrees.kvp, f"merge of {peers} parts, kvp has {degrees.kvp}")
    return {"world": Shard(2)}


def _total_lse(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    lse_P, peers = of(node.args[0]), shape_of(node.args[0])[0]
    require(all(p == Shard(3) for p in lse_P.values()), f"lse of all peers is {format_layout(lse_P)}")
    require(peers == degrees.kvp, f"lse of {peers} peers, kvp has {degrees.kvp}")
    return {axis: Shard(2) for axis in lse_P}


def _apply_sinks(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """On what is merged, or on the summands of what will be: never on a part of a softmax."""
    o, lse, sinks = (of(a) for a in node.args)
    heads = {axis: p for axis, p in o.items() if p != Partial("sum")}
    require(all(p == Shard(2) for p in heads.values()), f"sinks on {format_layout(o)}, expected merged heads")
    require(lse == heads, f"o is {format_layout(o)}, the lse of all keys {format_layout(lse)}")
    require(
        sinks == {axis: Shard(0) for axis in heads}, f"heads are {format_layout(heads)}, sinks {format_layout(sinks)}"
    )
    return dict(o)


def _rescale_by_lse(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    partial_o, lse, lse_P = (of(a) for a in node.args)
    rest = {a: p for a, p in lse.items() if a != "kvp"}
    require(partial_o == lse and lse.get("kvp") == PartialSoftmax(), f"o {partial_o}, lse {lse}")
    require(lse_P == {a: Shard(3) for a in rest}, f"lse of all peers is {format_layout(lse_P)}")
    return {**rest, "kvp": Partial("sum")}


def _moe_experts(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, ids, weights, gate_up, down, first = (of(a) for a in node.args)
    require(not (x or ids or weights), "tokens and their choices must be whole on every rank")
    require(gate_up == down, f"gate_up {format_layout(gate_up)}, down {format_layout(down)}")
    expected: Layout = {"ep": PerRank()} if degrees.ep > 1 else {}
    require(first == expected, f"first_expert is {format_layout(first)}, expected {format_layout(expected)}")
    require(shape_of(node.args[3])[0] > 0, "no expert on this rank")
    return {"world": Partial("sum")} if degrees.world_size > 1 else {}


def _moe_router(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    require(not any(of(a) for a in node.args[:2]), "logits and bias must be whole on every rank")
    return ({}, {})


def _rope_heads(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """[B, H, T, r] -> [B, T, H, r]: where heads are cut, they still are."""
    q, cos, sin = (of(a) for a in node.args[:3])
    require(not (cos or sin), "the tables of RoPE must be whole on every rank")
    require(all(p == Shard(1) for p in q.values()), f"queries are {format_layout(q)}, expected heads cut")
    return {axis: Shard(2) for axis in q}


def _reshard(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    got, source = of(node.args[0]), normal_form(parse_layout(node.args[1]), degrees)
    stacked = got.get("kvp") in (PartialSoftmax(), PartialTopK()) and node.args[1] == "kvp:S(0)"
    if stacked:  # lse (ag_rs) or candidates of every rank, stacked
        return {a: p for a, p in got.items() if a != "kvp"}
    expected = {**{a: p for a, p in got.items() if a not in source}, **source}
    require(got == expected, f"the value is {format_layout(got)}, the reshard takes {node.args[1]}")
    rest = {a: p for a, p in got.items() if a not in source}
    return {**rest, **parse_layout(node.args[2])}


def _rows(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Other rows, lying as they did; which rows: part_rules.py."""
    return of(node.args[0])


HELIX_RULES: dict[Any, Rule] = {
    helix.shard_index.default: _shard_index,
    helix.first_visible.default: _first_visible,
    helix.embed_rows.default: _embed_rows,
    helix.best_word.default: _best_word,
    helix.top_words.default: _best_word,
    helix.best_of_words.default: _best_of_words,
    helix.cache_append.default: _cache_append,
    helix.mla_decode.default: _mla_decode,
    helix.gqa_decode.default: _gqa_decode,
    helix.heads_of_rank.default: _heads_of_rank,
    helix.index_scores.default: _index_scores,
    helix.topk_candidates.default: _ranks_scores,
    helix.kth_candidate.default: _kth_candidate,
    helix.kth_by_owners.default: _kth_by_owners,
    helix.rows_for_owners.default: _rows_for_owners,
    helix.pack_kth.default: _pack_kth,
    helix.unpack_kth.default: _unpack_kth,
    helix.select_slots.default: _select_slots,
    helix.mla_decode_slots.default: _mla_decode_slots,
    helix.all_to_all_heads.default: _all_to_all_heads,
    helix.merge_lse.default: _merge_lse,
    helix.total_lse.default: _total_lse,
    helix.apply_sinks.default: _apply_sinks,
    helix.rescale_by_lse.default: _rescale_by_lse,
    helix.moe_experts.default: _moe_experts,
    helix.moe_router.default: _moe_router,
    helix.rope_heads.default: _rope_heads,
    helix.reshard.default: _reshard,
    helix.rows_of_part.default: _rows,
    helix.place_rows.default: _rows,
}


PENDING = "pending"  # not a mesh axis: marks the layout that a value will have after its wait


class Pending(Mark):
    """Started and not yet waited for."""


class Packed(Mark):
    """Rows of a packed exchange buffer that belong to this rank's heads."""


def _start(layout: Layout) -> Layout:
    return {**layout, PENDING: Pending()}


def _all_reduce(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (op, axis) = of(node.args[0]), node.args[1:3]
    if op != "sum" or x != {axis: Partial("sum")}:
        raise Violation(f"all_reduce({op}) over {axis} of {format_layout(x)}", "collective")
    return _start({})


def _all_gather(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (size, axis) = of(node.args[0]), node.args[1:3]
    if size != degrees.size(axis):
        raise Violation(f"all_gather of {size} parts over {axis}, which has {degrees.size(axis)}", "collective")
    if x.get("world") is not None and axis == "kvp":
        # heads over N become heads over tpa: the peers that now stand on dim 0 are the major part of what tpa cuts
        shard = x["world"]
        rest: Layout = {"tpa": Shard(0)}
    else:
        shard, rest = x.get(axis), {a: p for a, p in x.items() if a != axis}  # type: ignore[assignment]
    if not isinstance(shard, (Shard, PartialSoftmax, PartialTopK)):
        raise Violation(f"all_gather over {axis} of {format_layout(x)}", "collective")
    return _start(rest)


def _reduce_scatter(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (op, size, axis) = of(node.args[0]), node.args[1:4]
    key = "world" if degrees.size(axis) == degrees.world_size else axis  # the normal form of an axis with all ranks
    if op != "sum" or size != degrees.size(axis) or x.get(key) != Partial("sum"):
        raise Violation(f"reduce_scatter({op}, {size}) over {axis} of {format_layout(x)}", "collective")
    return _start({**x, key: Shard(0)})


def _all_to_all(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, axis = of(node.args[0]), node.args[3]
    if x == {axis: PartialTopK()} and len(node.args[1]) == degrees.size(axis):
        return _start({axis: Shard(1)})  # all peers' candidates for the queries that this rank owns
    if x.get(axis) != PartialSoftmax() or len(node.args[1]) != degrees.size(axis):
        raise Violation(f"all_to_all over {axis} of {format_layout(x)} in {len(node.args[1])} parts", "collective")
    return _start({"world": Packed()})


def _wait(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x = of(node.args[0])
    require(PENDING in x, "wait_tensor on a value that no collective is computing", "pending")
    return {a: p for a, p in x.items() if a != PENDING}


def _pack(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    partial_o, lse = (of(a) for a in node.args[:2])
    if partial_o != lse or lse.get("kvp") != PartialSoftmax() or node.args[2] != degrees.kvp:
        raise Violation(f"pack of {format_layout(partial_o)} and {format_layout(lse)} for {node.args[2]} peers")
    return {"kvp": PartialSoftmax()}


def _unpack(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    if of(node.args[0]) != {"world": Packed()}:
        raise Violation(f"unpack of {format_layout(of(node.args[0]))}")
    return ({"world": Shard(3)}, {"world": Shard(3)})


LOWERED_RULES: dict[Any, Rule] = {
    ALL_REDUCE.target: _all_reduce,
    ALL_GATHER.target: _all_gather,
    REDUCE_SCATTER.target: _reduce_scatter,
    ALL_TO_ALL.target: _all_to_all,
    WAIT: _wait,
    helix.pack_heads.default: _pack,
    helix.unpack_heads.default: _unpack,
}
