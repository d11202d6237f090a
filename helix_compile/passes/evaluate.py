"""Run a piece of a captured graph on concrete tensors: how masks and query heads are accepted, by what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx


class NotRun(RuntimeError):
    """`node` does not run on the values it got."""

    def __init__(self, node: fx.Node, cause: Exception):
        super().__init__(f"`{node.name}`: {cause}")
        self.node = node


def evaluate(
    node: fx.Node,
    known: dict[fx.Node, Any],
    missing: Callable[[fx.Node], Any] | None = None,
    sizes: Mapping[fx.Node, list[Any]] | None = None,
    given: Callable[[fx.Node], Any] | None = None,
) -> Any:
    """Value of `node`, given values for some of its ancestors.

    Args:
        node: what to compute.
        known: node -> value; the walk stops there. Filled with what was computed on the way.
        missing: asked for the value of a placeholder that is not known; without it that is a KeyError.
        sizes: other sizes for some views than the graph has.
        given: asked first for the value of each node; None: it has none.

    Raises:
        KeyError: a placeholder has no value.
        NotRun: a node does not take the values it gets.
    """
    todo = [node]
    while todo:
        current = todo[-1]
        if current in known:
            todo.pop()
            continue
        if given is not None and (value := given(current)) is not None:
            known[current] = value
            continue
        if current.op == "placeholder":
            if missing is None:
                raise KeyError(current.name)
            known[current] = missing(current)
            continue
        if current.op != "call_function":
            raise KeyError(current.name)
        waiting = [n for n in current.all_input_nodes if n not in known]
        if waiting:
            todo.extend(waiting)
            continue
        args = current.args
        if sizes and current in sizes:
            args = (args[0], sizes[current])
        args = fx.map_arg(args, known.__getitem__)
        kwargs = dict(fx.map_arg(current.kwargs, known.__getitem__))
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"  # a model captured on meta or CUDA is still evaluated here
        try:
            known[current] = current.target(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise NotRun(current, error) from error
    return known[node]
