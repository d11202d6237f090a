"""Keys that one layer chooses and later ones attend to as well: who hands what to whom."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from helix_compile.capture.captured import CapturedGraph, handed_on, results_of, source_of
from helix_compile.errors import MatchError
from helix_compile.ir.graph import input_ref, placeholders
from helix_compile.plan.matches import HandedSelection, LayerMatch, Selection


def with_source(captured: CapturedGraph, match: LayerMatch, others: dict[str, LayerMatch]) -> LayerMatch:
    """The match of a body whose handed selections know how many keys were chosen.

    Args:
        captured: the model.
        match: of one body.
        others: matches of all bodies.

    Raises:
        MatchError: something else than chosen keys is handed on, or what is handed comes from a layer that chose none.
    """
    graph, layer = captured.bodies[match.body].graph, captured.layers_of(match.body)[0].index
    results = results_of(graph)
    chosen = [a.selection.indices for a in match.attentions if isinstance(a.selection, Selection)]
    for number in handed_on(captured, match.body):
        if results[number].name not in chosen:
            raise MatchError(
                f"layer {layer}: node `{results[number].name}` ({results[number].target}) is handed to a later layer; expected "
                "hidden states, and the keys that an indexer chose"
            )
    handed = {a.selection.indices for a in match.attentions if isinstance(a.selection, HandedSelection)}
    top_k: dict[str, int] = {}
    for call in captured.graph.graph.nodes:
        if call.op != "call_module" or call.target != match.body:
            continue
        for placeholder, argument in zip(placeholders(graph), call.args, strict=True):
            source = source_of(captured, argument) if isinstance(argument, fx.Node) else None
            if placeholder.name in handed:
                count = _chosen_by(captured, source, others)
                if count is None or top_k.setdefault(placeholder.name, count) != count:
                    raise MatchError(
                        f"layer {call.meta['layer']}: `{placeholder.name}` says which keys are seen; expected the top-k of "
                        f"an earlier layer's indexer, the same k in every layer (got `{argument}`)"
                    )
            elif source is not None:
                kind, name = input_ref(placeholder)
                raise MatchError(
                    f"layer {call.meta['layer']}: {kind} {name} comes from an earlier layer and is read outside of the choice "
                    "of keys; nearest that works: layers that hand on hidden states and chosen keys"
                )
    return replace(
        match,
        attentions=tuple(
            replace(a, selection=replace(a.selection, top_k=top_k[a.selection.indices]))
            if isinstance(a.selection, HandedSelection)
            else a
            for a in match.attentions
        ),
    )


def _chosen_by(captured: CapturedGraph, source: tuple[str, int] | None, others: dict[str, LayerMatch]) -> int | None:
    """K of the selection that made a result of a layer."""
    if source is None or source[0] not in others:
        return None
    body, number = source
    name = results_of(captured.bodies[body].graph)[number].name
    found = (a.selection for a in others[body].attentions if isinstance(a.selection, Selection))
    return next((s.top_k for s in found if s.indices == name), None)
