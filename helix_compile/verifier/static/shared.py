"""Does each layer read its own cache, or that of the layer whose K and V the model shares with it, once they are in it?"""

from __future__ import annotations

import operator

from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.ir.graph import InputRef, helix_op, input_ref, placeholders
from helix_compile.ir.leaves import is_leaf_call
from helix_compile.ir.stage import body_of
from helix_compile.verifier.report import Finding


def check_caches(graph: fx.GraphModule, captured: CapturedGraph) -> list[Finding]:
    """Every layer's caches against those that the capture says, and what is handed on of them against the append to them."""
    findings = []
    layers = {layer.index: layer for layer in captured.layers}
    for call in [n for n in graph.graph.nodes if n.op == "call_module" and not is_leaf_call(graph, n)]:
        layer = layers[call.meta["layer"]]
        for node, argument in zip(placeholders(body_of(graph, call.target).graph), call.args, strict=False):
            ref = input_ref(node)
            if ref.kind not in ("cache", "written") or ref.site >= len(layer.caches):
                continue
            wanted = layer.caches[ref.site]
            where = f"layer {layer.index}, input {ref.name}"
            name = InputRef.cache(wanted, ref.ring).name
            if ref.kind == "cache" and input_ref(argument).name != name:
                owner = next(x.index for x in captured.layers if wanted in x.own)
                findings.append(
                    Finding("HX109", where, input_ref(argument).name, f"{name}, which layer {owner} writes", 4)
                )
            if ref.kind == "written" and (got := _appended_to(graph, argument)) != name:
                findings.append(
                    Finding("HX109", where, f"`{argument}`: {got}", f"what is visible once {name} is appended to", 7)
                )
    return findings


def _appended_to(graph: fx.GraphModule, argument: fx.Node) -> str:
    """The cache whose append an earlier layer hands on as this value."""
    call = argument.args[0] if argument.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.op != "call_module":
        return "nothing that a layer hands on"
    number = argument.args[1]
    body = body_of(graph, call.target).graph
    (returned,) = next(n for n in body.nodes if n.op == "output").args
    value = returned[number] if isinstance(returned, (tuple, list)) else returned
    if helix_op(value) != "cache_append":
        return f"`{value}`, which is no append"
    return input_ref(call.args[placeholders(body).index(value.args[0])]).name
