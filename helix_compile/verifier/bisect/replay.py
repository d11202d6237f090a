"""A step whose logits deviate, again with every value kept: the first value that differs, its layer and node.

Between a module and the original values of one name are compared; between two modules this:

Modules of one plan have the same nodes, and each rank of one holds what that rank of the other holds: they are compared
node by node. Modules of unlike plans share only what every rank holds whole around the layers: embedding, each layer's
output, last norm, logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import InputRef, input_ref, placeholders
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.bisect.walk import (
    Compare,
    Located,
    body_twins,
    first_deviation,
    outer_part,
    outer_twins,
    rel_rmse,
    walk,
    worst,
)
from helix_compile.verifier.numeric import choice_check
from helix_compile.verifier.numeric.indexers import Indexers, SiteChoice
from helix_compile.verifier.numeric.layer_run import CapturedReference
from helix_compile.verifier.numeric.reference import EagerReference, RecordingInterpreter
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.site_terms import empty_past
from helix_compile.verifier.numeric.steps import Batch
from helix_compile.verifier.static.graph import TypedGraph

Values = list[dict[str, Any]]  # per rank, node name -> value


@dataclass(frozen=True)
class Side:
    """One of the two modules: fresh caches, and the layouts of its nodes."""

    scratch: Scratch
    typed: TypedGraph | None

    @property
    def graph(self) -> fx.GraphModule:
        """The outer graph that runs."""
        return self.scratch.graph


def alike(mine: HelixPlan, theirs: HelixPlan) -> bool:
    """Whether a rank of one holds what the same rank of the other holds, edits aside."""
    return (
        mine.layout == theirs.layout
        and mine.options.tokens_per_block == theirs.options.tokens_per_block
        and mine.options.merge == theirs.options.merge
        and [(b.name, b.attentions, b.param_shards) for b in mine.bodies]
        == [(b.name, b.attentions, b.param_shards) for b in theirs.bodies]
    )


def bisect_pair(first: Side, second: Side, steps: list[Batch], failing: int) -> tuple[Located, str] | None:
    """Replay steps[:failing] on both, then compare the values of the failing one.

    Args:
        first, second: fresh, with one seed if their plans are alike.

    Returns:
        the first value that differs and the place of its graph ("layer 3" or "outer graph"); None if there is none.
    """
    for batch in steps[:failing]:
        for side in (first, second):
            side.scratch.step(batch.ids, batch.mask)
    mine, theirs = (_recorded(side.scratch, steps[failing]) for side in (first, second))
    dtype = getattr(torch, first.scratch.compiled.plan.dtype)
    same = alike(first.scratch.compiled.plan, second.scratch.compiled.plan)
    parts = _bodies_too if same else _outer_only
    for place, nodes, compare in parts(first, second, mine, theirs, steps[failing].mask):
        located = walk(nodes, compare, dtype)
        if located is not None:
            node = next(n for n in nodes if n.name == located.node)
            called = node.op == "call_module"
            return located, f"layer {node.meta['layer']}" if called else place
    return None


def _recorded(scratch: Scratch, batch: Batch) -> Recorder:
    recorder = Recorder(len(scratch.params), scratch.graph.graph)
    with suppress(Exception):  # values up to a fault are what is wanted
        scratch.step(batch.ids, batch.mask, recorder)
    return recorder


Part = tuple[str, list[fx.Node], Compare]


def _bodies_too(first: Side, second: Side, mine: Recorder, theirs: Recorder, mask: Tensor) -> Iterator[Part]:
    def compare(nodes: list[fx.Node], others: fx.Graph, a: Values, b: Values) -> Compare:
        twins = {n.name for n in others.nodes}
        known = {n for n in nodes if n.name in twins and _is_own(n)}
        return partial(_by_rank, mine=a, theirs=b, known=known, mask=mask)

    outer = second.graph.graph
    before = outer_part(first.graph.graph, before_layers=True)
    yield "outer graph", before, compare(before, outer, mine.outer, theirs.outer)
    for layer, values in mine.layers.items():
        bodies = [_body(side.graph, layer) for side in (first, second)]
        if None not in bodies and layer in theirs.layers:
            nodes = list(bodies[0].nodes)
            yield f"layer {layer}", nodes, compare(nodes, bodies[1], values, theirs.layers[layer])
    behind = outer_part(first.graph.graph, before_layers=False)
    yield "outer graph", behind, compare(behind, outer, mine.outer, theirs.outer)


def _is_own(node: fx.Node) -> bool:
    """Caches are compared by what is written to them: they hold the whole step when it is over."""
    return input_ref(node).kind != "cache"


def _body(graph: fx.GraphModule, layer: int) -> Any:
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.meta["layer"] == layer]
    return graph.get_submodule(str(calls[0].target)).graph if calls else None


def _outer_only(first: Side, second: Side, mine: Recorder, theirs: Recorder, mask: Tensor) -> Iterator[Part]:
    def whole(side: Side) -> set[str]:
        layouts = side.typed.layouts.get("", {}) if side.typed is not None else {}
        calls = {n.name for n in side.graph.graph.nodes if n.op == "call_module"}
        return {name for name, layout in layouts.items() if layout == {}} | calls

    nodes = [n for n in first.graph.graph.nodes if n.op != "placeholder"]
    shared = whole(first) & whole(second)
    known = {n for n in nodes if n.name in shared}
    # every rank holds the same: rank 0 of the other speaks for all
    spoken = [theirs.outer[0]] * len(mine.outer)
    yield "outer graph", nodes, partial(_by_rank, mine=mine.outer, theirs=spoken, known=known, mask=mask)


def _by_rank(
    node: fx.Node, mine: Values, theirs: Values, known: set[fx.Node], mask: Tensor
) -> tuple[float, int] | None:
    """The largest deviation of a node's value over the ranks, and whose it is."""
    if node not in known:
        return None
    found = []
    for rank, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        value, wanted = a.get(node.name), b.get(node.name)
        if not (_is_number(value) and _is_number(wanted)):
            return None
        found.append((_off(value, wanted, mask), rank))
    return worst(found)


def _is_number(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _off(value: Tensor, wanted: Tensor, mask: Tensor) -> float:
    if value.shape != wanted.shape:
        return float("inf")
    unwritten = value.isnan() & wanted.isnan()  # poisoned memory, or a fault that both have
    return rel_rmse(value.masked_fill(unwritten, 0), wanted.masked_fill(unwritten, 0), mask)


class Recorder:
    """Hook of VirtualWorld.run: values by rank and layer. A layer's nodes come before its call in the outer graph."""

    def __init__(self, ranks: int, outer: fx.Graph):
        self.pending: Values = [{} for _ in range(ranks)]
        self.layers: dict[int, Values] = {}
        self.outer: Values = [{} for _ in range(ranks)]
        self.in_outer = set(outer.nodes)

    def __call__(self, rank: int, node: fx.Node, value: Any) -> None:
        if node not in self.in_outer:
            self.pending[rank][node.name] = value
            return
        if node.op == "call_module":
            place = self.layers.setdefault(node.meta["layer"], [{} for _ in self.outer])
            place[rank], self.pending[rank] = self.pending[rank], {}
        self.outer[rank][node.name] = value


def bisect_step(
    scratch: Scratch,
    reference: EagerReference,
    captured: CapturedReference,
    typed: TypedGraph,
    steps: list[Batch],
    failing: int,
    sources: Mapping[int, int],
) -> tuple[Located | None, int | None, float]:
    """Replay steps[:failing], then compare every value of the failing one. The original attends to the keys that the
    ranks chose.

    Args:
        scratch, reference: fresh.
        captured: the original's graph with the weights of `reference`, in fp64.
        typed: layouts of the stage that failed.
        sources: layer -> the layer that chose keys for it.

    Returns:
        the first value that deviates, its layer (None: in the outer graph), and how far the captured graph's own
        logits are from the model's, over the largest: the graph can only tell the place if this is nothing.
    """
    plan, outer = scratch.compiled.plan, scratch.graph.graph
    sites = choice_check.sites_in_order(scratch.graph)

    def choices(values: Mapping[int, Values], mask: Tensor, before: Sequence[int]) -> _Choices:
        queries = choice_check.Queries(tuple(before), mask, plan.layout, plan.options.tokens_per_block)
        return queries, choice_check.step_choices(sites, values, queries, plan, sources)

    for batch in steps[:failing]:
        before, recorder_of_choices = (
            list(scratch.lengths),
            choice_check.ChoiceRecorder(scratch.graph, len(scratch.params)),
        )
        scratch.step(batch.ids, batch.mask, recorder_of_choices)
        reference.step(batch.ids, batch.mask, told=_told(choices(recorder_of_choices.layers, batch.mask, before)[1]))
    batch, before = steps[failing], list(scratch.lengths)
    recorder = _recorded(scratch, batch)
    queries, results = choices(recorder.layers, batch.mask, before)
    expected_layers, expected_outer, graph_logits, chosen = _captured_step(captured, reference, batch, _told(results))
    logits = reference.step(batch.ids, batch.mask, told=_told(results))
    kept = batch.mask.bool()
    gap = float((graph_logits - logits)[kept].abs().max() / logits[kept].abs().max())
    dtype = getattr(torch, plan.dtype)
    joined: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    own = [(site, c) for site, c in results if site.nodes.chooses]
    for (site, c), original in zip(own, chosen, strict=False):
        compared = choice_check.compare_with_original(c, original, queries, dtype)
        joined.setdefault(site.layer, {}).update(choice_check.joined_values([(site.nodes, c, compared)]))

    def parts() -> Iterator[tuple[int | None, Iterable[fx.Node], Values, dict[str, Tensor], str]]:
        yield None, outer_part(outer, before_layers=True), recorder.outer, outer_twins(expected_outer), ""
        for layer, values in recorder.layers.items():
            name = str(captured.call(layer).target)
            if name in captured.matches:  # a leaf has no nodes
                graph = scratch.graph.get_submodule(name).graph
                twins = body_twins(graph, captured.matches[name], expected_layers[layer])
                yield layer, graph.nodes, values, twins, name
        yield None, outer_part(outer, before_layers=False), recorder.outer, outer_twins(expected_outer), ""

    for layer, nodes, values, twins, name in parts():
        layouts = typed.layouts.get(name, {})
        known = joined.get(layer, {}) if layer is not None else {}
        match = captured.matches.get(name)
        located = first_deviation(nodes, values, twins, layouts, plan.layout, dtype, batch.mask, match, known)
        if located is not None:
            return located, layer, gap
    return None, None, gap


_Choices = tuple[choice_check.Queries, list[tuple[choice_check.Site, choice_check.Chosen]]]


def _told(results: Sequence[tuple[choice_check.Site, choice_check.Chosen]]) -> list[Tensor]:
    """The keys that the original is told to attend to."""
    return [chosen.keys for site, chosen in results if site.nodes.chooses]


def _captured_step(
    captured: CapturedReference, reference: EagerReference, batch: Batch, told: list[Tensor]
) -> tuple[dict[int, dict[str, Any]], dict[str, Any], Tensor, list[SiteChoice]]:
    """Every value of the original's captured graph for a step, on the past that the eager copy has; and its own choices."""
    graph = captured.graph
    B, T = batch.ids.shape
    mask = batch.mask if reference.mask is None else torch.cat([reference.mask, batch.mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]
    inputs: list[Any] = []
    known = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": positions}
    for node in placeholders(graph.graph):
        kind, name = input_ref(node)
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

    indexers = Indexers(mask, told)
    with captured.evaluating(indexers):
        out = RecordingInterpreter(graph, record, indexers=indexers).run(*inputs)
    return layers, outer, out[0], indexers.choices


def _past(captured: CapturedReference, reference: EagerReference, name: str, B: int, S: int) -> Tensor:
    if name == "past_shape":
        return torch.zeros(B, 1, S, 1, dtype=torch.float64)
    ref = InputRef("past", name)
    if S == 0:
        layer = next(x for x in captured.captured.layers if ref.site in x.own)
        match = captured.matches[layer.body].attentions[layer.caches.index(ref.site)]
        return empty_past(match, B, 0)[ref.part].double()
    # transformers has an empty layer where an earlier one's K and V are read
    entry = [x for x in reference.cache.layers if x.keys is not None][ref.site]
    part: Tensor = (entry.keys, entry.values, *([entry.indexer_keys] if ref.part == 2 else []))[ref.part]
    return part
