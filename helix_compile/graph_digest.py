"""One hash for what a module runs: the same for two graphs that differ in node names and in node order only."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx


def graph_digest(graph: fx.GraphModule) -> str:
    """Hex digest of an outer graph and its bodies: operators, constants, data flow, and the names of their inputs;
    not where it runs.

    Args:
        graph: a stage of a HelixModule, e.g. `compiled.graph`. Weights' values and sizes of caches are no part of it.
    """
    bodies = {
        name: graph_digest(body)
        for name, body in graph.named_children()
        if isinstance(body, fx.GraphModule)
    }
    digests: dict[fx.Node, str] = {}

    def text(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return digests[value]
        if isinstance(value, (list, tuple)):
            return [text(v) for v in value]
        if isinstance(value, dict):
            return {k: text(v) for k, v in sorted(value.items())}
        if isinstance(value, slice):
            return ["slice", text(value.start), text(value.stop), text(value.step)]
        if isinstance(value, torch.device):
            return "device"  # each rank's own: cuda:0 on one is cuda:1 on the next
        return repr(value)

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            what = ["input", *map(str, node.meta.get("input", [node.name]))]
        elif node.op == "call_module":
            name = str(node.target)
            what = ["body", bodies[name]] if name in bodies else ["leaf", name]
        else:
            what = [node.op, _target(node.target)]
        parts = (what, [text(a) for a in node.args], text(node.kwargs))
        digests[node] = hashlib.sha256(repr(parts).encode()).hexdigest()
    output = next(n for n in graph.graph.nodes if n.op == "output")
    return digests[output]


def _target(target: Any) -> str:
    name = getattr(target, "__qualname__", None)
    return str(target) if name is None else f"{getattr(target, '__module__', '')}.{name}"
