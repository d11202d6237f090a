"""Heads that do not divide over the ranks and experts that do not over ep: refused, or padded with zeros. What that costs.

Why zeros are exact: rows of zeros in q's linear give a query that is finite (checked here), so attention gives a weighted
mean, and -inf with zeros where a shard is empty; W_UV's zero rows or o_proj's zero columns make 0 of it. Experts behind
the last are named by no router. Nothing else of an attention has heads, or the matcher has refused it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import HelixOptions
from helix_compile.errors import LayoutError, PlanError
from helix_compile.ir.dataflow import NotRun, evaluate
from helix_compile.ir.graph import input_ref, is_param, node_named, placeholders, source_line
from helix_compile.ir.sizes import shape_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.passes.decide.param_shards import needed_padding
from helix_compile.passes.decide.selection import OF_CANDIDATES
from helix_compile.passes.decide.vocabulary import LOGITS
from helix_compile.plan.helix_plan import BodyPlan, Decision, OuterPlan, ParamShard, number
from helix_compile.plan.matches import AttentionMatch, Latent, LayerMatch


def check_heads(
    captured: CapturedGraph, matches: dict[str, LayerMatch], layout: HelixLayout, options: HelixOptions
) -> None:
    """Raise LayoutError or PlanError where heads do not divide and are not, or can't be, padded."""
    N = layout.world_size
    for name, match in matches.items():
        where = f"layer {captured.layers_of(name)[0].index}"
        for a in match.attentions:
            padding, H, K = needed_padding(a, layout), a.num_heads, a.cache.heads
            if padding is None:
                continue
            why_not = _not_paddable(captured.bodies[name].graph, a, more_kv=padding.padded_groups > padding.groups)
            if options.pad_heads and why_not:
                raise PlanError(
                    f"{where}: pad_heads=True: {H} heads can't be padded to {padding.places} for cp*tpa = {layout.kvp}*"
                    f"{layout.tpa} = {N} ranks: {why_not}. nearest that works: cp*tpa from {_divisors(H)}"
                )
            if options.pad_heads:
                continue
            offer = f"; or pad_heads=True, {H} -> {padding.places} heads, the new ones zeros" if not why_not else ""
            if H % N:
                raise LayoutError(
                    f"{where}: {H} heads can't be divided over N = cp*tpa = {layout.kvp}*{layout.tpa} = {N} ranks "
                    f"({H} % {N} = {H % N}); choose cp*tpa from {_divisors(H)}{offer}"
                )
            raise PlanError(
                f"{where}: {K} KV heads can't be divided over tpa={layout.tpa} ({K} % {layout.tpa} = {K % layout.tpa}): each "
                f"rank of tpa caches whole KV heads; choose tpa from {_divisors(K)} and cp*tpa from the divisors of {H} "
                f"query heads{offer}"
            )


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _not_paddable(graph: fx.Graph, match: AttentionMatch, more_kv: bool) -> str:
    """Why zero heads would not be harmless; "" where they are."""
    for uncut in match.uncut:
        if uncut.what == "q" or more_kv:
            return f"{uncut.reason}, at node `{uncut.node}` ({uncut.where or 'no source line'})"
    for what, value, linear in _made_of_heads(match, more_kv):
        node, made_by = node_named(graph, value), node_named(graph, linear)
        zeros = torch.zeros(shape_of(made_by), dtype=made_by.meta["val"].dtype)
        try:
            finite = bool(evaluate(node, {made_by: zeros}, _random).isfinite().all())
        except NotRun as stopped:
            node, finite = stopped.node, False
        if not finite:
            return (
                f"{what} of a head of zeros is not finite (a norm without an epsilon?), at node `{node.name}` "
                f"({source_line(node) or 'no source line'})"
            )
    return ""


def _made_of_heads(match: AttentionMatch, more_kv: bool) -> Iterator[tuple[str, str, str]]:
    """(what, node of the value, node of its linear) of all that a zero head passes through."""
    yield "q", match.q, match.q_proj.node
    if isinstance(match.kind, Latent) and match.kind.q_rope_value:
        yield "the rope part of q", match.kind.q_rope_value, match.q_proj.node
    if match.gate and match.gate.linear:
        yield "the gate", match.gate.value, match.gate.linear.node
    if more_kv:
        linears = match.kind.linears * (2 if len(match.kind.linears) == 1 else 1)  # one may make both
        for what, value, linear in zip("KV", match.new[:2], linears, strict=False):
            yield what, value, linear.node


def _random(node: fx.Node) -> Tensor:
    numbers = torch.randn(shape_of(node), generator=torch.Generator().manual_seed(0))
    return numbers.to(node.meta["val"].dtype)


def experts_refusal(experts: int, ep: int, world_size: int) -> LayoutError:
    """What is said where experts do not divide and padding was not asked for."""
    return LayoutError(
        f"{experts} routed experts can't be divided over ep={ep} ({experts} % {ep} = {experts % ep}); use an ep that divides "
        f"both {experts} and {world_size}; or pad_heads=True, {experts} -> {-(-experts // ep) * ep} experts, the new ones "
        "zeros that no token chooses"
    )


@dataclass(frozen=True)
class PaddingCost:
    """What zero heads and experts cost on a rank over an even share of what the model has; all layers together."""

    params_bytes: Fraction = Fraction(0)
    exchange_bytes_per_token: Fraction = Fraction(0)
    kv_bytes_per_token: Fraction = Fraction(0)
    flops_per_token: Fraction = Fraction(0)
    flops_per_token_and_cached_token: Fraction = Fraction(0)

    def __add__(self, other: PaddingCost) -> PaddingCost:
        return PaddingCost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def padding_decision(
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    bodies: tuple[BodyPlan, ...],
    outer: OuterPlan,
    layout: HelixLayout,
    cache_dtype: str,
) -> tuple[Decision, list[str]]:
    """What is padded and what it costs, and the same in words."""
    cost, grown, idle = PaddingCost(), dict[str, None](), set[int]()
    for body in bodies:
        match = matches[body.name]
        cost += _cost(captured, match, body, layout, cache_dtype)
        for plan in body.attentions:
            padding = plan.padding(layout)
            if padding.places > padding.heads:
                grown[f"{padding.heads} -> {padding.places} heads"] = None
                idle |= {r for r, (start, stop) in enumerate(plan.head_ranges(layout)) if start == stop}
            if padding.padded_groups > padding.groups:
                grown[f"{padding.groups} -> {padding.padded_groups} KV heads"] = None
        for ffn in body.ffns:
            if (held := ffn.experts_per_rank(layout) * layout.ep) > ffn.experts:
                grown[f"{ffn.experts} -> {held} experts"] = None
    for shard in outer.param_shards:
        (cut,) = shard.cuts
        if share := cut.share_of_zeros(layout):
            grown[f"{cut.total} -> {cut.width(layout) * layout.world_size} words"] = None
            params = math.prod(shard.shape) * share * captured.dtype.itemsize
            sent = [c.egress_bytes_per_rank_per_token for c in outer.collectives if c.what == LOGITS]
            cost += PaddingCost(params, sum(sent, Fraction(0)) * share if shard is _head_of(outer) else Fraction(0))
    what = ", ".join(grown) or "nothing to pad"
    figures = {name: number(value) for name, value in vars(cost).items()}
    rule = "zeros, so that every rank has as many; cost on a rank over an even share" if grown else "everything divides"
    decision = Decision("pad_heads", rule, tuple(figures.items()) if grown else (), what)
    if not grown:
        return decision, [
            f"pad_heads: heads and experts divide over cp*tpa = {layout.world_size} ranks: nothing is padded"
        ]
    notes = [f"pad_heads: {what}; more on a rank than an even share: {_figures_text(figures)}"]
    if idle:
        notes.append(f"pad_heads: ranks that own zero heads alone in some layer: {', '.join(map(str, sorted(idle)))}")
    return decision, notes


def _head_of(outer: OuterPlan) -> ParamShard:
    """What makes the logits: of embedding and head the last one, one parameter where they are tied."""
    return [shard for shard in outer.param_shards if len(shard.shape) > 1][-1]


def _figures_text(figures: dict[str, Any]) -> str:
    said = (
        ("params_bytes", "bytes of parameters"),
        ("exchange_bytes_per_token", "bytes sent a token"),
        ("kv_bytes_per_token", "bytes of KV cache a token"),
        ("flops_per_token", "flops a token"),
        ("flops_per_token_and_cached_token", "flops a token and token in its cache"),
    )
    return ", ".join(f"{figures[name]:,.10g} {text}" for name, text in said if figures[name])


def _cost(
    captured: CapturedGraph, match: LayerMatch, body: BodyPlan, layout: HelixLayout, cache_dtype: str
) -> PaddingCost:
    itemsizes = {
        input_ref(n).name: n.meta["val"].dtype.itemsize
        for n in placeholders(captured.bodies[body.name].graph)
        if is_param(n)
    }
    params = flops = exchange = kv = attended = Fraction(0)
    for shard, share in _with_zeros(match, body, layout):
        zeros = math.prod(shard.shape) * share
        params += zeros * itemsizes[shard.source]
        if len(shard.shape) > 1 and shard.cuts[0].axis != "ep":  # an expert that nobody chooses computes nothing
            flops += 2 * zeros
    by_heads = [c for c in body.collectives if c.axis == "kvp" and c.what not in OF_CANDIDATES]
    sent = [c.egress_bytes_per_rank_per_token for c in by_heads]
    each = len(sent) // max(1, len(body.attentions))  # sites exchange alike, one after the other
    for site, (attention, plan) in enumerate(zip(match.attentions, body.attentions, strict=True)):
        padding, row = plan.padding(layout), attention.cache
        width = attention.kind.query[1] + attention.kind.partial_width
        attended += Fraction(2 * (padding.places - padding.heads) * width, layout.tpa)
        more_kv = Fraction(padding.padded_groups - padding.groups, layout.world_size)
        kv += more_kv * (row.first + row.second) * row.stored(cache_dtype, captured.dtype, layout.tpa).dtype.itemsize
        exchange += sum(sent[site * each : (site + 1) * each]) * (1 - Fraction(padding.heads, padding.places))
    one = (params, exchange, kv, flops, attended)
    return PaddingCost(*(value * len(body.layers) for value in one))


def _with_zeros(match: LayerMatch, body: BodyPlan, layout: HelixLayout) -> Iterator[tuple[ParamShard, Fraction]]:
    """Shards with zero heads or experts, and the share of these. Zeros of an FFN's width are no matter of this option."""
    heads = {part.name for a in match.attentions for _, part in a.cuts} | {a.o_weight for a in match.attentions}
    for a in match.attentions:
        heads |= {part.name for part in a.gate.linear.params} if a.gate and a.gate.linear else set()
    for shard in body.param_shards:
        cut = shard.cuts[0]
        if shard.name in heads or cut.axis == "ep":
            share = cut.share_of_zeros(layout)
            if share:
                yield shard, share
