"""Give every node of an edited graph its meta["val"]: shapes at this rank, symbolic in B and T."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from helix_compile.errors import PassError
from helix_compile.ir.graph import aten, inputs_of, is_call
from helix_compile.ir.sizes import concrete, shape_of
from helix_compile.ir.stage import body_of


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph's values live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def propagate_shapes(graph: fx.Graph, bodies: Mapping[str, fx.GraphModule] | None = None) -> None:
    """Bring meta["val"] of every node up to date with the placeholders'.

    A value is a function of the op and of its arguments' shapes, so only nodes where these differ from what their
    value was computed from (meta["val_key"]) are run: a few dozen a stage, instead of all. What the same op gave for
    the same shapes before, in another body, stage or plan of the same capture, is not computed again. `bodies` are what it
    calls, where it is no graph of a module yet.

    A function of Python, of a user's edit, is asked with values that have none; where it wants some, what the edit says of the
    node stays.

    Raises:
        PassError: an op does not take the shapes it gets; names node, op and shapes.
    """
    mode = fake_mode_of(graph)
    known = _known_values(mode)
    # by Python: torch 2.11 computes aten.linear in C++ there, which takes no symbolic sizes
    # where sizes are symbols, looking results up costs more than computing them
    uncached = patch.object(mode, "cache_enabled", False)
    with mode, uncached, enable_python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            # a rewritten layer returns a hidden state like the one it gets; a leaf's value never changes
            if node.op == "call_module" and "leaf" not in node.meta:
                body = bodies[str(node.target)] if bodies else body_of(graph.owning_module, node.target)
                node.meta["val"] = _returned(node.args[0].meta["val"], body.graph)
            if node.op == "get_attr" and graph.owning_module is not None:
                constant = attrgetter(str(node.target))(graph.owning_module)
                if isinstance(constant, Tensor):
                    node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
            if node.op != "call_function":
                continue
            key = _val_key(node)
            if node.meta.get("val_key") == key:
                continue
            if key not in known:
                known[key] = _computed(node)
            node.meta["val"], node.meta["val_key"] = known[key], key


def _is_of_python(target: Any) -> bool:
    return isinstance(target, FunctionType) or (
        isinstance(target, BuiltinFunctionType) and target.__module__ == "builtins"
    )


def _computed(node: fx.Node) -> Any:
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except Exception as error:
        if _is_of_python(node.target) and "val" in node.meta:
            return node.meta["val"]
        shapes = [_shape(n.meta["val"]) for n in node.all_input_nodes]
        raise PassError(f"node `{node.name}` ({node.target}) does not take {shapes}: {error}") from error


def _known_values(mode: FakeTensorMode) -> dict[tuple, Any]:
    """Key of a node -> its value. Kept with the mode, whose symbols the values speak of, and gone when it goes."""
    known: dict[tuple, Any] = vars(mode).setdefault("helix_values", {})
    return known


def _returned(hidden: Tensor, body: fx.Graph) -> Any:
    """What a body returns for such hidden states: a captured one what it caches too, and either what it hands on."""
    (values,) = next(n for n in body.nodes if n.op == "output").args
    if not isinstance(values, (tuple, list)):
        return hidden
    others = [n.meta.get("val") for n in values[1:]]
    cached = len(inputs_of(body, "past"))
    is_captured = bool(cached or inputs_of(body, "shared"))
    return (hidden, others[:cached], *others[cached:]) if is_captured else (hidden, *others)


def trust_shapes(graph: fx.Graph) -> None:
    """Declare that every meta["val"] of a freshly exported graph is up to date."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val_key"] = _val_key(node)


def _val_key(node: fx.Node) -> tuple:
    """What a node's value depends on. Sizes are compared as expressions, which adds no guard."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return node.target, spec, tuple(_leaf_key(leaf) for leaf in leaves)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, fx.Node):
        return _leaf_key(leaf.meta["val"])
    if isinstance(leaf, Tensor):
        sizes = [_leaf_key(size) for size in (*leaf.shape, *leaf.stride())]
        return "tensor", leaf.dtype, leaf.device, *sizes
    if isinstance(leaf, (list, tuple)):
        return tuple(_leaf_key(item) for item in leaf)
    if isinstance(leaf, slice):  # has no hash
        return "slice", *(_leaf_key(part) for part in (leaf.start, leaf.stop, leaf.step))
    if isinstance(leaf, torch.SymInt):
        return "size", leaf.node.expr
    return type(leaf), leaf  # the type too: 2 == 2.0, and they promote differently


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)


def open_view(node: fx.Node, heads: int) -> list[Any] | None:
    """Sizes of a view with -1 where it writes the head count as a number, or None if it does not.

    That place is the first literal `heads` behind dims that are those of the input.
    """
    if not is_call(node, *_VIEWS):
        return None
    source, sizes = node.args
    assert isinstance(source, fx.Node) and isinstance(sizes, (list, tuple))
    before = shape_of(source)
    for dim, size in enumerate(sizes):
        if isinstance(size, int) and size == heads:
            opened = list(sizes)
            for other, value in enumerate(sizes):
                if isinstance(value, int) and value == -1:
                    opened[other] = shape_of(node)[other]
            opened[dim] = -1
            return opened
        if dim >= len(before) or concrete(size) != before[dim]:
            return None
    return None


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
