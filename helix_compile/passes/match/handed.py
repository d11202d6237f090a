"""What one layer chooses or caches and later ones attend to as well: who hands what to whom."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from helix_compile.capture.captured import CapturedGraph, handed_on, results_of, source_of
from helix_compile.errors import MatchError
from helix_compile.ir.elements import is_cache_update
from helix_compile.ir.graph import input_ref, inputs_of, placeholders
from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.matches import HandedSelection, LayerMatch, Selection


def with_source(captured: CapturedGraph, match: LayerMatch, others: dict[str, LayerMatch]) -> LayerMatch:
    """The match of a body whose handed selections know how many keys were chosen, and whose sites know the cache that they share.

    Args:
        captured: the model.
        match: of one body.
        others: matches of all bodies.

    Raises:
        MatchError: something else than chosen keys, K and V is handed on, or what is handed comes from a layer that chose none.
    """
    graph, layer = captured.bodies[match.body].graph, captured.layers_of(match.body)[0].index
    results = results_of(graph)
    chosen = [a.selection.indices for a in match.attentions if isinstance(a.selection, Selection)]
    for number in handed_on(captured, match.body):
        if results[number].name not in chosen and not is_cache_update(results[number]):
            raise MatchError(
                f"layer {layer}: node `{results[number].name}` ({results[number].target}) is handed to a later layer; expected "
                "hidden states, the keys that an indexer chose, and K and V as they are cached"
            )
    _check_shared(captured, match)
    handed = {a.selection.indices for a in match.attentions if isinstance(a.selection, HandedSelection)}
    top_k: dict[str, int] = {}
    for call in captured.graph.graph.nodes:
        if call.op != "call_module" or call.target != match.body:
            continue
        for placeholder, argument in zip(placeholders(graph), call.args, strict=True):
            source = source_of(argument) if isinstance(argument, fx.Node) else None
            if placeholder.name in handed:
                count = _chosen_by(captured, source, others)
                if count is None or top_k.setdefault(placeholder.name, count) != count:
                    raise MatchError(
                        f"layer {call.meta['layer']}: `{placeholder.name}` says which keys are seen; expected the top-k of "
                        f"an earlier layer's indexer, the same k in every layer (got `{argument}`)"
                    )
            elif source is not None and input_ref(placeholder).kind != "shared":
                kind, name = input_ref(placeholder)
                raise MatchError(
                    f"layer {call.meta['layer']}: {kind} {name} comes from an earlier layer and is read outside of the choice "
                    "of keys; nearest that works: layers that hand on hidden states and chosen keys"
                )
    rows = _rows_shared(captured, match, others)
    attentions = [replace(a, row=rows[site]) if a.shared else a for site, a in enumerate(match.attentions)]
    return replace(
        match,
        attentions=tuple(
            replace(a, selection=replace(a.selection, top_k=top_k[a.selection.indices]))
            if isinstance(a.selection, HandedSelection)
            else a
            for a in attentions
        ),
    )


def _check_shared(captured: CapturedGraph, match: LayerMatch) -> None:
    """Each input that brings what another layer caches is read by a site."""
    read = {name for a in match.attentions for name in a.shared}
    for node in inputs_of(captured.bodies[match.body].graph, "shared"):
        if node.name not in read:
            raise MatchError(
                f"layer {captured.layers_of(match.body)[0].index}: `{node.name}` is what an earlier layer caches, and no attention "
                "reads it; expected K and V of one site each"
            )


def _rows_shared(captured: CapturedGraph, match: LayerMatch, others: dict[str, LayerMatch]) -> dict[int, CacheRow]:
    """Site -> what the layer leaves of a token whose cache it reads; the same for every layer of the body."""
    owner = {place: (x, site) for x in captured.layers for site, place in enumerate(x.own)}
    rows: dict[int, CacheRow] = {}
    for layer in captured.layers_of(match.body):
        for site in range(len(layer.own), len(layer.caches)):
            source, of_source = owner[layer.caches[site]]
            if source.body not in others:
                raise MatchError(
                    f"layer {layer.index}: it reads the cache of layer {source.index}, whose attention is not recognised"
                )
            row = others[source.body].attentions[of_source].cache
            if rows.setdefault(site, row) != row:
                raise MatchError(
                    f"layer {layer.index}: it reads a cache of {row}, other layers with the same graph one of {rows[site]}"
                )
    return rows


def _chosen_by(
    captured: CapturedGraph, source: tuple[fx.Node, int] | None, others: dict[str, LayerMatch]
) -> int | None:
    """K of the selection that made a result of a layer."""
    if source is None or str(source[0].target) not in others:
        return None
    body, number = str(source[0].target), source[1]
    name = results_of(captured.bodies[body].graph)[number].name
    found = (a.selection for a in others[body].attentions if isinstance(a.selection, Selection))
    return next((s.top_k for s in found if s.indices == name), None)
