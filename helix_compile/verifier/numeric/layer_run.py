"""One layer on given inputs, by the captured graph in fp64 and by the ranks: every value of both, side by side."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.capture.captured import CapturedGraph, CapturedLayer
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.dataflow import ancestors, evaluate, follow
from helix_compile.ir.graph import (
    LAYER_NUMBER,
    aten,
    calls,
    helix_op,
    input_ref,
    is_call,
    node_named,
    placeholders,
    ring_name,
)
from helix_compile.ir.stage import body_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout
from helix_compile.plan.matches import AttentionMatch, LayerMatch, Selection
from helix_compile.verifier.contract import OTHER_AXIS, coordinate
from helix_compile.verifier.numeric.handed import columns_of, local_slots
from helix_compile.verifier.numeric.indexers import Indexers
from helix_compile.verifier.numeric.reference import (
    INDEXER,
    RecordingInterpreter,
    WidenedIslands,
    blaming_the_original,
    with_textbook_experts,
)
from helix_compile.verifier.numeric.routing import RecordTopK
from helix_compile.verifier.numeric.scratch import Scratch, running


@dataclass(frozen=True)
class LayerInputs:
    """What a layer reads: hidden [B, T, D], mask [B, S + T] and positions [B, T] with padding in front, and per
    site the past (latent [B, 1, S, R] and k_rope [B, 1, S, r], or K and V [B, K, S, *]; an index key [B, S, I] behind
    them). Where an earlier layer has cached them it is S + T of both parts. `handed` are keys [B, T, n] by position that an earlier layer chose, by the name of the input that brings them.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    pasts: tuple[tuple[Tensor, ...], ...]
    handed: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class CapturedReference:
    """The captured graph of the original model, with weights in any dtype.

    Attributes:
        tensors: full name -> weight. fp64 weights: everything is computed in fp64; else in the captured dtype.
    """

    captured: CapturedGraph
    matches: dict[str, LayerMatch]
    tensors: Mapping[str, Tensor]
    wide: bool = True
    graph: fx.GraphModule = field(init=False)

    def __post_init__(self) -> None:
        self.graph = with_textbook_experts(self.captured.graph, self.matches)
        for name, match in self.matches.items():
            for attention in match.attentions:
                if isinstance(attention.selection, Selection):
                    topk_of(body_of(self.graph, name).graph, attention.selection).meta[INDEXER] = True

    def evaluating(self, indexers: Indexers) -> AbstractContextManager[Any]:
        """The modes that the graph is evaluated in; `indexers` choose the keys."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(RecordTopK(None, indexers))
        if self.wide:
            stack.enter_context(WidenedIslands(self.captured.dtype))
        return stack

    def prefix(self, layer: int) -> str:
        """What stands before the names of a layer's parameters."""
        return self._layer(layer).prefix

    def sites(self, layer: int) -> list[int]:
        """Places of a layer's caches."""
        return list(self._layer(layer).caches)

    def _layer(self, index: int) -> CapturedLayer:
        return next(x for x in self.captured.layers if x.index == index)

    def call(self, layer: int) -> fx.Node:
        """The outer graph's call of a layer."""
        nodes = self.graph.graph.nodes
        return next(n for n in nodes if n.op == "call_module" and n.meta["layer"] == layer)

    def layer(
        self,
        layer: int,
        given: LayerInputs,
        indexers: Indexers | None = None,
        cached: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Values of every node of a layer, by name; "output" is the new hidden state.

        Args:
            indexers: of the layer's choices of keys; by default its own.
            cached: node -> what is cached in place of its value.
        """
        call = self.call(layer)
        body = body_of(self.graph, call.target)
        known = self._known(given)
        inputs = []
        indexers = Indexers(given.mask) if indexers is None else indexers
        with self.evaluating(indexers):
            for node, argument in zip(placeholders(body.graph), call.args, strict=True):
                ref = input_ref(node)
                if ref.kind == "hidden":
                    inputs.append(given.hidden)
                elif ref.kind in ("past", "shared"):
                    inputs.append(given.pasts[ref.site][ref.part])
                elif ref.kind == "param":
                    inputs.append(self._param(argument))
                elif ref == LAYER_NUMBER:
                    inputs.append(argument)
                elif node.name in given.handed:
                    inputs.append(columns_of(given.handed[node.name], given.mask).to(node.meta["val"].dtype))
                else:
                    inputs.append(evaluate(argument, known, self._param))
            values: dict[str, Any] = {}

            def record(path: str, node: fx.Node, value: Any) -> None:
                values[node.name] = value

            with blaming_the_original(f"the original's captured layer {layer}, run by itself"):
                out = RecordingInterpreter(body, record, indexers=indexers, given=cached).run(*inputs)
        values["output"] = out[0]
        return values

    def _param(self, node: fx.Node) -> Tensor:
        return self.tensors[input_ref(node).name]

    def _known(self, given: LayerInputs) -> dict[fx.Node, Any]:
        B, T = given.positions.shape
        S = given.mask.shape[1] - T
        dtype = given.hidden.dtype
        by_name = {
            "input_ids": torch.zeros(B, T, dtype=torch.int64),
            "attention_mask": given.mask,
            "position_ids": given.positions.clamp(min=0),
            "past_shape": torch.zeros(B, 1, S, 1, dtype=dtype),
        }
        known: dict[fx.Node, Any] = {}
        for node in placeholders(self.graph.graph):
            kind, name = input_ref(node)
            if kind in ("input", "past") and name in by_name:
                known[node] = by_name[name]
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                break
            if _embeds(node, given.hidden):
                known[node] = _one_stream(given.hidden)  # the tables ask it for its dtype and size only
        return known


def hidden_shape(body: fx.Graph, B: int, T: int) -> tuple[int, ...]:
    """Of what a layer reads: [B, T, D], or [B, T, streams, D]."""
    return (B, T, *map(int, placeholders(body)[0].meta["val"].shape[2:]))


def _one_stream(hidden: Tensor) -> Tensor:
    return hidden if hidden.dim() == 3 else hidden[:, :, 0]


def _embeds(node: fx.Node, hidden: Tensor) -> bool:
    """True for the embedding that hidden states are made from; one table more, for each layer, is as wide as it likes."""
    return is_call(node, aten.embedding.default) and node.meta["val"].shape[-1] == hidden.shape[-1]


def topk_of(graph: fx.Graph, selection: Selection) -> fx.Node:
    """The top-k that makes the indices of a selection."""
    indices = node_named(graph, selection.indices)
    found = ancestors([indices], until=[])
    return next(n for n in reversed(graph.nodes) if n in found and is_call(n, aten.topk.default))


@dataclass
class LayerRun:
    """What the ranks computed: values[rank][node name], and the new hidden state of each rank."""

    values: list[dict[str, Any]]
    outputs: list[Tensor]


def run_layer(scratch: Scratch, layer: int, given: LayerInputs, mask: Tensor) -> LayerRun:
    """Run one layer of the module on its scratch cache (which already holds the past).

    Args:
        mask: [B, T] of the new tokens.
    """
    outer = scratch.graph.graph
    call = next(n for n in outer.nodes if n.op == "call_module" and n.meta["layer"] == layer)
    body = body_of(scratch.graph, call.target)
    step = scratch.known(torch.zeros(mask.shape, dtype=torch.int64), mask)
    values: list[dict[str, Any]] = [{} for _ in scratch.params]

    def record(rank: int, node: fx.Node, value: Any) -> None:
        values[rank][node.name] = value

    with running(scratch.compiled):
        inputs = []
        for rank in range(len(scratch.params)):
            placed = dict(zip(placeholders(outer), scratch.inputs_of(rank, step), strict=True))
            known = dict.fromkeys(_embeddings(outer, given.hidden), _one_stream(given.hidden))
            for node, argument in zip(placeholders(body.graph), call.args, strict=True):
                kind, name = input_ref(node)
                if kind == "chosen":
                    known[argument] = _chosen(scratch, rank, name, given.handed)
                elif kind == "written":  # the earlier layer is not run: its tokens are in the cache
                    handed = [n for n in ancestors([argument], until=[]) if _is_handed(n)]
                    visible = ring_name("visible") if input_ref(node).ring else "visible"
                    known |= dict.fromkeys(handed, _argument(_step(outer, visible), placed, {}))
            # what else is computed before the layers does not see that these are others
            inputs.append([given.hidden, *(_argument(a, placed, known) for a in call.args[1:])])
        returned = scratch.run(body, inputs, record)
    # the hidden state, and behind it what the layer hands on
    outputs = [out[0] if isinstance(out, (tuple, list)) else out for out in returned]
    scratch.lengths = [n + int(k) for n, k in zip(scratch.lengths, mask.sum(dim=1), strict=True)]
    return LayerRun(values, outputs)


def _is_handed(node: fx.Node) -> bool:
    """What a layer hands on besides hidden states."""
    return node.target is operator.getitem and node.args[0].op == "call_module" and node.args[1] > 0


def _step(graph: fx.Graph, name: str) -> fx.Node:
    """An input of layers that the outer graph computes for each step."""
    return next(n for n in graph.nodes if n.meta.get("step") == name)


def _embeddings(outer: fx.Graph, hidden: Tensor) -> list[fx.Node]:
    """Values that are the token embeddings: looked up whole, or summed over the ranks' rows."""
    summed = [
        follow([n], lambda node: [] if is_call(node, WAIT) else node.users)
        for n in outer.nodes
        if helix_op(n) == "embed_rows"
    ]
    whole = [n for n in calls(outer, aten.embedding.default) if _embeds(n, hidden)]
    return [*whole, *(n for found in summed for n in found if is_call(n, WAIT))]


def _chosen(scratch: Scratch, rank: int, name: str, handed: Mapping[str, Tensor]) -> Tensor:
    """A rank's slots, or how many there are, of the keys that are handed in."""
    source, _, what = name.rpartition("_")
    layout, options = scratch.compiled.plan.layout, scratch.compiled.plan.options
    slots, count = local_slots(handed[source], rank % layout.kvp, layout.kvp, options.tokens_per_block, scratch.slots)
    return slots if what == "slots" else count


def _argument(argument: Any, placed: dict[fx.Node, Any], known: dict[fx.Node, Any]) -> Any:
    """What a layer is called with: a parameter, or the cache itself, which it writes; or what is computed before it."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument in placed:
        return placed[argument]
    return evaluate(argument, known, lambda node: placed[node].cpu())


def replicas(parts: list[Tensor], layout: Layout, degrees: HelixLayout) -> list[Tensor]:
    """The whole value as each group of ranks has it: shards joined, sums summed. [] where that has no meaning."""
    if not layout:
        return parts
    if len(layout) != 1:
        return []
    ((axis, placement),) = layout.items()
    groups: dict[int, list[int]] = {}
    other = OTHER_AXIS.get(axis)
    for rank in range(len(parts)):
        key = coordinate(other, rank, degrees) if other else 0
        groups.setdefault(key, []).append(rank)
    if type(placement) is Shard:
        dim = placement.dim
        return [torch.cat([parts[r] for r in ranks], dim=dim) for ranks in groups.values()]
    if type(placement) is Partial:
        return [torch.stack([parts[r].double() for r in ranks]).sum(0) for ranks in groups.values()]
    return []


def attention_output(o_proj: fx.Node, attention: AttentionMatch) -> fx.Node:
    """The node whose value is attention alone: what o_proj reads, or what its gate multiplies."""
    node = o_proj.args[0]
    assert isinstance(node, fx.Node)
    for _ in range(2 + attention.gate.cast if attention.gate else 0):  # o_flat(o_cast(o_gated(o, gate)))
        source = node.args[0]
        node = source if isinstance(source, fx.Node) else node
    return node


def fitted(value: Tensor, expected: Tensor) -> Tensor | None:
    """The value without the zeros that pad its last shards; None if the shapes can't be compared."""
    if value.dim() != expected.dim():
        return None
    for dim, (mine, size) in enumerate(zip(value.shape, expected.shape, strict=True)):
        if mine < size:
            return None
        value = value.narrow(dim, 0, size)
    return value
