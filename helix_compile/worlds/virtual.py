"""All ranks in this process with real values: one generator a rank, and a mailbox for what they exchange.

A collective posts its argument and its value is *pending*; at wait_tensor the rank is suspended until every member of
the group has posted, and another rank runs. Collectives are matched by (axis, members, sequence number), as process
groups do, not by node name; so a fault is reported with rank, node and what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.collectives import ALL_TO_ALL, COLLECTIVES, CollectiveOp
from helix_compile.layout.degrees import HelixMesh
from helix_compile.worlds.program import Program
from helix_compile.worlds.tape import Tape, recorded
from helix_compile.worlds.walk import Graphs, Hook, Pending, Walk

Key = tuple[str, tuple[int, ...], int]  # axis, members of the group, sequence number


class Post(NamedTuple):
    """What one rank starts a collective with."""

    op: str
    arguments: tuple
    where: str


@dataclass
class Exchange:
    """One collective: what each member posted, then what each member gets."""

    posts: dict[int, Post] = field(default_factory=dict)
    sent: dict[int, Tensor] = field(default_factory=dict)  # until all have posted
    results: dict[int, Tensor] | None = None
    waited: set[int] = field(default_factory=set)


def check_axis(mesh: HelixMesh, axis: str, rank: int, where: str) -> None:
    """Raise RuntimeFault unless `axis` is an axis of the mesh."""
    if axis not in mesh.groups:
        raise RuntimeFault(f"rank {rank}, node {where}: unknown axis {axis!r}; one of {', '.join(mesh.groups)}")


def _agreed_op(key: Key, exchange: Exchange) -> CollectiveOp:
    """What all members have posted; RuntimeFault where they do not agree."""
    axis, members, number = key
    posts = [exchange.posts[r] for r in members]

    def differ(values: Sequence[Any]) -> dict[int, Any]:
        """By rank, if they are not all alike."""
        return dict(zip(members, values, strict=True)) if any(v != values[0] for v in values) else {}

    def where() -> dict[int, str]:
        return {r: exchange.posts[r].where for r in members}

    if ops := differ([p.op for p in posts]):
        raise RuntimeFault(f"ranks disagree on collective #{number} of {axis}: {ops} at nodes {where()}")
    op = COLLECTIVES[posts[0].op]
    if op is ALL_TO_ALL:
        _check_splits(members, exchange)
    if op.sums and any(p.arguments[0] != "sum" for p in posts):
        reductions = {r: exchange.posts[r].arguments[0] for r in members}
        raise RuntimeFault(f"{op.name} #{number} of {axis} at {where()}: reductions {reductions}; this world sums")
    if meta := differ([(tuple(exchange.sent[r].shape), exchange.sent[r].dtype) for r in members]):
        raise RuntimeFault(f"ranks disagree on the shape of {op.name} #{number} of {axis}: {meta} at {where()}")
    if op.sized and (wrong := {r: s for r in members if (s := exchange.posts[r].arguments[-1]) != len(members)}):
        raise RuntimeFault(f"{op.name} #{number} of {axis}: group size {wrong}, the group has {len(members)}")
    return op


def _check_splits(members: tuple[int, ...], exchange: Exchange) -> None:
    """What a rank expects from each peer must be what that peer sends to it, and be equal for all."""
    for index, rank in enumerate(members):
        _, (output_splits, input_splits), where = exchange.posts[rank]
        sent = [exchange.posts[peer].arguments[1][index] for peer in members]
        if list(output_splits) != sent:
            raise RuntimeFault(
                f"rank {rank}, node {where}: output_split_sizes={list(output_splits)} but peers send {sent}"
            )
        if sum(input_splits) != exchange.sent[rank].shape[0] or len(set(input_splits)) > 1:
            raise RuntimeFault(
                f"rank {rank}, node {where}: input_split_sizes={list(input_splits)} do not cut dim 0 of "
                f"{tuple(exchange.sent[rank].shape)} in {len(members)} equal parts"
            )


def deadlock_fault(mailbox: dict[Key, Exchange], waiting: dict[int, tuple[Key, str] | None]) -> RuntimeFault:
    """Nobody can move: who waits where, and for whom."""
    lines = []
    for rank, blocked in waiting.items():
        assert blocked is not None
        (axis, members, number), where = blocked
        missing = [m for m in members if m not in mailbox[blocked[0]].posts]
        lines.append(f"rank {rank} waits at {where} for {missing} in group {axis} (collective #{number})")
    return RuntimeFault("deadlock: " + "; ".join(lines))


def check_all_posted(mailbox: dict[Key, Exchange]) -> None:
    """A collective that some members never started, or that nobody waited for, is a fault of the graph."""
    for (axis, members, number), exchange in mailbox.items():
        missing = [m for m in members if m not in exchange.posts]
        op = next(iter(exchange.posts.values())).op
        if missing:
            raise RuntimeFault(f"ranks disagree: {op} #{number} of {axis} was never started by {missing}")
        silent = [m for m in members if m not in exchange.waited]
        if silent:
            raise RuntimeFault(f"{op} #{number} of {axis} is never waited for by {silent}")


class VirtualWorld:
    """Runs one graph per rank to completion, ranks taking turns.

    Attributes:
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
    def host_collectives(self) -> str:
        """Nothing: they are copies and sums."""
        return ""

    @property
    def is_leader(self) -> bool:
        """True: one process holds all ranks."""
        return True

    def start(self, claims: Mapping[str, Callable[[], str]]) -> None:
        """Nothing to compare: all ranks come from one model."""

    def settle(self) -> None:
        """Nothing to compare: every rank was given the same tensors."""

    def share_random_state(self, device: torch.device) -> None:
        """Nothing to share: one process samples."""

    def gather_texts(self, mine: str) -> list[str]:
        """[mine]."""
        return [mine]

    @property
    def sent_bytes(self) -> list[Fraction]:
        """Bytes that left each rank since the last reset_counters()."""
        sent = [Fraction(0)] * self.mesh.world_size
        for (op, members, nbytes), count in self._sent.items():
            for rank in members:
                sent[rank] += count * COLLECTIVES[op].egress(len(members), nbytes)
        return sent

    def reset_counters(self) -> None:
        """Start counting bytes and collectives again."""
        self._sent = Counter[tuple[str, tuple[int, ...], int]]()  # (op, members, bytes of an argument)
        self.num_collectives: Counter[tuple[str, str]] = Counter()

    def run(
        self,
        graphs: Graphs,
        inputs: Sequence[Sequence[Any]],
        hook: Hook | None = None,
        agreed: Mapping[str, Tensor] | None = None,
    ) -> list[Any]:
        """Run `graphs` (one for all, or one a rank) on `inputs[rank]`; returns the outputs by rank.

        Args:
            hook: called with (rank, node, value) after every node; a call_module's nodes come before it.
            agreed: not read: one process gives what all ranks must have alike.

        Raises:
            RuntimeFault: deadlock, ranks that disagree, a pending value that is used, split sizes that do not fit.
        """
        mailbox: dict[Key, Exchange] = {}
        steps: dict[fx.Graph, Any] = {}
        walks = {}
        for rank in self.ranks:
            graph = graphs if isinstance(graphs, fx.GraphModule) else graphs[rank]
            walks[rank] = Walk(rank, self._post_of(rank, mailbox), steps, hook).graph(graph, inputs[rank], "")
        return self._take_turns(walks, mailbox)

    def run_programs(
        self,
        programs: Sequence[Program],
        step: Mapping[str, Tensor],
        agreed: Mapping[str, Tensor] | None = None,
        tape: Tape | None = None,
    ) -> list[Any]:
        """Run a step that is prepared: one program a rank, all on the inputs `step`; returns and raises as run().

        Args:
            tape: an empty one records the step, a recorded one takes it: `programs` are not walked then.
        """
        if tape is not None and tape.is_done:
            self._sent.update(tape.sent)
            self.num_collectives.update(tape.collectives)
            played: list[Any] = tape.play()
            return played
        mailbox: dict[Key, Exchange] = {}
        walks = {p.rank: p.walk(step, self._post_of(p.rank, mailbox), tape) for p in programs}
        if tape is None:
            return self._take_turns(walks, mailbox)
        with recorded(tape, self._sent, self.num_collectives):
            return tape.finish(self._take_turns(walks, mailbox, tape))

    def _take_turns(
        self,
        walks: dict[int, Generator[tuple[Pending, str], Tensor | None, Any]],
        mailbox: dict[Key, Exchange],
        tape: Tape | None = None,
    ) -> list[Any]:
        waiting: dict[int, tuple[Key, str] | None] = dict.fromkeys(walks)
        outputs: dict[int, Any] = {}
        while walks:
            moved = False
            for rank in list(walks):
                blocked, value = waiting[rank], None
                if blocked is not None:
                    if not self._complete(mailbox, blocked[0], tape):
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

    def _post_of(self, rank: int, mailbox: dict[Key, Exchange]) -> Callable[[str, tuple, str], Pending]:
        """How one rank posts what it starts collectives with."""
        posted = Counter[str]()

        def post(op: str, args: tuple, where: str) -> Pending:
            axis = args[-1]
            check_axis(self.mesh, axis, rank, where)
            key = (axis, self.mesh.members(axis, rank), posted[axis])
            posted[axis] += 1
            exchange = mailbox.setdefault(key, Exchange())
            exchange.posts[rank], exchange.sent[rank] = Post(op, args[1:-1], where), args[0]
            return Pending(op, key)

        return post

    def _complete(self, mailbox: dict[Key, Exchange], key: Key, tape: Tape | None) -> bool:
        exchange = mailbox[key]
        axis, members, _ = key
        if exchange.results is None and len(exchange.posts) == len(members):
            op = _agreed_op(key, exchange)
            tensors = [exchange.sent[rank] for rank in members]
            outcome = op.outcome(tensors) if tape is None else tape.launch(op.outcome, (tensors,))
            exchange.results = dict(zip(members, outcome, strict=True))
            self._sent[op.name, members, tensors[0].nbytes] += 1  # all alike
            exchange.sent.clear()
            self.num_collectives[(op.name, axis)] += 1
        return exchange.results is not None


def _take(exchange: Exchange, rank: int, key: Key, where: str) -> Tensor:
    assert exchange.results is not None
    if rank in exchange.waited:
        op = exchange.posts[rank].op
        raise RuntimeFault(f"rank {rank}, node {where}: {op} (collective #{key[2]}) is waited for twice")
    exchange.waited.add(rank)
    return exchange.results.pop(rank)
