"""fx graphs as JSON and back: ops by qualified name from a fixed list, arguments as plain data. No pickle.

A loaded graph is checked before it is trusted: every target against the list, every node reference, and the shapes are
inferred again by running the ops on fake tensors.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from helix_compile.errors import HelixError
from helix_compile.ir.graph import PART
from helix_compile.ir.origin import PROVENANCE_KEYS
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.ir.sizes import HINT_B, HINT_T, hint_of

_NAMESPACES = ("aten", "helix", "helix_triton", "helix_cpp", "_c10d_functional")
_OPERATORS = {
    f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
}
_KEPT_META = ("input", "sharded", "layer", "step", "kernel", PART, *PROVENANCE_KEYS)
_HINTS = {"B": HINT_B, "T": HINT_T}


def graph_to_json(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """One dict a node: name, op, target, args, kwargs, our meta; placeholders with dtype and shape too."""
    return [_node_to_json(node) for node in gm.graph.nodes]


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    entry = {
        "name": node.name,
        "op": node.op,
        "target": _target_name(node),
        "args": _encode(node.args),
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "meta": {k: node.meta[k] for k in _KEPT_META if k in node.meta},
    }
    if node.op == "placeholder":
        value = node.meta["val"]
        entry["dtype"] = str(value.dtype).removeprefix("torch.")
        entry["shape"] = [_size(s) for s in value.shape]
    return entry


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        if name.split(".")[0] in _NAMESPACES:
            return name
    for name, function in _OPERATORS.items():
        if node.target is function:
            return name
    raise HelixError(
        f"node `{node.name}`: target {node.target} can't be saved; targets come from {', '.join(_NAMESPACES)} "
        "and operator only"
    )


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    return next(letter for letter, hint in _HINTS.items() if hint == hint_of(size))


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise HelixError(f"an argument of type {type(value).__name__} can't be saved: {value!r}")


def values_of_graphs() -> FakeTensorMode:
    """What the values of the graphs of one folder live in: they share their symbols, and what is known of equal ops."""
    return FakeTensorMode(shape_env=ShapeEnv())


def graph_from_json(
    entries: list[dict[str, Any]],
    where: str,
    bodies: dict[str, fx.GraphModule],
    device: torch.device,
    mode: FakeTensorMode | None,
) -> fx.GraphModule:
    """Rebuild a graph.

    Args:
        entries: of graph_to_json().
        where: names it in errors.
        bodies: its submodules.
        device: of constants.
        mode: of values_of_graphs(); None: values are not inferred, and nodes have no meta["val"].
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        try:
            node = _node_from_json(graph, entry, nodes, bodies, device)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise HelixError(
                f"{where}: node {entry.get('name')!r} is not valid: {type(error).__name__}: {error}"
            ) from error
        node.meta.update(entry["meta"])
        if node.op == "placeholder" and mode is not None:
            node.meta["val"] = _fake_input(mode, entry, device)
        nodes[entry["name"]] = node
    graph.lint()
    if mode is not None:
        propagate_shapes(graph, bodies)
    return fx.GraphModule(dict(bodies), graph)


def _node_from_json(
    graph: fx.Graph, entry: dict[str, Any], nodes: dict[str, fx.Node], bodies: dict[str, Any], device: torch.device
) -> fx.Node:
    op, target = entry["op"], entry["target"]
    args = tuple(_decode(a, nodes, device) for a in entry["args"])
    kwargs = {k: _decode(v, nodes, device) for k, v in entry["kwargs"].items()}
    if op == "output":
        return graph.output(args[0])
    if op == "call_module" and target not in bodies:
        raise KeyError(f"no body {target!r}")
    if op == "call_function":
        target = _resolve(target)
    elif op not in ("placeholder", "call_module"):
        raise ValueError(f"op {op!r} is not allowed")
    return graph.create_node(op, target, args, kwargs, name=entry["name"])


def _resolve(name: str) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    namespace, *rest = name.split(".")
    if namespace not in _NAMESPACES or len(rest) != 2:
        raise ValueError(f"target {name!r} is not on the list of allowed targets")
    return getattr(getattr(getattr(torch.ops, namespace), rest[0]), rest[1])


def _decode(value: Any, nodes: dict[str, fx.Node], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes, device) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return nodes[content]
        if kind == "torch":
            decoded = getattr(torch, content)
            if not isinstance(decoded, (torch.dtype, torch.memory_format, torch.layout)):
                raise ValueError(f"torch.{content} is not a dtype, layout or memory format")
            return decoded
        if kind == "device":
            return device  # where it is loaded, not where it was saved
        if kind == "float":
            return float(content)
        raise ValueError(f"unknown argument kind {kind!r}")
    return value


def _fake_input(mode: FakeTensorMode, entry: dict[str, Any], device: torch.device) -> Tensor:
    """A fake of the saved shape; B and T become symbols again (equal hints share a symbol)."""
    shape = [_HINTS.get(s, s) for s in entry["shape"]]
    dynamic = [DimDynamic.DUCK if isinstance(s, str) else DimDynamic.STATIC for s in entry["shape"]]
    example = torch.empty(shape, dtype=getattr(torch, entry["dtype"]), device="meta")
    fake = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
    with mode:
        return torch.empty(fake.shape, dtype=fake.dtype, device=device)
