"""Run every matcher on every body. An attention site that is not matched is an error with the closest reason."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import MatchError
from helix_compile.ir.elements import is_cache_update, is_layout_op
from helix_compile.ir.graph import PARTS, InputRef, input_ref, is_param, node_named, set_input
from helix_compile.passes.match.attention import find_attention
from helix_compile.passes.match.context import check_context
from helix_compile.passes.match.ffn import find_dense_ffns, find_moes
from helix_compile.passes.match.handed import with_source
from helix_compile.passes.match.mask import with_reach
from helix_compile.passes.match.selection import check_scores
from helix_compile.plan.matches import AttentionMatch, LayerMatch, MatchFailure, MoEMatch, UpWeight


def match_layers(captured: CapturedGraph, max_seq_len: int, keep_experts: bool = False) -> dict[str, LayerMatch]:
    """Body name -> what was found in it; with `keep_experts`, experts that no matcher takes stay whole on every rank.

    Raises:
        MatchError: a body whose attention is neither MLA nor grouped-query, with the layer, node, source line and closest reason.
    """
    matches, failures = match_bodies(captured, max_seq_len, keep_experts)
    for error in failures.values():
        raise error
    return matches


def match_bodies(
    captured: CapturedGraph, max_seq_len: int, keep_experts: bool = False
) -> tuple[dict[str, LayerMatch], dict[str, MatchError]]:
    """Body name -> what was found in it, or why it is not recognised."""
    matches: dict[str, LayerMatch] = {}
    failures: dict[str, MatchError] = {}
    for name in captured.bodies:
        try:
            with torch.device("cpu"):  # elements are traced by numbers, whatever a caller's default device is
                matches[name] = _match_body(captured, name, max_seq_len, keep_experts)
        except MatchError as error:
            failures[name] = error
    # a body may compute layers before and behind those whose choice it is handed
    for name, match in list(matches.items()):
        try:
            matches[name] = with_source(captured, match, matches)
        except MatchError as error:
            failures[name] = error
            del matches[name]
    return matches, failures


def _match_body(captured: CapturedGraph, body: str, max_seq_len: int, keep_experts: bool) -> LayerMatch:
    graph = captured.bodies[body].graph
    attentions = find_attention(graph)
    matched = [a for a in attentions if not isinstance(a, MatchFailure)]
    failures = [a for a in attentions if isinstance(a, MatchFailure)]
    layers = captured.layers_of(body)
    if failures or not matched:
        raise _no_attention(captured, body, failures, len(matched))
    cached = len(layers[0].caches)
    if len(matched) != cached:
        raise MatchError(f"layer {layers[0].index}: {cached} cached attentions but {len(matched)} sites found")
    matched = [with_reach(captured, body, match, max_seq_len) for match in matched]
    for match in matched:
        check_scores(captured, body, match, max_seq_len)
    check_context(captured, body, matched)
    _name_pasts(graph, matched)
    moes = find_moes(graph)
    for failure in moes:
        if isinstance(failure, MatchFailure):
            raise MatchError(
                f"layer {layers[0].index}: routed experts at node `{failure.node}` ({failure.where}) "
                f"not recognised: {failure.reason}"
            )
    found = tuple(m for m in moes if isinstance(m, MoEMatch))
    layer_match = LayerMatch(body, tuple(matched), tuple(find_dense_ffns(graph)), found)
    _check_disjoint(layer_match, graph)
    if not keep_experts:
        _check_complete(layer_match, graph, layers[0].index)
    return layer_match


def _name_pasts(graph: fx.Graph, matched: list[AttentionMatch]) -> None:
    """past_latent_0, past_rope_0, ...: in a saved program only a match tells which past is which, and of which site."""
    for site, match in enumerate(matched):
        for part, name in zip(PARTS, match.past, strict=False):
            set_input(node_named(graph, name), InputRef.past(part, site))
        for node in (node_named(graph, name) for name in match.shared):
            if input_ref(node).site != site:  # places of caches go by it
                raise MatchError(
                    f"{node.name}: a site that reads another layer's cache stands before one with a cache of its own"
                )


_KEEP_HINT = '\n  nearest that works: unmatched="keep" leaves such layers as they are, if others match'


def _no_attention(captured: CapturedGraph, body: str, failures: list[MatchFailure], matched: int) -> MatchError:
    layers = captured.layers_of(body)
    where = f"layer {layers[0].index}" + (f" (and {len(layers) - 1} like it)" if layers[1:] else "")
    if not failures:
        updates = sum(is_cache_update(n) for n in captured.bodies[body].graph.nodes)
        return MatchError(
            f"{where}: no MLA or grouped-query attention found.\n"
            f"  closest: no attention op at all in {len(captured.bodies[body].graph.nodes)} nodes "
            f"({updates} cache updates)\n  expected scaled_dot_product_attention or matmul(softmax(...), v)"
        )
    closest = max(failures, key=lambda f: f.depth)
    return MatchError(
        f"{where} of {captured.model_name}: no MLA or grouped-query attention found"
        + (f" at {len(failures)} of {len(failures) + matched} sites" if matched else "")
        + f".\n  closest: {closest.reason}\n  at node `{closest.node}` ({closest.where})\n"
        "  expected K and V expanded from one cached latent, plus one shared rope part (DeepSeek-V3 style), or cached K and "
        "V, each head repeated for a group of query heads (Llama style)" + _KEEP_HINT
    )


def _check_disjoint(match: LayerMatch, graph: fx.Graph) -> None:
    """Each weight is cut by one rule only."""
    ups = [part for a in match.attentions for _, part in a.cuts if isinstance(part, UpWeight)]
    of_ups = dict.fromkeys(up.param for up in ups)
    names = [n for a in match.attentions for n in a.cut_weights]
    names += [a.sinks.name for a in match.attentions if a.sinks]
    # a linear may make both q and the gate, of rows of its own
    names += [a.gate.linear.weight for a in match.attentions if a.gate and a.gate.linear and not a.gate.linear.role]
    names += [n for f in match.dense_ffns for n in (f.gate_weight, f.up_weight, f.down_weight)]
    names += [n for m in match.moes for n in (m.gate_up, m.down)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise MatchError(f"{match.body}: parameters matched in two roles: {', '.join(twice)}")
    by_name = {input_ref(n).name: n for n in graph.nodes if is_param(n)}
    shared = [n for n in names if len(by_name[n].users) > 1 and n not in of_ups and not _is_expert(n, match)]
    expanders = {up.product for up in ups}
    shared += [n for n in of_ups if not _readers(by_name[n]) <= expanders]
    if shared:
        raise MatchError(f"{match.body}: parameters used twice can't be cut: {', '.join(shared)}")


def _readers(weight: fx.Node) -> set[str]:
    """Names of what reads a weight, or a view of it."""
    found: set[str] = set()
    for user in weight.users:
        found |= _readers(user) if is_layout_op(user) else {user.name}
    return found


def _is_expert(name: str, match: LayerMatch) -> bool:
    return any(name in (m.gate_up, m.down) for m in match.moes)


def _check_complete(match: LayerMatch, graph: fx.Graph, layer: int) -> None:
    """Expert weights that no matcher took would silently stay whole on every rank: refuse."""
    taken = {n for m in match.moes for n in (m.gate_up, m.down)}
    taken |= {n for a in match.attentions for n in a.cut_weights}
    for node in graph.nodes:
        if is_param(node) and node.meta["val"].dim() == 3 and input_ref(node).name not in taken:
            users = ", ".join(f"`{u.name}` ({u.target})" for u in node.users)
            raise MatchError(
                f"layer {layer}: {node.meta['input'][1]} {list(node.meta['val'].shape)} looks like expert weights, "
                f"but no routed experts were recognised around {users}; expected transformers' grouped_mm or "
                'batched_mm form with silu. nearest that works: unmatched="keep", which leaves them whole on every rank'
            )
