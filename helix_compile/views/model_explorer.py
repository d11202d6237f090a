"""model_explorer.json: before and after as two graphs, for Google's Model Explorer.

    pip install ai-edge-model-explorer; model-explorer model_explorer.json

A body that computes many layers is drawn in full in its first layer ("layers/3/mlp/gate"); every later layer is one
node that names the body, so that 61 layers open at once. What the viewer's format demands and does not say: fields
may be empty but never absent, the whole has a label, a namespace has no leading slash, and a node may only point at nodes that exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from helix_compile.ir.graph import placeholders
from helix_compile.ir.stage import body_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.views.bodies import body_views
from helix_compile.views.build_view import build_view, first_stages
from helix_compile.views.folding import fold
from helix_compile.views.graph_view import GraphView, NodeView

_STYLES = {
    "collective": {"backgroundColor": "#b8500c", "textColor": "#ffffff"},
    "helix": {"backgroundColor": "#e8f1f8", "borderColor": "#3a7ca8"},
}


def format_model_explorer(plan: HelixPlan, stages: Mapping[str, fx.GraphModule]) -> str:
    """Both graphs as the text of one file."""
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    bodies = body_views(plan, stages, runs=False)
    made = first_stages(stages, None)
    graphs = []
    for moment, stage in (("before", first), ("after", last)):
        outer = build_view(stage.graph, "outer", first_stage=made, runs=False)
        inner = {b.plan.name: b.before if moment == "before" else b.after for b in bodies}
        nodes = _model(outer, inner, _calls(stage, list(inner)))
        graphs.append({"id": f"{plan.model} {moment}", "nodes": nodes})
    return json.dumps({"label": plan.model, "graphs": graphs}, separators=(",", ":"))


@dataclass(frozen=True)
class _Call:
    """One layer: its number, its body, and for each input of the body the outer value that it gets."""

    layer: int
    body: str
    inputs: dict[str, str]


def _calls(stage: fx.GraphModule, bodies: list[str]) -> dict[str, _Call]:
    folded = fold(stage.graph)
    found: dict[str, _Call] = {}
    for node in stage.graph.nodes:
        if node.op == "call_module" and node.target in bodies:
            given = zip(placeholders(body_of(stage, node.target).graph), node.args, strict=True)
            inputs = {p.name: folded.root(a).name for p, a in given if isinstance(a, fx.Node)}
            found[node.name] = _Call(len(found), str(node.target), inputs)
    return found


def _model(outer: GraphView, bodies: dict[str, GraphView], calls: dict[str, _Call]) -> list[dict[str, Any]]:
    """The outer graph, each body unfolded at its first call."""
    nodes: list[dict[str, Any]] = []
    ids: dict[str, str] = {}  # an unfolded call is known by its body's last node
    drawn: set[str] = set()
    sources = _sources(outer)
    for node in outer.nodes:
        call = calls.get(node.name)
        if call is not None and call.body not in drawn:
            drawn.add(call.body)
            body, prefix = bodies[call.body], f"layers/{call.layer}"
            nodes += _unfolded(body, prefix, {k: ids.get(v, v) for k, v in call.inputs.items()})
            ids[node.name] = f"{prefix}/{body.nodes[-1].name}"
            continue
        readers = {c.layer for c in calls.values() if node.name in c.inputs.values()}
        # a cache stands in the one layer that reads it: 61 of them side by side would hide the rest
        own = call.layer if call else readers.pop() if len(readers) == 1 and node.kind == "cache" else None
        namespace = "" if own is None else f"layers/{own}"
        known = [ids.get(s, s) for s in sources.get(node.name, [])]
        nodes.append(_node(node, node.name, namespace, known))
    return nodes


def _unfolded(body: GraphView, prefix: str, inputs: dict[str, str]) -> list[dict[str, Any]]:
    """A body's nodes under a namespace; its inputs come from what the call passes."""
    sources = _sources(body)
    nodes = []
    for node in body.nodes:
        module = node.module.replace(".", "/")
        namespace = f"{prefix}/{module}" if module else prefix
        if node.name in inputs:
            known = [inputs[node.name]]
        else:
            known = [f"{prefix}/{s}" for s in sources.get(node.name, [])]
        nodes.append(_node(node, f"{prefix}/{node.name}", namespace, known))
    return nodes


def _sources(view: GraphView) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for edge in view.edges:
        found.setdefault(edge.target, []).append(edge.source)
    return found


def _node(node: NodeView, name: str, namespace: str, sources: list[str]) -> dict[str, Any]:
    attributes = {
        "op": node.op,
        "stage": node.stage,
        "source": node.source,
        "from": ", ".join(node.origin),
        "parameters": ", ".join(f"{p.name} {p.value.shape}" for p in node.params),
        "bytes sent per rank and token": "" if node.egress is None else f"{node.egress:,.0f}",
    }
    made: dict[str, Any] = {
        "id": name,
        "label": node.title,
        "namespace": namespace,
        "attrs": [{"key": k, "value": v} for k, v in attributes.items() if v],
        "incomingEdges": [
            {"sourceNodeId": s, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)} for i, s in enumerate(sources)
        ],
        "outputsMetadata": [
            {
                "id": str(i),
                "attrs": [
                    {"key": "shape", "value": f"{v.dtype} {v.shape}"},
                    {"key": "layout", "value": v.layout_text},
                    {"key": "bytes", "value": v.bytes},
                ],
            }
            for i, v in enumerate(node.outputs)
        ],
    }
    if node.kind in _STYLES:
        made["style"] = _STYLES[node.kind]
    return made
