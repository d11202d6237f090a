"""The graph around the layers: one call_module a layer, of its body or of the user's own module."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from helix_compile.capture_body import normalised_module
from helix_compile.capture_layers import LAYER_OP, LayerCall
from helix_compile.capture_leaves import insert_layer
from helix_compile.passes.fx_edit import add_input, placeholders


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of the model: which body computes it and where its parameters are.

    Attributes:
        index: place in the model, 0-based.
        prefix: what to put before a body's parameter names, e.g. "model.layers.3.".
        body: name of the body, e.g. "body_1".
        caches: places of its cached tensors in the module's list of caches, one per attention site.
    """

    index: int
    prefix: str
    body: str
    caches: tuple[int, ...]


OUTER_INPUTS = [
    ("input", "input_ids"),
    ("input", "attention_mask"),
    ("input", "position_ids"),
]


def build_outer(
    program: Any,
    bodies: dict[str, fx.GraphModule],
    captured: list[CapturedLayer],
    calls: dict[int, LayerCall],
    leaves: dict[int, tuple[str, str]],
    config: Any,
) -> fx.GraphModule:
    """The graph around the layers, with one call_module per layer instead of the opaque op."""
    module = normalised_module(program, [*OUTER_INPUTS, ("past", "past_shape")], prefix="model.")
    for name, body in bodies.items():
        module.add_submodule(name, body)
    graph, new_states = module.graph, []
    layers = {layer.index: layer for layer in captured}
    for node in [n for n in graph.nodes if n.target is LAYER_OP]:
        hidden, others, index = node.args
        if index in leaves:
            leaf = insert_layer(module, node, *leaves[index], calls[index], config)
            node.replace_all_uses_with(leaf)
            graph.erase_node(node)
            continue
        layer = layers[index]
        values = dict(zip(calls[index].names, others, strict=True))
        body = bodies[layer.body]
        args = []
        for placeholder in placeholders(body.graph):
            kind, name = placeholder.meta["input"]
            if kind == "hidden":
                args.append(hidden)
            elif kind == "tensor":
                args.append(values[name])
            else:
                full = f"{layer.prefix}{name}" if kind == "param" else _past_name(layer, name)
                args.append(add_input(graph, kind, full, placeholder.meta["val"]))
        with graph.inserting_before(node):
            call = graph.create_node("call_module", layer.body, tuple(args), name=f"layer_{index}")
            call.meta.update({"layer": index, "stack_trace": node.meta.get("stack_trace")})
            out = graph.call_function(operator.getitem, (call, 0))
            states = graph.call_function(operator.getitem, (call, 1))
        out.meta.update({"val": node.meta["val"], "layer": index})
        new_states.append(states)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0][0], new_states),)
    graph.eliminate_dead_code()
    for unused in [n for n in placeholders(graph) if not n.users]:
        graph.erase_node(unused)
    graph.lint()
    module.recompile()
    return module


def _past_name(layer: CapturedLayer, name: str) -> str:
    """past_latent_0 of a body -> past_latent_7 of the model: sites are numbered over all layers."""
    part, _, site = name.rpartition("_")
    return f"{part}_{layer.caches[int(site)]}"
