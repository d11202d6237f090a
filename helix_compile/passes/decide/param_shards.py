"""Which part of which parameter a rank holds: ParamShard for every role, and the bytes they add up to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import HelixOptions
from helix_compile.ir.dataflow import follow
from helix_compile.ir.graph import aten, input_ref, is_call, is_param, placeholders
from helix_compile.ir.leaves import leaf_bytes
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import HeadPadding, head_padding
from helix_compile.passes.match.heads import linears_before
from helix_compile.passes.match.reject import is_quantised
from helix_compile.plan.helix_plan import AttentionPlan, BodyPlan, Cut, OuterPlan, ParamShard
from helix_compile.plan.matches import AttentionMatch, DenseFFNMatch, LayerMatch, MoEMatch, Selection


def attention_shards(
    match: AttentionMatch, plan: AttentionPlan, options: HelixOptions, layout: HelixLayout
) -> Iterable[ParamShard]:
    """What makes the query by query heads, what makes K and V by theirs; gate and o_proj by the heads a rank owns.

    Sinks act on what is merged: on the heads that a rank owns, or before parts are summed on those that it computes. Where every
    rank holds the last tokens it makes the query of its own heads alone, as far as q can be cut.
    """
    H, V, D = match.num_heads, match.v_head_dim, match.hidden_size
    padding = needed_padding(match, layout)
    axes = {
        "q": "world" if options.q_proj == "gather" or (plan.ring and match.cuts_query) else "tpa",
        "kv": "tpa",
        "v_up": "world" if plan.v_up == "after" else "tpa",
    }
    # KV heads are padded at the end, as any cut is
    yield from (part.shard(axes[side], layout, padding if side != "kv" else None) for side, part in match.cuts)
    if match.sinks:
        yield match.sinks.shard("tpa" if options.merge == "ag_rs" and not plan.ring else "world", layout, padding)
    if match.gate and match.gate.linear:
        yield from (rows.shard("world", layout, padding) for rows in match.gate.linear.params)
    yield _cut(match.o_weight, (D, H * V), 1, "world", layout, V, padding)


def needed_padding(match: AttentionMatch, layout: HelixLayout) -> HeadPadding | None:
    """Where zero heads lie between the query heads; None where these divide."""
    padding = head_padding(match.num_heads, match.cache.heads, layout)
    return padding if padding.places > padding.heads else None


def _cut(
    name: str,
    shape: tuple[int, ...],
    dim: int,
    axis: str,
    layout: HelixLayout,
    width: int | None = None,
    padding: HeadPadding | None = None,
) -> ParamShard:
    """A parameter cut along one dim: between heads of `width`, or (None) anywhere."""
    head = () if width is None else (width,)
    cut = Cut(dim, axis, shape[dim] // (width or 1), padding)
    before, after, local = shape[:dim], shape[dim + 1 :], cut.width(layout) * (width or 1)
    view = (*before, cut.total, *head, *after)
    return ParamShard(name, name, shape, view, (cut,), (*before, local, *after), f"{axis}:S({dim})")


def dense_shards(match: DenseFFNMatch, layout: HelixLayout) -> Iterable[ParamShard]:
    """Gate and up by rows, down by columns, over all ranks."""
    F, D_in, D = match.width, match.input_size, match.hidden_size
    for name in (match.gate_weight, match.up_weight):
        yield _cut(name, (F, D_in), 0, "world", layout)
    for bias in (match.gate_bias, match.up_bias):
        if bias:
            yield _cut(bias, (F,), 0, "world", layout)
    yield _cut(match.down_weight, (D, F), 1, "world", layout)


def moe_shards(match: MoEMatch, layout: HelixLayout) -> Iterable[ParamShard]:
    """Experts over ep, behind the last such that no token chooses; within an expert each half of gate_up by rows and down by columns over tpf."""
    E, F, D = match.num_experts, match.width, match.hidden_size
    e, f = -(-E // layout.ep), -(-F // layout.tpf)
    cuts, cut = (Cut(0, "ep", E), Cut(2, "tpf", F)), "ep:S(0), tpf:S(2)"
    yield ParamShard(match.gate_up, match.gate_up, (E, 2 * F, D), (E, 2, F, D), cuts, (e, 2, f, D), cut)
    yield ParamShard(match.down, match.down, (E, D, F), (E, D, F), cuts, (e, D, f), cut)


def params_bytes_per_rank(captured: CapturedGraph, bodies: tuple[BodyPlan, ...], outside: OuterPlan) -> int:
    """Bytes of parameters that one rank holds: its shards with padding, and what is replicated."""
    outer = (n for n in placeholders(captured.graph.graph) if is_param(n))
    in_a_layer = lambda node: any(user.op == "call_module" for user in node.users)  # noqa: E731
    total = leaf_bytes(captured.graph) + sum(
        _bytes(n) if (shard := outside.shard(input_ref(n).name)) is None else _shard_bytes(n, shard)
        for n in outer
        if not in_a_layer(n)
    )
    for plan in bodies:
        for node in filter(is_param, placeholders(captured.bodies[plan.name].graph)):
            shards = [s for s in plan.param_shards if s.source == input_ref(node).name]
            held = sum(math.prod(s.shape) for s in shards) * node.meta["val"].dtype.itemsize if shards else _bytes(node)
            total += held * len(plan.layers)
    return total


def _shard_bytes(node: fx.Node, shard: ParamShard) -> int:
    return math.prod(shard.shape) * int(node.meta["val"].dtype.itemsize)


def _bytes(node: fx.Node) -> int:
    return node.meta["val"].numel() * node.meta["val"].dtype.itemsize


def replicated_roles(
    captured: CapturedGraph, matches: dict[str, LayerMatch], bodies: tuple[BodyPlan, ...], outside: OuterPlan
) -> tuple[tuple[str, str], ...]:
    """What stays as it was on every rank, and why: (what, reason). A linear in no pattern is told by its name."""
    outer = captured.graph.graph
    found: dict[str, str] = {}
    tables = [n.args[0] for n in outer.nodes if is_call(n, aten.embedding.default)]
    if any(outside.shard(input_ref(table).name) is None for table in tables):
        found["embedding"] = "one row a token; every rank needs the hidden state"
    for node in (n for n in placeholders(outer) if is_param(n)):
        for user in node.users:
            if is_call(user, aten.mul.Tensor, aten._to_copy.default):
                found["norms"] = _NORMS
            elif is_call(user, aten.linear.default) and outside.shard(input_ref(node).name) is None:
                found["head"] = "the logits are wanted on every rank; head='shard' cuts it by rows of the vocabulary"
    for plan in bodies:
        graph = captured.bodies[plan.name].graph
        cut = {s.source for s in plan.param_shards}
        latents = _latent_projections(graph, matches[plan.name])
        indexers = _indexer_projections(graph, matches[plan.name])
        for node in (n for n in placeholders(graph) if is_param(n)):
            name = input_ref(node).name
            if is_quantised(node):
                dtype = str(node.meta["val"].dtype).removeprefix("torch.")
                role = "quantised " + re.sub(r"\d+", "*", name)
                found[role] = f"{dtype}, made wide in the forward: every rank computes it whole"
            elif name not in cut and node.meta["val"].dim() == 3:
                role = "experts " + re.sub(r"\d+", "*", name)
                found[role] = "in no pattern that is rewritten: every rank holds and computes all of them"
            elif name not in cut:
                for user in node.users:
                    _classify(node, user, latents, indexers, found)
    return tuple(found.items())


_NORMS = "work on the whole hidden state, which every rank holds"


def _latent_projections(graph: fx.Graph, match: LayerMatch) -> set[fx.Node]:
    """The linears that q's projection and the cached latent come from."""
    by_name = {n.name: n for n in graph.nodes}
    found: set[fx.Node] = set()
    for site in match.attentions:
        found.update(linears_before([by_name[site.q_proj.node].args[0], *(by_name[name] for name in site.new[:2])]))
    return found


def _indexer_projections(graph: fx.Graph, match: LayerMatch) -> set[fx.Node]:
    """The linears that an indexer's q, weights and keys come from."""
    own = [a.selection for a in match.attentions if isinstance(a.selection, Selection)]
    names = {name for selection in own for name in (selection.query, selection.weights, selection.new)}
    return set(linears_before([n for n in graph.nodes if n.name in names]))


def _classify(
    param: fx.Node, user: fx.Node, latents: set[fx.Node], indexers: set[fx.Node], found: dict[str, str]
) -> None:
    if is_call(user, aten._to_copy.default):
        for next_user in user.users:
            _classify(param, next_user, latents, indexers, found)
    elif is_call(user, aten.mul.Tensor):
        found["norms"] = _NORMS
    elif is_call(user, aten.linear.default) and user in latents:
        found["latent projections"] = "q_a and kv_a: every rank needs the whole latent"
    elif is_call(user, aten.linear.default) and user in indexers:
        found["indexer"] = "q, weights and keys: every rank must choose by the same scores"
    elif is_call(user, aten.linear.default) and _feeds_topk(user):
        found["router"] = "every rank needs every token's choice, exactly as the original makes it"
    elif is_call(user, aten.linear.default) and user.args[1] is not param:
        found["biases of summed outputs"] = "added once, behind the sum over ranks"
    elif is_call(user, aten.linear.default):
        name = re.sub(r"\d+", "*", input_ref(param).name)
        after = ", ".join(sorted({str(u.target) for u in user.users}))
        found[f"linear {name}"] = (
            f"in no pattern that is rewritten (its result goes to {after}): every rank computes it whole"
        )


def _feeds_topk(node: fx.Node) -> bool:
    behind = follow([node], lambda n: [u for u in n.users if not is_call(u, aten.linear.default)])
    return any(is_call(n, aten.topk.default) for n in behind)
