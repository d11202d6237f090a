"""plan_helix(): matches + options -> HelixPlan. Every decision is made here, and only here.

Sizes come from the matches, never from a config. Bytes follow helix-algorithm section 8, the placement of W_UV its
section 9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import HelixOptions, default_ep
from helix_compile.errors import PlanError
from helix_compile.ir.collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, CollectiveOp
from helix_compile.kernels.exchange import codec_of
from helix_compile.kernels.reference import accumulation_dtype
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import head_padding
from helix_compile.passes.decide.cache_format import cache_decision, kv_bytes_per_token, ring_bytes
from helix_compile.passes.decide.overlap import overlap_decision, parts_of_batch
from helix_compile.passes.decide.padding import check_heads, experts_refusal, padding_decision
from helix_compile.passes.decide.param_shards import (
    attention_shards,
    dense_shards,
    moe_shards,
    params_bytes_per_rank,
    replicated_roles,
)
from helix_compile.passes.decide.selection import candidates_exchange, topk_exchange
from helix_compile.passes.decide.vocabulary import plan_vocabulary
from helix_compile.passes.decide.windows import Site, plan_rings, window_decisions
from helix_compile.passes.match.vocabulary import find_vocabulary
from helix_compile.plan.helix_plan import (
    OF_PARTIALS,
    AttentionPlan,
    BodyPlan,
    Collective,
    Decision,
    FFNPlan,
    HelixPlan,
    OuterPlan,
)
from helix_compile.plan.matches import AttentionMatch, LayerMatch, MoEMatch, Selection

HBM_BYTES_PER_S = 8.0e12  # B200-class, the preset behind the default of v_up


LINK_BYTES_PER_S = 900e9


def plan_helix(captured: CapturedGraph, matches: dict[str, LayerMatch], options: HelixOptions) -> HelixPlan:
    """Decide everything.

    Raises:
        LayoutError: heads, experts or ranks that do not divide, with the numbers.
        PlanError: an option that can have no effect on this model.
    """
    moes = [m for match in matches.values() for m in match.moes]
    layout, ep_decision = _layout(captured, options, moes)
    check_heads(captured, matches, layout, options)
    _check_cut_heads(captured, matches, options)
    attentions = [a for match in matches.values() for a in match.attentions]
    v_up_decision = decide_v_up(attentions, captured.dtype, options)
    v_up = str(v_up_decision.result)
    q_decision = Decision(
        "q_proj",
        "as asked; replicate reads more weights, gather adds one all-gather a layer",
        (("option", options.q_proj),),
        options.q_proj,
    )
    topk_decision = topk_exchange(attentions, layout, options)
    agreed = str(topk_decision.result) if topk_decision else ""
    rings = plan_rings(captured, matches, layout, options)
    bodies = tuple(_plan_body(captured, match, layout, options, v_up, agreed, rings) for match in matches.values())
    cached_in = cache_decision(captured, matches, options, layout)
    kv_bytes, in_rings = (
        kv_bytes_per_token(captured, matches, options, layout, rings),
        ring_bytes(captured, matches, options, layout, rings),
    )
    decisions, notes = [ep_decision, v_up_decision, q_decision], _notes(captured, attentions, layout, options, kv_bytes)
    decisions += [d for d in (topk_decision, overlap_decision(bodies, options), cached_in) if d]
    outer = OuterPlan()
    if options.head == "shard":
        outer, head_decision = plan_vocabulary(find_vocabulary(captured), options, layout, captured.dtype)
        decisions.append(head_decision)
    if options.pad_heads:
        pad_decision, said = padding_decision(captured, matches, bodies, outer, layout, options.cache_dtype)
        decisions.append(pad_decision)
        notes += said
    return HelixPlan(
        model=captured.model_name,
        dtype=str(captured.dtype).removeprefix("torch."),
        layout=layout,
        options=options,
        bodies=bodies,
        decisions=(*decisions, *window_decisions(captured, matches, bodies, layout, options)),
        not_rewritten=replicated_roles(captured, matches, bodies, outer),
        notes=tuple(notes),
        kv_bytes_per_token_per_rank=kv_bytes,
        ring_bytes_per_sequence_per_rank=in_rings,
        params_bytes_per_rank=params_bytes_per_rank(captured, bodies, outer),
        outer=outer,
        leaves=tuple((leaf.name, leaf.reason) for leaf in captured.leaves),
    )


def _layout(captured: CapturedGraph, options: HelixOptions, moes: list[MoEMatch]) -> tuple[HelixLayout, Decision]:
    world_size = options.cp * options.tpa
    experts = math.gcd(*(m.num_experts for m in moes)) if moes else 0
    if options.ep is not None and options.ep > 1 and not moes:
        if leaves := list(dict.fromkeys(leaf.name for leaf in captured.leaves)):
            more = f" and {len(leaves) - 2} more" if leaves[2:] else ""
            raise PlanError(
                f"option ep={options.ep} has no effect: no routed experts were found beside the parts that run whole on every "
                f"rank ({', '.join(leaves[:2])}{more}), and what is in those is not cut; drop ep"
            )
        raise PlanError(f"option ep={options.ep} has no effect: the model has no routed experts")
    ep = default_ep(world_size, experts) if options.ep is None else options.ep
    for moe in moes:
        if moe.num_experts % ep and not options.pad_heads:
            raise experts_refusal(moe.num_experts, ep, world_size)
    rule = "as asked" if options.ep else "largest e with N % e == 0 and E % e == 0; 1 without experts"
    decision = Decision("ep", rule, (("N", world_size), ("E", experts), ("option", options.ep)), ep)
    return HelixLayout(kvp=options.cp, tpa=options.tpa, ep=ep, tpf=world_size // ep), decision


def _check_cut_heads(captured: CapturedGraph, matches: dict[str, LayerMatch], options: HelixOptions) -> None:
    """Q, K and V are cut by heads over tpa, q also where it is gathered: then they must be such that they can be."""
    for name, match in matches.items():
        for uncut in (u for a in match.attentions for u in a.uncut):
            if options.tpa > 1:
                asked, nearest = f"tpa={options.tpa}", "tpa=1, where every rank computes it whole"
            elif options.q_proj == "gather" and uncut.what == "q":
                asked, nearest = 'q_proj="gather"', 'q_proj="replicate"'
            else:
                continue
            raise PlanError(
                f"layer {captured.layers_of(name)[0].index}: {asked} cuts {uncut.what} by heads, but {uncut.reason}, at node "
                f"`{uncut.node}` ({uncut.where or 'no source line'}). nearest that works: {nearest}"
            )


def break_even_tokens(H: int, R: int, V: int, dtype: torch.dtype) -> float:
    """B*: tokens a step at which W_UV [H, V, R] before and after the exchange cost the same; inf where V >= R."""
    if V >= R:
        return math.inf
    read = H * R * V * dtype.itemsize / HBM_BYTES_PER_S
    return read / (H * (R - V) * dtype.itemsize / LINK_BYTES_PER_S)


def decide_v_up(sites: list[AttentionMatch], dtype: torch.dtype, options: HelixOptions) -> Decision:
    """Where W_UV stands.

    Raises:
        PlanError: it is asked for and there is none.
    """
    match = next((a for a in sites if a.kind.v_up), None)
    if match is None:
        if options.v_up != "auto":
            raise PlanError(
                f"option v_up={options.v_up!r} has no effect: no attention of this model has a W_UV (grouped-query "
                'attention caches V itself); drop it or use v_up="auto"'
            )
        return Decision("v_up", "V is cached as it is: there is no W_UV", (), "none")
    R, V = match.kind.partial_width, match.v_head_dim
    even = break_even_tokens(match.num_heads, R, V, dtype)
    inputs = (
        ("R", R),
        ("V", V),
        ("tokens", options.max_batch_size),
        ("B*", None if math.isinf(even) else round(even, 3)),
        ("HBM_TB_s", HBM_BYTES_PER_S / 1e12),
        ("link_GB_s", LINK_BYTES_PER_S / 1e9),
        ("option", options.v_up),
    )
    if options.cp == 1:
        return Decision("v_up", "cp = 1: nothing is exchanged, so there is no before", inputs, "after")
    if options.v_up != "auto":
        return Decision("v_up", "as asked", inputs, options.v_up)
    rule = '"after" if V >= R or max_batch_size <= B*, else "before"'
    return Decision("v_up", rule, inputs, "after" if options.max_batch_size <= even else "before")


def _plan_body(
    captured: CapturedGraph,
    match: LayerMatch,
    layout: HelixLayout,
    options: HelixOptions,
    v_up: str,
    agreed: str,
    rings: Mapping[Site, int],
) -> BodyPlan:
    parts = parts_of_batch(options)
    attentions = tuple(
        AttentionPlan(
            i,
            # what is exchanged decides where W_UV stands: where nothing is, a rank applies that of its own heads
            ("after" if rings.get((match.body, i)) else v_up) if a.kind.v_up else "none",
            a.num_heads,
            a.o_weight,
            a.cache.heads,
            *((a.selection.top_k, agreed) if isinstance(a.selection, Selection) else (0, "")),
            a.window,
            a.chunk,
            a.sinks.name if a.sinks else "",
            _owners(captured, match.body, i) if a.shared else (),
            rings.get((match.body, i), 0),
            1 if rings.get((match.body, i)) else parts,
        )
        for i, a in enumerate(match.attentions)
    )
    shared = {m.shared for m in match.moes}
    dense = (FFNPlan("shared" if f.down in shared else "dense", i, f.width) for i, f in enumerate(match.dense_ffns))
    routed = (FFNPlan("routed", i, m.width, m.num_experts) for i, m in enumerate(match.moes))
    pairs = list(zip(match.attentions, attentions, strict=True))
    shards = [
        *(s for a, p in pairs for s in attention_shards(a, p, options, layout)),
        *(s for f in match.dense_ffns for s in dense_shards(f, layout)),
        *(s for m in match.moes for s in moe_shards(m, layout)),
    ]
    dtype = captured.dtype
    collectives = [
        *(c for a, p in pairs for c in _exchange(a, p, options, layout, dtype)),
        *(_planned(ALL_REDUCE, "world", "FFN output", D * dtype.itemsize, layout) for D in _ffn_outputs(match)),
    ]
    return BodyPlan(
        name=match.body,
        layers=tuple(layer.index for layer in captured.layers_of(match.body)),
        attentions=attentions,
        ffns=(*dense, *routed),
        param_shards=tuple(shards),
        collectives=tuple(c for c in collectives if c.egress_bytes_per_rank_per_token),
    )


def _owners(captured: CapturedGraph, body: str, site: int) -> tuple[int, ...]:
    """The layer whose cache a site reads, of each layer of a body."""
    owner = {place: layer.index for layer in captured.layers for place in layer.own}
    return tuple(owner[layer.caches[site]] for layer in captured.layers_of(body))


def _exchange(
    match: AttentionMatch, plan: AttentionPlan, options: HelixOptions, layout: HelixLayout, dtype: torch.dtype
) -> Iterable[Collective]:
    places = head_padding(match.num_heads, match.cache.heads, layout).places
    H, codec, statistic = places // layout.tpa, codec_of(options), accumulation_dtype(dtype)
    asked, query_width = match.kind.query
    if isinstance(match.selection, Selection):
        yield from candidates_exchange(match.selection, plan.topk_exchange, options, layout)
    width = match.v_head_dim if plan.v_up == "before" else match.kind.partial_width
    summed = _planned(ALL_REDUCE, "world", "attention output", match.hidden_size * dtype.itemsize, layout)
    if plan.ring:
        yield summed
        return
    if options.q_proj == "gather":
        owned = places // layout.world_size
        yield _planned(ALL_GATHER, "kvp", asked, owned * query_width * dtype.itemsize, layout)
    if options.merge == "a2a":
        head_bytes = codec.head_bytes(width, dtype, statistic)
        yield _planned(ALL_TO_ALL, "kvp", OF_PARTIALS[0], H * head_bytes, layout, plan.parts)
    else:
        yield _planned(ALL_GATHER, "kvp", OF_PARTIALS[1], H * statistic.itemsize, layout, plan.parts)
        yield _planned(REDUCE_SCATTER, "kvp", OF_PARTIALS[2], H * width * dtype.itemsize, layout, plan.parts)
    yield summed


def _planned(op: CollectiveOp, axis: str, what: str, nbytes: int, layout: HelixLayout, parts: int = 1) -> Collective:
    """`nbytes`: what a rank passes to the collective for each token."""
    return Collective(op.name, axis, what, op.egress(layout.size(axis), 1) * nbytes, parts=parts)


def _ffn_outputs(match: LayerMatch) -> list[int]:
    """Widths of the FFN sums: a shared expert is added to the routed ones before the one all-reduce."""
    shared = {m.shared for m in match.moes}
    alone = [f.hidden_size for f in match.dense_ffns if f.down not in shared]
    return alone + [m.hidden_size for m in match.moes]


def _notes(
    captured: CapturedGraph,
    attentions: list[AttentionMatch],
    layout: HelixLayout,
    options: HelixOptions,
    kv_bytes: Fraction,
) -> list[str]:
    dtype = str(captured.dtype).removeprefix("torch.")
    notes = [*captured.notes, *options.notes_of_plan(kv_bytes, captured.dtype.itemsize, dtype)]
    if layout.tpa > 1 and not all(a.cache.heads for a in attentions):
        notes.append(f"tpa={layout.tpa}: the latent cache is held {layout.tpa} times (MLA has one KV head)")
    readers = [layer for layer in captured.layers if layer.shared]
    if readers:
        owner = {place: layer.index for layer in captured.layers for place in layer.own}
        sources = sorted({owner[place] for layer in readers for place in layer.caches[len(layer.own) :]})
        notes.append(
            f"{len(readers)} of {len(captured.layers)} layers cache nothing of their own: they read what layers "
            f"{', '.join(map(str, sources))} cache, and add no bytes to the KV cache"
        )
    if captured.max_positions and options.max_seq_len > captured.max_positions:
        notes.append(f"max_seq_len={options.max_seq_len} is beyond the model's own maximum of {captured.max_positions}")
    return notes
