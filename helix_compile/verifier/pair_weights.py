"""Weights for two compiled modules of one model that make faults matter: the same edits on what either holds."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.capture import CapturedGraph, CapturedLayer
from helix_compile.module import HelixModule
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.passes.match_layers import match_layers
from helix_compile.verifier.conditioning import Edits, sharpening
from helix_compile.verifier.layer_run import CapturedReference

# spread of scores in 16 bits, where both sides round and nothing tells how much of it is the model's own: two legal
# plans of a four-layer model were 0.04 of the largest logit apart at 2, and 0.11 at the 6 that a single module gets
PAIR_SPREAD = 2.0


def shared_edits(modules: tuple[HelixModule, HelixModule], seed: int) -> Edits | None:
    """Edits by full parameter name, measured on the original weights of the first module that has them.

    None: neither has them (both were reloaded).
    """
    source = next((m for m in modules if m.facts.originals and "captured" in m.stages), None)
    if source is None:
        return None
    captured = captured_of(source)
    whole = {n: _wide(t) for n, t in source.facts.originals.items()}
    matches = match_layers(captured, source.plan.options.max_seq_len)
    spread = PAIR_SPREAD if captured.dtype.itemsize == 2 else None
    return sharpening(CapturedReference(captured, matches, whole), seed, spread)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float64) if tensor.is_floating_point() else tensor.cpu()


def captured_of(compiled: HelixModule) -> CapturedGraph:
    """The captured graph that a module was made from, put together again from its first stage."""
    graph = compiled.stages["captured"]
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    return CapturedGraph(
        graph=graph,
        layers=tuple(_layer(graph, call) for call in calls),
        dtype=getattr(torch, compiled.plan.dtype),
        max_positions=None,
        vocab_size=compiled.facts.vocab_size,
        model_name=compiled.plan.model,
        model=None,
    )


def _layer(graph: fx.GraphModule, call: fx.Node) -> CapturedLayer:
    """A layer's prefix and caches, read from what its call is given."""
    body = graph.get_submodule(str(call.target))
    assert isinstance(body, fx.GraphModule)
    prefix, sites = "", []
    for node, argument in zip(placeholders(body.graph), call.args, strict=True):
        assert isinstance(argument, fx.Node)
        kind, name = argument.meta.get("input", ("", ""))
        if is_param(node):
            prefix = name.removesuffix(node.meta["input"][1])
        elif kind == "past":
            sites.append(int(name.rpartition("_")[2]))
    return CapturedLayer(call.meta["layer"], prefix, str(call.target), tuple(dict.fromkeys(sites)))
