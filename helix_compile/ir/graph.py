"""The few graph lookups and edits that every pass shares."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import fx

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


# frames of torch and of this package are not lines of the user's model
_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "torch/fx/")


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    """The node of this name; KeyError if there is none."""
    for node in graph.nodes:
        if node.name == name:
            return node
    raise KeyError(f"no node named {name!r} in the graph")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs in order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def input_named(graph: fx.Graph, kind: str, name: str) -> fx.Node:
    """The placeholder with meta["input"] == [kind, name]."""
    for node in placeholders(graph):
        if node.meta.get("input") == [kind, name]:
            return node
    raise KeyError(f"no input {kind} {name!r} in the graph")


def add_input(graph: fx.Graph, kind: str, name: str, val: Any = None) -> fx.Node:
    """A new placeholder behind the last one (or the one that is there already)."""
    for node in placeholders(graph):
        if node.meta.get("input") == [kind, name]:
            return node
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name.replace(".", "_"))
    node.meta = {"input": [kind, name], "val": val}
    return node


def calls(graph: fx.Graph, *targets: Callable) -> list[fx.Node]:
    """All call_function nodes with one of these targets."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def is_call(node: Any, *targets: Callable) -> bool:
    """True for a call_function node with one of these targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def helix_op(node: Any) -> str:
    """mla_decode for a call of helix::mla_decode or of a provider's op that stands for it; else ""."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    provider, name = node.target._schema.name.split("::")
    return name if provider.startswith("helix") else ""


def is_collective(node: Any) -> bool:
    """True for the start of a collective (not for its wait_tensor)."""
    return (
        isinstance(node, fx.Node)
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "_c10d_functional"
        and node.target is not c10d.wait_tensor.default
    )


def is_param(node: Any) -> bool:
    """True for a placeholder that is a parameter or buffer."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.meta.get("input", [""])[0] == "param"


def getitems(graph: fx.Graph, node: fx.Node, *names: str) -> list[fx.Node]:
    """One named getitem node for each output of a multi-output node."""
    return [named(graph, name, operator.getitem, node, i) for i, name in enumerate(names)]


def named(graph: fx.Graph, name: str, target: Callable, *args: Any) -> fx.Node:
    """A call_function node under a name that a reader of the graph understands."""
    return graph.create_node("call_function", target, args, name=name)


def erase_unused(graph: fx.Graph, keep: Iterable[fx.Node] = ()) -> None:
    """Drop every node without users, attention ops included (fx keeps ops tagged as seeded), and dead inputs."""
    kept = set(keep)
    for node in reversed(list(graph.nodes)):
        if node.op != "output" and not node.users and node not in kept:
            graph.erase_node(node)


def source_line(node: fx.Node) -> str:
    """file:line of the user's model that made the node, or ""."""
    trace = node.meta.get("stack_trace") or ""
    for file, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', trace)):
        if not file.startswith(_NOT_THE_USERS):
            return f"{Path(file).name}:{line}"
    return ""
