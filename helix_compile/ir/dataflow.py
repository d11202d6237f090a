"""Pieces of a captured graph: which are a function of one value, and what they compute on concrete tensors.

So a fused kernel's piece, a mask and query heads are accepted by what they do, not by their spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import is_param
from helix_compile.ir.sizes import shape_of


def single_inputs(
    graph: fx.Graph, results: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> Iterator[fx.Node]:
    """Every node that `results` depend on through nothing else, nearest first.

    Parameters, sizes and the nodes `besides` do not count as inputs of their own.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    frontier = set(results)
    while frontier:
        last = max(frontier, key=order.__getitem__)
        if len(frontier) == 1 and last not in results:
            yield last
        if last.op != "call_function":
            return
        frontier.remove(last)
        frontier |= {n for n in last.all_input_nodes if _carries(n) and n not in besides}


def _carries(node: fx.Node) -> bool:
    """True for a node that carries tokens: no parameter, nothing computed from parameters alone, no size."""
    if is_param(node) or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return False
    return node.op == "placeholder" or any(map(_carries, node.all_input_nodes))


def follow(start: Iterable[fx.Node], towards: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Every node that steps `towards` lead to, `start` included; each once."""
    todo = list(start)
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        fresh = [n for n in towards(node) if n not in seen]
        seen.update(fresh)
        todo += fresh


def ancestors(results: Iterable[fx.Node], until: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Everything that `results` are computed from, up to and without `until`; the results included."""
    wanted = (n for n in results if n not in until)
    return set(follow(wanted, lambda node: (n for n in node.all_input_nodes if n not in until)))


def constants(nodes: Collection[fx.Node]) -> list[float]:
    """Finite Python floats among the arguments of `nodes`: where a cone's epsilons and factors are."""
    return [a for n in nodes for a in n.args if isinstance(a, float) and math.isfinite(a)]


def shape_of_value(node: fx.Node) -> tuple[int, ...]:
    """A node's shape at the capture hints; () for what is no tensor."""
    return shape_of(node) if isinstance(node.meta.get("val"), Tensor) else ()


def blank(node: fx.Node) -> Tensor:
    """What a placeholder that only gives sizes holds while a cone is evaluated."""
    return torch.zeros(shape_of(node), dtype=node.meta["val"].dtype)


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding: a few units in the last place of the narrower of the two dtypes."""
    if got.shape != expected.shape or not (got.isfinite().all() and expected.isfinite().all()):
        return False
    unit = max(torch.finfo(got.dtype).eps, torch.finfo(expected.dtype).eps, 1e-6)
    got, expected = got.double(), expected.double()
    scale = expected.abs().amax().clamp(min=1e-30)
    return bool(((got - expected).abs() <= 8 * unit * scale).all())


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
