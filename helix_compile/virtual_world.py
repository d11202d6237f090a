"""All ranks in this process with real values: one generator a rank, and a mailbox for collectives.

A collective posts its argument and its value is *pending*; at wait_tensor the rank is suspended until every member of
the group has posted, and another rank runs. Collectives are matched by (axis, members, sequence number), as process
groups do, not by node name; so a fault is reported with rank, node and what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.exchange import (
    Exchange,
    Key,
    Post,
    check_all_posted,
    check_axis,
    complete_exchange,
    deadlock_fault,
    egress_bytes,
)
from helix_compile.graph_walk import Hook, Pending, Walk
from helix_compile.mesh import HelixMesh


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

    @property
    def is_leader(self) -> bool:
        """True: one process holds all ranks."""
        return True

    def start(self, claims: Mapping[str, Callable[[], str]]) -> None:
        """Nothing to compare: all ranks come from one model."""

    def share_random_state(self, device: torch.device) -> None:
        """Nothing to share: one process samples."""

    def gather_texts(self, mine: str) -> list[str]:
        """[mine]."""
        return [mine]

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
        steps: dict[fx.Graph, Any] = {}
        walks = {}
        for rank in self.ranks:
            graph = graphs if isinstance(graphs, fx.GraphModule) else graphs[rank]
            walk = Walk(rank, _Mailbox(self.mesh, rank, mailbox).post, steps, hook)
            walks[rank] = walk.graph(graph, inputs[rank], "")
        waiting: dict[int, tuple[Key, str] | None] = dict.fromkeys(walks)
        outputs: dict[int, Any] = {}
        while walks:
            moved = False
            for rank in list(walks):
                blocked, value = waiting[rank], None
                if blocked is not None:
                    if not self._complete(mailbox, blocked[0]):
                        continue
                    value = _take(mailbox[blocked[0]], rank, *blocked)
                moved = True
                try:
                    pending, where = walks[rank].send(value)
                    waiting[rank] = pending.ticket, where
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


class _Mailbox:
    """Where one rank posts what it starts collectives with."""

    def __init__(self, mesh: HelixMesh, rank: int, exchanges: dict[Key, Exchange]):
        self.mesh, self.rank, self.exchanges = mesh, rank, exchanges
        self.posted: dict[str, int] = {}

    def post(self, op: str, args: tuple, where: str) -> Pending:
        axis = args[-1]
        check_axis(self.mesh, axis, self.rank, where)
        number = self.posted.get(axis, 0)
        self.posted[axis] = number + 1
        key = (axis, self.mesh.members(axis, self.rank), number)
        exchange = self.exchanges.setdefault(key, Exchange())
        exchange.posts[self.rank] = Post(op, args[0], tuple(args[1:-1]), where)
        return Pending(op, key)


def _take(exchange: Exchange, rank: int, key: Key, where: str) -> Tensor:
    assert exchange.results is not None
    if rank in exchange.waited:
        op = exchange.posts[rank].op
        raise RuntimeFault(
            f"rank {rank}, node {where}: {op} (collective #{key[2]}) is waited for twice"
        )
    exchange.waited.add(rank)
    return exchange.results.pop(rank)
