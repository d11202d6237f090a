"""What a rewritten layer hands to later ones, in place of what the captured one does.

indices that an indexer chose      -> this rank's slots and their count
K and V, past and new in one       -> what is visible of the cache once the new tokens are in it; the cache itself is an input
"""

from __future__ import annotations

import operator

from torch import fx

from helix_compile.capture.captured import CapturedGraph, handed_on, results_of
from helix_compile.ir.graph import InputRef, helix_op, input_named, input_ref, node_named, placeholders
from helix_compile.passes.rewrite.parts import handed_names
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import HandedSelection, LayerMatch, Selection

Key = tuple[str, int]  # ("chosen", site) or ("written", site)
_WIDTH = {"chosen": 2, "written": 1}


def _keys(captured: CapturedGraph, match: LayerMatch) -> dict[int, Key]:
    """Of each result that some later layer reads what stands for it. K and V are two results and one key."""
    results = results_of(captured.bodies[match.body].graph)
    sites = {a.selection.indices: i for i, a in enumerate(match.attentions) if isinstance(a.selection, Selection)}
    found: dict[int, Key] = {}
    for number in handed_on(captured, match.body):
        name = results[number].name
        found[number] = ("chosen", sites[name]) if name in sites else ("written", _site_of(results[number]))
    return found


def _site_of(update: fx.Node) -> int:
    """Of cat([past, new])."""
    return input_ref(update.args[0][0]).site


def values_handed_on(graph: fx.Graph, match: LayerMatch, context: PassContext) -> list[fx.Node]:
    """Those of a rewritten body, in the order of _keys()."""
    values: list[fx.Node] = []
    plan = context.plan.body(match.body)
    for what, site in dict.fromkeys(_keys(context.captured, match).values()):
        if what == "chosen":
            values += [node_named(graph, f"chosen_{part}_{site}") for part in ("slots", "count")]
        else:
            cache = input_named(graph, *InputRef.cache(site, bool(plan.attentions[site].ring)))
            values.append(next(n for n in cache.users if helix_op(n) == "cache_append"))
    return values


def hand_on(graph: fx.Graph, context: PassContext, call: fx.Node, handed: dict[fx.Node, list[fx.Node]]) -> None:
    """Read them off a layer's call; `handed`: a result of the captured layer -> what stands for it now."""
    keys = _keys(context.captured, context.matches[str(call.target)])
    places, place = dict[Key, int](), 1
    for key in dict.fromkeys(keys.values()):
        places[key], place = place, place + _WIDTH[key[0]]
    made: dict[Key, list[fx.Node]] = {}
    for old in [u for u in call.users if u.target is operator.getitem and u.args[1] >= 2]:
        key = keys[old.args[1] - 2]
        if key not in made:
            with graph.inserting_after(call):
                made[key] = [
                    graph.call_function(operator.getitem, (call, places[key] + i)) for i in range(_WIDTH[key[0]])
                ]
            for i, value in enumerate(made[key]):
                value.meta = {"val": call.meta["val"][places[key] + i], "layer": call.meta["layer"]}
        handed[old] = made[key]


def handed_to(context: PassContext, call: fx.Node, handed: dict[fx.Node, list[fx.Node]]) -> dict[InputRef, fx.Node]:
    """Inputs of a body that bring what earlier layers hand on -> what that is, for one call."""
    found: dict[InputRef, fx.Node] = {}
    inputs = [p.name for p in placeholders(context.captured.bodies[str(call.target)].graph)]
    for site, attention in enumerate(context.matches[str(call.target)].attentions):
        if isinstance(attention.selection, HandedSelection):
            values = handed[call.args[inputs.index(attention.selection.indices)]]
            found |= {InputRef("chosen", n): v for n, v in zip(handed_names(attention.selection), values, strict=True)}
        if attention.shared:
            ring = bool(context.plan.body(str(call.target)).attentions[site].ring)
            found[InputRef.written(site, ring)] = handed[call.args[inputs.index(attention.shared[0])]][0]
    return found
