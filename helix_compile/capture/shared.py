"""Layers whose attention reads what an earlier layer cached: which of their inputs bring it, and whose it is.

An input is such a one where every layer of its body is handed cat([past, new]) of an earlier layer for it. Its kind is then
"shared" in place of "tensor", and the layer's list of caches has the earlier layer's behind its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from helix_compile.capture.captured import CapturedLayer, results_of, source_of
from helix_compile.errors import CaptureError
from helix_compile.ir.elements import is_cache_update
from helix_compile.ir.graph import InputRef, input_ref, inputs_of, placeholders, set_input
from helix_compile.ir.leaves import is_leaf_call
from helix_compile.ir.stage import bodies_of, body_of

Place = tuple[int, int]  # (which cache, which of PARTS)


def with_shared(graph: fx.GraphModule, layers: Sequence[CapturedLayer]) -> tuple[CapturedLayer, ...]:
    """The layers, each with the caches of others that it reads; the bodies' inputs are marked.

    Raises:
        CaptureError: layers of one body that would share in different ways.
    """
    places = {layer.index: layer.caches for layer in layers}
    found: dict[str, dict[int, dict[str, Place]]] = {}  # body -> layer -> input -> whose cache
    for call in [n for n in graph.graph.nodes if n.op == "call_module" and not is_leaf_call(graph, n)]:
        inputs = placeholders(body_of(graph, call.target).graph)
        of_layer = found.setdefault(str(call.target), {}).setdefault(call.meta["layer"], {})
        for node, argument in zip(inputs, call.args, strict=True):
            if input_ref(node).kind in ("tensor", "shared") and (place := _place(graph, argument, places)) is not None:
                of_layer[node.name] = place
    shared: dict[int, tuple[int, ...]] = {}
    for name, body in bodies_of(graph).items():
        shared |= _marked(name, body.graph, found.get(name, {}))
    return tuple(
        replace(layer, caches=(*layer.caches, *shared.get(layer.index, ())), shared=len(shared.get(layer.index, ())))
        for layer in layers
    )


def _place(graph: fx.GraphModule, argument: Any, places: dict[int, tuple[int, ...]]) -> Place | None:
    """Where what an earlier layer caches and hands on lies; None for any other value."""
    source = source_of(argument) if isinstance(argument, fx.Node) else None
    if source is None:
        return None
    call, number = source
    result = results_of(body_of(graph, call.target).graph)[number]
    past = input_ref(result.args[0][0]) if is_cache_update(result) else None
    if past is None or past.kind != "past" or result.meta["val"].dim() != 4:
        return None
    return places[call.meta["layer"]][past.site], past.part


def _marked(name: str, body: fx.Graph, found: dict[int, dict[str, Place]]) -> dict[int, tuple[int, ...]]:
    """Layer -> the caches of others that it reads, in the order of sites; the inputs are marked."""
    own = len({input_ref(n).site for n in inputs_of(body, "past")})
    shared: dict[int, tuple[int, ...]] = {}
    forms = set()
    for layer, of_layer in found.items():
        caches = tuple(dict.fromkeys(cache for cache, _ in of_layer.values()))
        shared[layer] = caches
        forms.add(tuple((node, own + caches.index(cache), part) for node, (cache, part) in of_layer.items()))
    if len(forms) > 1:
        raise CaptureError(
            f"capture: layers {sorted(found)} have one graph ({name}) but read the caches of other layers in "
            f"{len(forms)} ways; expected K and V of one earlier layer each, or none of them"
        )
    by_name = {n.name: n for n in placeholders(body)}
    for node, site, part in next(iter(forms), ()):
        set_input(by_name[node], InputRef.shared(part, site))
    return shared
