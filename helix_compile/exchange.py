"""What ranks of one process exchange: posts that must agree, what each rank gets, and bytes that leave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from helix_compile.errors import RuntimeFault
from helix_compile.mesh import HelixMesh

Key = tuple[str, tuple[int, ...], int]  # axis, members of the group, sequence number


class Post(NamedTuple):
    """What one rank starts a collective with."""

    op: str
    tensor: Tensor
    arguments: tuple
    where: str


@dataclass
class Exchange:
    """One collective: what each member posted, then what each member gets."""

    posts: dict[int, Post] = field(default_factory=dict)
    results: dict[int, Tensor] | None = None
    waited: set[int] = field(default_factory=set)

    def drop_arguments(self) -> None:
        """Keep who posted what and where, not the tensors."""
        self.posts = {r: p._replace(tensor=p.tensor.new_empty(0)) for r, p in self.posts.items()}


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


def egress_bytes(op: str, peers: int, tensor: Tensor) -> Fraction:
    """Bytes that leave a rank: all_reduce as a ring, own chunk never counted (helix-algorithm, section 8)."""
    factor = {
        "all_reduce": Fraction(2 * (peers - 1), peers),
        "all_gather_into_tensor": Fraction(peers - 1),
        "reduce_scatter_tensor": Fraction(peers - 1, peers),
        "all_to_all_single": Fraction(peers - 1, peers),
    }[op]
    return factor * tensor.numel() * tensor.dtype.itemsize


def check_axis(mesh: HelixMesh, axis: str, rank: int, where: str) -> None:
    """Raise RuntimeFault unless `axis` is an axis of the mesh."""
    if axis not in mesh.groups:
        raise RuntimeFault(
            f"rank {rank}, node {where}: unknown axis {axis!r}; one of {', '.join(mesh.groups)}"
        )


def complete_exchange(key: Key, exchange: Exchange) -> str:
    """All members have posted: check that they agree, and give each its result. Returns the op's name."""
    op, members = _agreed_op(key, exchange), key[1]
    tensors = [exchange.posts[rank].tensor for rank in members]
    exchange.results = dict(zip(members, _OUTCOME[op](tensors), strict=True))
    return op


def _agreed_op(key: Key, exchange: Exchange) -> str:
    axis, members, number = key
    ops = {r: exchange.posts[r].op for r in members}
    where = {r: exchange.posts[r].where for r in members}
    if len(set(ops.values())) > 1:
        raise RuntimeFault(
            f"ranks disagree on collective #{number} of {axis}: {ops} at nodes {where}"
        )
    op = ops[members[0]]
    if op == "all_to_all_single":
        _check_splits(members, exchange)
    if op in ("all_reduce", "reduce_scatter_tensor"):
        reductions = {r: exchange.posts[r].arguments[0] for r in members}
        if set(reductions.values()) != {"sum"}:
            raise RuntimeFault(
                f"{op} #{number} of {axis} at {where}: reductions {reductions}; this world sums"
            )
    sent = {r: exchange.posts[r].tensor for r in members}
    meta = {r: (tuple(x.shape), x.dtype) for r, x in sent.items()}
    if len(set(meta.values())) > 1:
        raise RuntimeFault(
            f"ranks disagree on the shape of {op} #{number} of {axis}: {meta} at {where}"
        )
    if op in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        sizes = {r: exchange.posts[r].arguments[-1] for r in members}
        wrong = {r: s for r, s in sizes.items() if s != len(members)}
        if wrong:
            raise RuntimeFault(
                f"{op} #{number} of {axis}: group size {wrong}, the group has {len(members)}"
            )
    return op


def _check_splits(members: tuple[int, ...], exchange: Exchange) -> None:
    """What a rank expects from each peer must be what that peer sends to it, and be equal for all."""
    for place, rank in enumerate(members):
        _, tensor, (output_splits, input_splits), where = exchange.posts[rank]
        sent = [exchange.posts[peer].arguments[1][place] for peer in members]
        if list(output_splits) != sent:
            raise RuntimeFault(
                f"rank {rank}, node {where}: output_split_sizes={list(output_splits)} but peers send {sent}"
            )
        if sum(input_splits) != tensor.shape[0] or len(set(input_splits)) > 1:
            raise RuntimeFault(
                f"rank {rank}, node {where}: input_split_sizes={list(input_splits)} do not cut dim 0 of "
                f"{tuple(tensor.shape)} in {len(members)} equal parts"
            )


def deadlock_fault(
    mailbox: dict[Key, Exchange], waiting: dict[int, tuple[Key, str] | None]
) -> RuntimeFault:
    """Nobody can move: who waits where, and for whom."""
    lines = []
    for rank, blocked in waiting.items():
        assert blocked is not None
        (axis, members, number), where = blocked
        missing = [m for m in members if m not in mailbox[blocked[0]].posts]
        lines.append(
            f"rank {rank} waits at {where} for {missing} in group {axis} (collective #{number})"
        )
    return RuntimeFault("deadlock: " + "; ".join(lines))


def check_all_posted(mailbox: dict[Key, Exchange]) -> None:
    """A collective that some members never started, or that nobody waited for, is a fault of the graph."""
    for (axis, members, number), exchange in mailbox.items():
        missing = [m for m in members if m not in exchange.posts]
        op = next(iter(exchange.posts.values())).op
        if missing:
            raise RuntimeFault(
                f"ranks disagree: {op} #{number} of {axis} was never started by {missing}"
            )
        silent = [m for m in members if m not in exchange.waited]
        if silent:
            raise RuntimeFault(f"{op} #{number} of {axis} is never waited for by {silent}")
