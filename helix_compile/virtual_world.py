"""All ranks in this process with real values: one generator a rank, and a mailbox for collectives.

A collective posts its argument and its value is *pending*; at wait_tensor the rank is suspended until every member of
the group has posted, and another rank runs. Collectives are matched by (axis, members, sequence number), as process
groups do, not by node name; so a fault is reported with rank, node and what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.exchange import (
    Exchange,
    Key,
    Post,
    check_all_posted,
    complete_exchange,
    deadlock_fault,
    egress_bytes,
)
from helix_compile.mesh import HelixMesh

_c10d = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default
_COLLECTIVES = {
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_gather_into_tensor.default: "all_gather_into_tensor",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter_tensor",
    _c10d.all_to_all_single.default: "all_to_all_single",
}
Hook = Callable[[int, fx.Node, Any], None]


@dataclass(frozen=True)
class Pending:
    """The value of a collective between its start and its wait_tensor."""

    op: str
    key: Key


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


class VirtualWorld:
    """Runs one graph per rank to completion, ranks taking turns.

    Attributes:
        sent_bytes: bytes that left each rank since the last reset_counters().
        num_collectives: collectives by (op, axis), counted once for a group.
    """

    def __init__(self, mesh: HelixMesh):
        self.mesh = mesh
        self.reset_counters()

    @property
    def ranks(self) -> Sequence[int]:
        """Ranks that live in this process: all of them."""
        return range(self.mesh.world_size)

    def reset_counters(self) -> None:
        """Start counting bytes and collectives again."""
        self.sent_bytes = [Fraction(0)] * self.mesh.world_size
        self.num_collectives: dict[tuple[str, str], int] = {}

    def run(
        self,
        graphs: fx.GraphModule | Sequence[fx.GraphModule],
        inputs: Sequence[Sequence[Any]],
        hook: Hook | None = None,
    ) -> list[Any]:
        """Run `graphs` (one for all, or one a rank) on `inputs[rank]`; returns the outputs by rank.

        Args:
            hook: called with (rank, node, value) after every node; a call_module's nodes come before it.

        Raises:
            RuntimeFault: deadlock, ranks that disagree, a pending value that is used, split sizes that do not fit.
        """
        mailbox: dict[Key, Exchange] = {}
        steps: dict[fx.Graph, list[_Step]] = {}
        walks = {}
        for rank in self.ranks:
            graph = graphs if isinstance(graphs, fx.GraphModule) else graphs[rank]
            walk = _Walk(self.mesh, rank, mailbox, steps, hook)
            walks[rank] = walk.graph(graph, inputs[rank], "")
        waiting: dict[int, tuple[Key, str] | None] = dict.fromkeys(walks)
        outputs: dict[int, Any] = {}
        while walks:
            moved = False
            for rank in list(walks):
                blocked = waiting[rank]
                if blocked is not None and not self._complete(mailbox, blocked[0]):
                    continue
                moved = True
                try:
                    waiting[rank] = next(walks[rank])
                except StopIteration as stop:
                    outputs[rank] = stop.value
                    del walks[rank], waiting[rank]
            if not moved:
                raise deadlock_fault(mailbox, waiting)
        check_all_posted(mailbox)
        return [outputs[rank] for rank in self.ranks]

    def _complete(self, mailbox: dict[Key, Exchange], key: Key) -> bool:
        exchange = mailbox[key]
        axis, members, _ = key
        if exchange.results is None and len(exchange.posts) == len(members):
            op = complete_exchange(key, exchange)
            sent = egress_bytes(op, len(members), exchange.posts[members[0]].tensor)  # all alike
            for rank in members:
                self.sent_bytes[rank] += sent
            exchange.drop_arguments()
            count = self.num_collectives
            count[(op, axis)] = count.get((op, axis), 0) + 1
        return exchange.results is not None


class _Walk:
    """One rank's way through its graph. `steps` of a graph are made once and shared by all ranks of a run."""

    def __init__(
        self,
        mesh: HelixMesh,
        rank: int,
        mailbox: dict[Key, Exchange],
        steps: dict[fx.Graph, list[_Step]],
        hook: Hook | None,
    ):
        self.mesh, self.rank, self.mailbox, self.hook = mesh, rank, mailbox, hook
        self.steps = steps
        self.posted: dict[str, int] = {}

    def graph(
        self, module: fx.GraphModule, inputs: Sequence[Any], path: str
    ) -> Generator[tuple[Key, str], None, Any]:
        values: dict[fx.Node, Any] = {}
        if module.graph not in self.steps:
            self.steps[module.graph] = _steps(module.graph)
        remaining = iter(inputs)
        for step in self.steps[module.graph]:
            node = step.node
            if node.op == "call_function" and node.target is not _WAIT:
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
                assert isinstance(body, fx.GraphModule)
                values[node] = yield from self.graph(body, list(args), f"{path}{node.name}.")
            elif node.op == "get_attr":
                values[node] = _attribute(module, str(node.target))
            elif node.target is _WAIT:
                pending = values[node.args[0]]
                if not isinstance(pending, Pending):
                    raise self._fault(
                        f"{path}{node.name}",
                        "wait_tensor on a value that no collective is computing",
                    )
                yield pending.key, f"{path}{node.name}"
                values[node] = self._take(pending, f"{path}{node.name}")
            else:
                raise self._fault(
                    f"{path}{node.name}", f"a {node.op} node can't be run; use call_function"
                )
            if self.hook is not None:
                self.hook(self.rank, node, values[node])
            for dead in step.dead:
                del values[dead]
        raise self._fault(path, "the graph has no output")

    def _call(self, step: _Step, values: dict[fx.Node, Any], path: str) -> Any:
        node = step.node
        self._refuse_pending(step, path)
        args = fx.map_arg(node.args, values.__getitem__)
        if step.collective is not None:
            return self._post(step.collective, args, f"{path}{node.name}")
        kwargs = fx.map_arg(node.kwargs, values.__getitem__) if node.kwargs else {}
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except RuntimeFault:
            raise
        except Exception as error:
            raise self._fault(
                f"{path}{node.name}", f"{node.target}: {type(error).__name__}: {error}"
            ) from error

    def _post(self, op: str, args: tuple, where: str) -> Pending:
        axis = args[-1]
        if axis not in self.mesh.groups:
            raise self._fault(where, f"unknown axis {axis!r}; one of {', '.join(self.mesh.groups)}")
        number = self.posted.get(axis, 0)
        self.posted[axis] = number + 1
        key = (axis, self.mesh.members(axis, self.rank), number)
        exchange = self.mailbox.setdefault(key, Exchange())
        exchange.posts[self.rank] = Post(op, args[0], tuple(args[1:-1]), where)
        return Pending(op, key)

    def _take(self, pending: Pending, where: str) -> Tensor:
        exchange = self.mailbox[pending.key]
        assert exchange.results is not None
        if self.rank in exchange.waited:
            raise self._fault(
                where, f"{pending.op} (collective #{pending.key[2]}) is waited for twice"
            )
        exchange.waited.add(self.rank)
        return exchange.results.pop(self.rank)

    def _refuse_pending(self, step: _Step, path: str) -> None:
        if step.pending:
            raise self._fault(
                f"{path}{step.node.name}", f"{list(step.pending)} used before wait_tensor"
            )

    def _fault(self, where: str, what: str) -> RuntimeFault:
        return RuntimeFault(f"rank {self.rank}, node {where}: {what}")


def _steps(graph: fx.Graph) -> list[_Step]:
    inputs = {node: node.all_input_nodes for node in graph.nodes}
    last = {used: node for node, sources in inputs.items() for used in (node, *sources)}
    dead: dict[fx.Node, list[fx.Node]] = {node: [] for node in inputs}
    for value, user in last.items():
        dead[user].append(value)
    started = {
        node: _COLLECTIVES[node.target]
        for node in inputs
        if node.op == "call_function" and node.target in _COLLECTIVES
    }
    return [
        _Step(
            node,
            started.get(node),
            tuple(started[source] for source in sources if source in started),
            tuple(dead[node]),
        )
        for node, sources in inputs.items()
    ]


def _attribute(module: fx.GraphModule, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
