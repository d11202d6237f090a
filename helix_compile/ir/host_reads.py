"""What of a step can't be recorded ahead of it: ops whose host code reads values of the device, and code that is not ours.

A CUDA graph holds launches. Whatever the host did while they were recorded it does no more when they are replayed, so an op may be
recorded if what it launches follows from shapes alone. Kernels of this package do (docs/kernels.md); of their torch references some
look at lengths or at the experts that were chosen (Op.reads_values); torch's own ops say it by their tags.
"""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import aten, is_call
from helix_compile.ir.leaves import Leaf, is_leaf_call
from helix_compile.ir.stage import graphs_of
from helix_compile.kernels.ops import OPS

_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_TORCHS = ("aten", "prims", "_c10d_functional", "helix_triton")
_OF_SIZES = ("torch", "math", "operator", "_operator")  # modules whose functions a graph calls with numbers


def host_read(node: fx.Node) -> str:
    """Why the host must be there when this node is called, at every step anew; "" where its launches follow from shapes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    if target.namespace == "helix":
        known = OPS.get(target._schema.name.partition("::")[2])
        return f"the torch reference of {target} reads values on the host" if known and known.reads_values else ""
    if target.namespace not in _TORCHS:
        return f"{target} is an operator of {target.namespace}: what it reads on the host is not known"
    if is_call(node, *_INDEXED):  # their tags say what they do with truth values
        return f"{target} by truth values makes a size of them" if any(map(_is_mask, node.args[1])) else ""
    return f"{target} makes a size or a number of values" if any(tag in target.tags for tag in _BY_VALUE) else ""


def _is_mask(index: Any) -> bool:
    value = index.meta.get("val") if isinstance(index, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def host_reads(graph: fx.GraphModule) -> list[tuple[str, str]]:
    """(node, why) of every node of one graph that host_read() says something of."""
    return [(node.name, why) for node in graph.graph.nodes if node.op == "call_function" and (why := host_read(node))]


def foreign_code(called: Any) -> str:
    """What is called that is neither an op nor ours, and may keep or write what it is given; "" if it is none of these."""
    if isinstance(called, Leaf):
        return f"{called.name} stays the user's own module"
    known = isinstance(called, (torch._ops.OpOverload, BuiltinFunctionType))
    if known or str(getattr(called, "__module__", "")).partition(".")[0] in _OF_SIZES:
        return ""
    return f"{getattr(called, '__name__', called)} is a function of Python that an edit calls"


def what_is_read(stage: fx.GraphModule) -> tuple[str, list[tuple[str, str]]]:
    """Of an outer graph and its bodies: the first code of others ("" if there is none), and each ("body_0.node", why) of host_read()."""
    others, reads = "", list[tuple[str, str]]()
    for name, graph in graphs_of(stage):
        for node in graph.graph.nodes:
            if node.op == "call_module" and is_leaf_call(graph, node):
                others = others or foreign_code(graph.get_submodule(str(node.target)))
            elif node.op == "call_function":
                others = others or foreign_code(node.target)
        reads += [(f"{name}.{node}", why) for node, why in host_reads(graph)]
    return others, reads
