"""A stage: an outer graph with its bodies, and copies of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from helix_compile.ir.leaves import Leaf

OUTER = "outer"
SEGMENTS = "segments"  # the stage behind the lowered one, where segments are compiled


def bodies_of(stage: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """Body name -> its graph; leaves, the user's own modules, are none."""
    return {name: body for name, body in stage.named_children() if isinstance(body, fx.GraphModule)}


def body_of(stage: fx.GraphModule, name: Any) -> fx.GraphModule:
    """One body's graph, by name or by the target of its call."""
    body = stage.get_submodule(str(name))
    assert isinstance(body, fx.GraphModule)
    return body


def graphs_of(stage: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """("outer", graph) and (name, graph) of each body of a stage; where it is cut, ("body_0_segment_1", graph) of each segment."""
    inner = [(name, graph) for name, graph in stage.named_modules() if name and isinstance(graph, fx.GraphModule)]
    return [(OUTER, stage), *((name.rpartition(".")[2], graph) for name, graph in inner)]


def uncut(stages: Mapping[str, fx.GraphModule]) -> dict[str, fx.GraphModule]:
    """The stages whose bodies are whole: what is drawn, explained and counted node by node."""
    return {name: stage for name, stage in stages.items() if name != SEGMENTS}


def nodes_of(stage: fx.GraphModule) -> Iterator[fx.Node]:
    """Every node of a stage: of the outer graph, then of each body."""
    for _, graph in graphs_of(stage):
        yield from graph.graph.nodes


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an outer graph and its bodies; node names and meta are kept, parameters are not held at all.

    Graphs are run node by node: their Python text is made when someone reads or calls it, which is half of a compile.
    """
    root = nn.Module()
    for name, body in module.named_children():
        if isinstance(body, Leaf):  # the user's own module: never copied
            root.add_module(name, body)
            continue
        assert isinstance(body, fx.GraphModule)
        root.add_module(name, _LazyGraphModule(body, copy_graph(body.graph)))
    return _LazyGraphModule(root, copy_graph(module.graph))


def copy_graph(graph: fx.Graph, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.Graph:
    """A copy of a graph, output and meta included; fills `mapping` with node -> its copy."""
    copy, mapping = fx.Graph(), {} if mapping is None else mapping
    output = copy.output(copy.graph_copy(graph, mapping))
    output.meta = dict(next(n for n in graph.nodes if n.op == "output").meta)
    return copy
