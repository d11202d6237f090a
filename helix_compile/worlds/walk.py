"""One rank's way through its graph, node by node, in any world: a generator that stops where it waits for its peers.

A collective node posts its argument and its value is *pending*; at wait_tensor the generator yields (pending, where)
and the world sends the value back. A pending value that reaches any other operator is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.collectives import COLLECTIVE_OF, WAIT
from helix_compile.ir.graph import is_call
from helix_compile.ir.leaves import Leaf

Hook = Callable[[int, fx.Node, Any], None]
Graphs = fx.GraphModule | Sequence[fx.GraphModule]  # one for all ranks, or one a rank


@dataclass(frozen=True)
class Pending:
    """The value of a collective between its start and its wait_tensor; `ticket` is the world's own."""

    op: str
    ticket: Any


Post = Callable[[str, tuple, str], Pending]  # op, arguments with the axis last, where


class _Step(NamedTuple):
    """A node, with what every rank would otherwise look up again.

    Attributes:
        collective: which collective the node starts, or None.
        pending: the collectives whose values it takes; only wait_tensor may.
        dead: the nodes whose values nobody needs after it.
    """

    node: fx.Node
    collective: str | None
    pending: tuple[str, ...]
    dead: tuple[fx.Node, ...]


class Walk:
    """One rank's way through its graph.

    Args:
        post: starts a collective and gives its pending value.
        steps: of a graph, made once and shared by all walks of a run.
        hook: called with (rank, node, value) after every node.
    """

    def __init__(self, rank: int, post: Post, steps: dict[fx.Graph, list[_Step]], hook: Hook | None):
        self.rank, self.post, self.steps, self.hook = rank, post, steps, hook

    def graph(
        self, module: fx.GraphModule, inputs: Sequence[Any], path: str
    ) -> Generator[tuple[Pending, str], Tensor | None, Any]:
        """Run `module` on `inputs`; yields where it waits, wants the value sent back, and returns the output."""
        values: dict[fx.Node, Any] = {}
        if module.graph not in self.steps:
            self.steps[module.graph] = _steps(module.graph)
        remaining = iter(inputs)
        for step in self.steps[module.graph]:
            node = step.node
            if node.op == "call_function" and node.target is not WAIT:
                values[node] = self._call(step, values, path)
            elif node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "output":
                self._refuse_pending(step, path)
                return fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "call_module":
                self._refuse_pending(step, path)
                args = fx.map_arg(node.args, values.__getitem__)
                body = module.get_submodule(str(node.target))
                if isinstance(body, Leaf):
                    values[node] = self._guarded(body, args, {}, f"{path}{node.name}", f"leaf {body.name}")
                else:
                    values[node] = yield from self.graph(body, list(args), f"{path}{node.name}.")
            elif node.op == "get_attr":
                values[node] = attrgetter(str(node.target))(module)
            elif node.target is WAIT:
                pending = values[node.args[0]]
                if not isinstance(pending, Pending):
                    raise self.fault(f"{path}{node.name}", "wait_tensor on a value that no collective is computing")
                values[node] = yield pending, f"{path}{node.name}"
            else:
                raise self.fault(f"{path}{node.name}", f"a {node.op} node can't be run; use call_function")
            if self.hook is not None:
                self.hook(self.rank, node, values[node])
            for dead in step.dead:
                del values[dead]
        raise self.fault(path, "the graph has no output")

    def _call(self, step: _Step, values: dict[fx.Node, Any], path: str) -> Any:
        node = step.node
        self._refuse_pending(step, path)
        args = fx.map_arg(node.args, values.__getitem__)
        if step.collective is not None:
            return self.post(step.collective, args, f"{path}{node.name}")
        kwargs = fx.map_arg(node.kwargs, values.__getitem__) if node.kwargs else {}
        return self._guarded(node.target, args, kwargs, f"{path}{node.name}", node.target)

    def _guarded(self, call: Any, args: Any, kwargs: Any, where: str, what: object) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeFault:
            raise
        except Exception as error:
            raise self.fault(where, f"{what}: {type(error).__name__}: {error}") from error

    def _refuse_pending(self, step: _Step, path: str) -> None:
        if step.pending:
            raise self.fault(f"{path}{step.node.name}", f"{list(step.pending)} used before wait_tensor")

    def fault(self, where: str, what: str) -> RuntimeFault:
        """An error that says which rank and node."""
        return rank_fault(self.rank, where, what)


def rank_fault(rank: int, where: str, what: str) -> RuntimeFault:
    """An error that says which rank and node."""
    return RuntimeFault(f"rank {rank}, node {where}: {what}")


def _steps(graph: fx.Graph) -> list[_Step]:
    inputs = {node: node.all_input_nodes for node in graph.nodes}
    last = {used: node for node, sources in inputs.items() for used in (node, *sources)}
    dead: dict[fx.Node, list[fx.Node]] = {node: [] for node in inputs}
    for value, user in last.items():
        dead[user].append(value)
    started = {node: COLLECTIVE_OF[node.target].name for node in inputs if is_call(node, *COLLECTIVE_OF)}
    return [
        _Step(
            node,
            started.get(node),
            tuple(started[source] for source in sources if source in started),
            tuple(dead[node]),
        )
        for node, sources in inputs.items()
    ]
