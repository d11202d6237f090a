"""All ranks in this process with real values: one generator a rank, and a mailbox for collectives.

A collective posts its argument and its value is *pending*; at wait_tensor the rank is suspended until every member of
the group has posted, and another rank runs. Collectives are matched by (axis, members, sequence number), as process
groups do, not by node name; so a fault is reported with rank, node and what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.mesh import HelixMesh

_c10d = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default
_COLLECTIVES = {
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_gather_into_tensor.default: "all_gather_into_tensor",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter_tensor",
    _c10d.all_to_all_single.default: "all_to_all_single",
}
Key = tuple[str, tuple[int, ...], int]
Hook = Callable[[int, fx.Node, Any], None]
LastUses = dict[fx.Graph, dict[fx.Node, list[fx.Node]]]


@dataclass(frozen=True)
class Pending:
    """The value of a collective between its start and its wait_tensor."""

    op: str
    key: Key


@dataclass
class _Exchange:
    """One collective: what each member posted, then what each member gets."""

    posts: dict[int, tuple[str, Tensor, tuple, str]] = field(default_factory=dict)
    results: dict[int, Tensor] | None = None
    waited: set[int] = field(default_factory=set)


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
        mailbox: dict[Key, _Exchange] = {}
        last_uses: LastUses = {}
        walks = {}
        for rank in self.ranks:
            graph = graphs if isinstance(graphs, fx.GraphModule) else graphs[rank]
            walk = _Walk(self.mesh, rank, mailbox, last_uses, hook)
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
                raise _deadlock(mailbox, waiting)
        _check_all_posted(mailbox)
        return [outputs[rank] for rank in self.ranks]

    def _complete(self, mailbox: dict[Key, _Exchange], key: Key) -> bool:
        exchange = mailbox[key]
        if exchange.results is None and len(exchange.posts) == len(key[1]):
            op, sent = _check_agreement(key, exchange)
            tensors = [exchange.posts[r][1] for r in key[1]]
            exchange.results = dict(zip(key[1], _OUTCOME[op](tensors), strict=True))
            for rank, tensor in zip(key[1], tensors, strict=True):
                self.sent_bytes[rank] += sent(tensor)
            exchange.posts = {
                r: (*p[:1], tensors[0].new_empty(0), *p[2:]) for r, p in exchange.posts.items()
            }
            count = self.num_collectives
            count[(op, key[0])] = count.get((op, key[0]), 0) + 1
        return exchange.results is not None


class _Walk:
    """One rank's way through its graph. `last_uses` is shared by all ranks of a run."""

    def __init__(
        self,
        mesh: HelixMesh,
        rank: int,
        mailbox: dict[Key, _Exchange],
        last_uses: LastUses,
        hook: Hook | None,
    ):
        self.mesh, self.rank, self.mailbox, self.hook = mesh, rank, mailbox, hook
        self.last_uses = last_uses
        self.posted: dict[str, int] = {}

    def graph(
        self, module: fx.GraphModule, inputs: Sequence[Any], path: str
    ) -> Generator[tuple[Key, str], None, Any]:
        values: dict[fx.Node, Any] = {}
        if module.graph not in self.last_uses:
            self.last_uses[module.graph] = _last_uses(module.graph)
        dying = self.last_uses[module.graph]
        remaining = iter(inputs)
        for node in module.graph.nodes:
            where = f"{path}{node.name}"
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "output":
                self._refuse_pending(node, values, where)
                return fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "call_module":
                self._refuse_pending(node, values, where)
                args = fx.map_arg(node.args, values.__getitem__)
                body = module.get_submodule(str(node.target))
                assert isinstance(body, fx.GraphModule)
                values[node] = yield from self.graph(body, list(args), f"{where}.")
            elif node.op == "get_attr":
                values[node] = _attribute(module, str(node.target))
            elif node.target is _WAIT:
                pending = values[node.args[0]]
                if not isinstance(pending, Pending):
                    raise self._fault(
                        where, "wait_tensor on a value that no collective is computing"
                    )
                yield pending.key, where
                values[node] = self._take(pending, where)
            else:
                values[node] = self._call(node, values, where)
            if self.hook is not None:
                self.hook(self.rank, node, values[node])
            for dead in dying.get(node, ()):
                del values[dead]
        raise self._fault(path, "the graph has no output")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], where: str) -> Any:
        self._refuse_pending(node, values, where)
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__) if node.kwargs else {}
        op = _COLLECTIVES.get(node.target)
        if op is None:
            assert callable(node.target)
            try:
                return node.target(*args, **kwargs)
            except RuntimeFault:
                raise
            except Exception as error:
                raise self._fault(
                    where, f"{node.target}: {type(error).__name__}: {error}"
                ) from error
        return self._post(op, args, where)

    def _post(self, op: str, args: tuple, where: str) -> Pending:
        axis = args[-1]
        if axis not in self.mesh.groups:
            raise self._fault(where, f"unknown axis {axis!r}; one of {', '.join(self.mesh.groups)}")
        number = self.posted.get(axis, 0)
        self.posted[axis] = number + 1
        key = (axis, self.mesh.members(axis, self.rank), number)
        exchange = self.mailbox.setdefault(key, _Exchange())
        exchange.posts[self.rank] = (op, args[0], tuple(args[1:-1]), where)
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

    def _refuse_pending(self, node: fx.Node, values: dict[fx.Node, Any], where: str) -> None:
        sources = [values[source] for source in node.all_input_nodes]
        pending = [value.op for value in sources if isinstance(value, Pending)]
        if pending:
            raise self._fault(where, f"{pending} used before wait_tensor")

    def _fault(self, where: str, what: str) -> RuntimeFault:
        return RuntimeFault(f"rank {self.rank}, node {where}: {what}")


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> values that nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        dying.setdefault(user, []).append(value)
    return dying


def _attribute(module: fx.GraphModule, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    return [_sum(tensors)] * len(tensors)


def _sum(tensors: list[Tensor]) -> Tensor:
    """In rank order, in float32 or wider for 16-bit floats, rounded once: the same bits in every run."""
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = tensors[0].to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    return total.to(dtype)


def _all_gather(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat(tensors, dim=0)] * len(tensors)


def _reduce_scatter(tensors: list[Tensor]) -> list[Tensor]:
    return list(_sum(tensors).chunk(len(tensors), dim=0))


def _all_to_all(tensors: list[Tensor]) -> list[Tensor]:
    chunks = [t.chunk(len(tensors), dim=0) for t in tensors]
    return [torch.cat([chunk[i] for chunk in chunks], dim=0) for i in range(len(tensors))]


_OUTCOME: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
}


def _egress(op: str, peers: int) -> Callable[[Tensor], Fraction]:
    """Bytes that leave a rank: all_reduce as a ring, own chunk never counted (helix-algorithm, section 8)."""
    factor = {
        "all_reduce": Fraction(2 * (peers - 1), peers),
        "all_gather_into_tensor": Fraction(peers - 1),
        "reduce_scatter_tensor": Fraction(peers - 1, peers),
        "all_to_all_single": Fraction(peers - 1, peers),
    }[op]
    return lambda tensor: factor * tensor.numel() * tensor.dtype.itemsize


def _check_agreement(key: Key, exchange: _Exchange) -> tuple[str, Callable[[Tensor], Fraction]]:
    axis, members, number = key
    ops = {r: exchange.posts[r][0] for r in members}
    where = {r: exchange.posts[r][3] for r in members}
    if len(set(ops.values())) > 1:
        raise RuntimeFault(
            f"ranks disagree on collective #{number} of {axis}: {ops} at nodes {where}"
        )
    op = ops[members[0]]
    if op == "all_to_all_single":
        _check_splits(members, exchange)
    meta = {r: (tuple(exchange.posts[r][1].shape), exchange.posts[r][1].dtype) for r in members}
    if len(set(meta.values())) > 1:
        raise RuntimeFault(
            f"ranks disagree on the shape of {op} #{number} of {axis}: {meta} at {where}"
        )
    sizes = {r: exchange.posts[r][2][-1] for r in members if op[:3] in ("all", "red")}
    if op in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        wrong = {r: s for r, s in sizes.items() if s != len(members)}
        if wrong:
            raise RuntimeFault(
                f"{op} #{number} of {axis}: group size {wrong}, the group has {len(members)}"
            )
    return op, _egress(op, len(members))


def _check_splits(members: tuple[int, ...], exchange: _Exchange) -> None:
    """What a rank expects from each peer must be what that peer sends to it, and be equal for all."""
    for place, rank in enumerate(members):
        _, tensor, (output_splits, input_splits), where = exchange.posts[rank]
        sent = [exchange.posts[peer][2][1][place] for peer in members]
        if list(output_splits) != sent:
            raise RuntimeFault(
                f"rank {rank}, node {where}: output_split_sizes={list(output_splits)} but peers send {sent}"
            )
        if sum(input_splits) != tensor.shape[0] or len(set(input_splits)) > 1:
            raise RuntimeFault(
                f"rank {rank}, node {where}: input_split_sizes={list(input_splits)} do not cut dim 0 of "
                f"{tuple(tensor.shape)} in {len(members)} equal parts"
            )


def _deadlock(
    mailbox: dict[Key, _Exchange], waiting: dict[int, tuple[Key, str] | None]
) -> RuntimeFault:
    lines = []
    for rank, blocked in waiting.items():
        assert blocked is not None
        (axis, members, number), where = blocked
        missing = [m for m in members if m not in mailbox[blocked[0]].posts]
        lines.append(
            f"rank {rank} waits at {where} for {missing} in group {axis} (collective #{number})"
        )
    return RuntimeFault("deadlock: " + "; ".join(lines))


def _check_all_posted(mailbox: dict[Key, _Exchange]) -> None:
    """A collective that some members never started, or that nobody waited for, is a fault of the graph."""
    for (axis, members, number), exchange in mailbox.items():
        missing = [m for m in members if m not in exchange.posts]
        op = next(iter(exchange.posts.values()))[0]
        if missing:
            raise RuntimeFault(
                f"ranks disagree: {op} #{number} of {axis} was never started by {missing}"
            )
        silent = [m for m in members if m not in exchange.waited]
        if silent:
            raise RuntimeFault(f"{op} #{number} of {axis} is never waited for by {silent}")
