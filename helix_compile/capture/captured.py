"""What a capture gives: the outer graph and one body for each structurally distinct layer."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from helix_compile.ir.graph import input_ref, placeholders
from helix_compile.ir.leaves import KeptModule, leaves_of
from helix_compile.ir.stage import bodies_of


@dataclass(frozen=True)
class CapturedGraph:
    """A decode step as graphs.

    Attributes:
        graph: outer graph; its call_module nodes are the layers, its submodules the bodies. Placeholders:
            input_ids [B, T], attention_mask [B, S + T], position_ids [B, T], past latents, parameters.
        layers: the layers in order, but for those that stay leaves.
        dtype: the dtype it was captured in; a graph can't be retyped.
        max_positions: the model's own longest sequence, or None.
        vocab_size: number of token ids the embedding has.
        model_name: class name, for reports.
        model: the module the parameters come from; None in a capture without one.
        weights: what they are read from instead, where `model` is on meta and stands for a checkpoint folder.
        notes: what the plan shall say of where the model came from.
        constants: full name -> tensor of what is neither a parameter, a buffer nor an attribute: torch.tensor(1.5) in a
            forward, a tensor in a list.
        limits: of "B", "T" or "S" (what is cached) the smallest and largest that a saved program was exported for.
    """

    graph: fx.GraphModule
    layers: tuple[CapturedLayer, ...]
    dtype: torch.dtype
    max_positions: int | None
    vocab_size: int
    model_name: str
    model: nn.Module | None
    weights: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> list[KeptModule]:
        """What stays the user's own module: whole layers and parts of layers."""
        return leaves_of(self.graph)

    @property
    def all_layers(self) -> list[int]:
        """Numbers of the layers in the order in which they are called, leaves included."""
        return [n.meta["layer"] for n in self.graph.graph.nodes if n.op == "call_module"]

    @property
    def bodies(self) -> dict[str, fx.GraphModule]:
        """Body name -> graph."""
        return bodies_of(self.graph)

    def layers_of(self, body: str) -> list[CapturedLayer]:
        """The layers that `body` computes."""
        return [layer for layer in self.layers if layer.body == body]


def results_of(body: fx.Graph) -> list[fx.Node]:
    """What a captured layer returns besides hidden states and what it caches."""
    output = next(n for n in body.nodes if n.op == "output")
    cached = sum(input_ref(n).kind == "past" for n in placeholders(body))
    return list(output.args[0][1 + cached :])


def handed_on(captured: CapturedGraph, body: str) -> list[int]:
    """Which of results_of() some later layer reads, of any layer that `body` computes."""
    read = set()
    for node in captured.graph.graph.nodes:
        if node.target is operator.getitem and node.args[1] >= 2 and node.args[0].target == body:
            read.add(node.args[1] - 2)
    return sorted(read)


def source_of(argument: fx.Node) -> tuple[fx.Node, int] | None:
    """(a layer's call, number among its results) of what an outer value is, where it is a result of a layer."""
    if argument.target is not operator.getitem or argument.args[1] < 2:
        return None
    call, number = argument.args
    return call, number - 2


def whole_graph(body: fx.GraphModule) -> fx.GraphModule:
    """The outer graph of a model that is one body: its inputs, one call, logits and what is cached."""
    outer = fx.Graph()
    args = []
    for placeholder in placeholders(body.graph):
        kind, name = input_ref(placeholder)
        node = outer.placeholder(placeholder.name)
        kind = "input" if kind in ("hidden", "tensor") else kind
        node.meta = {"input": [kind, name], "val": placeholder.meta["val"]}
        args.append(node)
    call = outer.create_node("call_module", "body_0", tuple(args), name="layers")
    call.meta["layer"] = 0
    out = outer.call_function(operator.getitem, (call, 0))
    outer.output((out, [outer.call_function(operator.getitem, (call, 1))]))
    return fx.GraphModule({"body_0": body}, outer)


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of the model: which body computes it and where its parameters are.

    Attributes:
        index: place in the model, 0-based.
        prefix: what to put before a body's parameter names, e.g. "model.layers.3.".
        body: name of the body, e.g. "body_1".
        caches: places of its cached tensors in the module's list of caches, one per attention site.
        shared: how many of them, the last ones, are an earlier layer's, which this one only reads.
    """

    index: int
    prefix: str
    body: str
    caches: tuple[int, ...]
    shared: int = 0

    @property
    def own(self) -> tuple[int, ...]:
        """Places of what it caches itself."""
        return self.caches[: len(self.caches) - self.shared]
