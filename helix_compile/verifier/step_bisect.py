"""A step whose logits deviate: replay it on both sides with every value kept, and find the layer and node."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.passes.fx_edit import placeholders
from helix_compile.verifier.bisect import Located, first_deviation, outer_deviation
from helix_compile.verifier.layer_run import CapturedReference
from helix_compile.verifier.numeric import Batch
from helix_compile.verifier.reference import EagerReference, RecordingInterpreter
from helix_compile.verifier.scratch import Scratch
from helix_compile.verifier.site_terms import empty_past
from helix_compile.verifier.static_graph import TypedGraph


class Recorder:
    """Hook of VirtualWorld.run: values by rank and layer. A layer's nodes come before its call in the outer graph."""

    def __init__(self, ranks: int):
        self.pending: list[dict[str, Any]] = [{} for _ in range(ranks)]
        self.layers: dict[int, list[dict[str, Any]]] = {}
        self.outer: list[dict[str, Any]] = [{} for _ in range(ranks)]
        self.ranks = ranks
        self.in_outer: set[fx.Node] = set()

    def __call__(self, rank: int, node: fx.Node, value: Any) -> None:
        if node not in self.in_outer:
            self.pending[rank][node.name] = value
            return
        if node.op == "call_module":
            place = self.layers.setdefault(node.meta["layer"], [{} for _ in range(self.ranks)])
            place[rank], self.pending[rank] = self.pending[rank], {}
        self.outer[rank][node.name] = value


def bisect_step(
    scratch: Scratch,
    reference: EagerReference,
    captured: CapturedReference,
    typed: TypedGraph,
    steps: list[Batch],
    failing: int,
) -> tuple[Located | None, int | None, float]:
    """Replay steps[:failing], then compare every value of the failing one.

    Args:
        scratch, reference: fresh.
        captured: the original's graph with the weights of `reference`, in fp64.
        typed: layouts of the stage that failed.

    Returns:
        the first value that deviates, its layer (None: in the outer graph), and how far the captured graph's own
        logits are from the model's, over the largest: the graph can only tell the place if this is nothing.
    """
    for batch in steps[:failing]:
        scratch.step(batch.ids, batch.mask)
        reference.step(batch.ids, batch.mask)
    batch = steps[failing]
    expected_layers, expected_outer, graph_logits = _captured_step(captured, reference, batch)
    logits = reference.step(batch.ids, batch.mask)
    kept = batch.mask.bool()
    gap = float((graph_logits - logits)[kept].abs().max() / logits[kept].abs().max())
    recorder = Recorder(len(scratch.params))
    recorder.in_outer = set(scratch.graph.graph.nodes)
    with suppress(Exception):  # values up to a fault are what is wanted
        scratch.step(batch.ids, batch.mask, recorder)
    plan = scratch.compiled.plan
    dtype = getattr(torch, plan.dtype)
    located = outer_deviation(
        recorder.outer, expected_outer, typed.layouts.get("", {}), scratch.graph.graph,
        plan.layout, dtype, batch.mask, before_layers=True,
    )  # fmt: skip
    if located is not None:
        return located, None, gap
    for layer, values in recorder.layers.items():
        if str(captured.call(layer).target) not in captured.matches:
            continue  # a leaf has no nodes
        call = captured.call(layer)
        body = scratch.graph.get_submodule(str(call.target))
        located = first_deviation(
            values, expected_layers[layer], typed.layouts.get(str(call.target), {}), body,
            captured.matches[str(call.target)], plan.layout, dtype, batch.mask,
        )  # fmt: skip
        if located is not None:
            return located, layer, gap
    located = outer_deviation(
        recorder.outer, expected_outer, typed.layouts.get("", {}), scratch.graph.graph,
        plan.layout, dtype, batch.mask, before_layers=False,
    )  # fmt: skip
    return located, None, gap


def _captured_step(
    captured: CapturedReference, reference: EagerReference, batch: Batch
) -> tuple[dict[int, dict[str, Any]], dict[str, Any], Tensor]:
    """Every value of the original's captured graph for a step, on the past that the eager copy has."""
    graph = captured.graph
    B, T = batch.ids.shape
    mask = batch.mask if reference.mask is None else torch.cat([reference.mask, batch.mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]
    inputs: list[Any] = []
    known = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": positions}
    for node in placeholders(graph.graph):
        kind, name = node.meta["input"]
        if kind == "param":
            inputs.append(captured.tensors[name])
        elif kind == "past":
            inputs.append(_past(captured, reference, name, B, mask.shape[1] - T))
        else:
            inputs.append(known[name])
    names = {n.name: n.meta["layer"] for n in graph.graph.nodes if n.op == "call_module"}
    layers: dict[int, dict[str, Any]] = {layer: {} for layer in names.values()}
    outer: dict[str, Any] = {}

    def record(path: str, node: fx.Node, value: Any) -> None:
        target = layers[names[path[:-1]]] if path else outer
        target[node.name] = value

    with captured.evaluating():
        out = RecordingInterpreter(graph, record).run(*inputs)
    return layers, outer, out[0]


def _past(
    captured: CapturedReference, reference: EagerReference, name: str, B: int, S: int
) -> Tensor:
    if name == "past_shape":
        return torch.zeros(B, 1, S, 1, dtype=torch.float64)
    part, _, number = name.rpartition("_")
    site = int(number)
    if S == 0:
        layer = next(x for x in captured.captured.layers if site in x.caches)
        match = captured.matches[layer.body].attentions[layer.caches.index(site)]
        return empty_past(match, B, 0)[part.endswith("rope")].double()
    entry = reference.cache.layers[site]
    return entry.values if part.endswith("rope") else entry.keys
