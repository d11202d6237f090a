"""The collectives, stated once: torch's op, what leaves a rank, and what each rank gets.

    all_reduce               every rank the sum
    all_gather_into_tensor   every rank all tensors, stacked on dim 0
    reduce_scatter_tensor    rank i part i (dim 0) of the sum
    all_to_all_single        rank i part i (dim 0) of each tensor, stacked on dim 0

The verifier has this arithmetic once more, written apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import c10d, is_call, named

WAIT = c10d.wait_tensor.default


@dataclass(frozen=True)
class CollectiveOp:
    """One collective.

    Attributes:
        name: torch's.
        share: of its argument, how much leaves a rank of a group of so many peers; its own chunk never does.
        outcome: what each rank's tensor becomes, in rank order.
        sums: its second argument says so.
        sized: its last argument before the axis is the number of peers.
    """

    name: str
    share: Callable[[int], Fraction]
    outcome: Callable[[list[Tensor]], list[Tensor]]
    sums: bool = False
    sized: bool = False

    @property
    def target(self) -> Any:
        """Torch's overload."""
        return getattr(c10d, self.name).default

    def egress(self, peers: int, nbytes: int) -> Fraction:
        """Bytes that leave a rank whose argument has `nbytes` (helix-algorithm, section 8)."""
        return self.share(peers) * nbytes


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


ALL_REDUCE = CollectiveOp("all_reduce", lambda n: Fraction(2 * (n - 1), n), _all_reduce, sums=True)  # a ring
ALL_GATHER = CollectiveOp("all_gather_into_tensor", lambda n: Fraction(n - 1), _all_gather, sized=True)
REDUCE_SCATTER = CollectiveOp(
    "reduce_scatter_tensor", lambda n: Fraction(n - 1, n), _reduce_scatter, sums=True, sized=True
)
ALL_TO_ALL = CollectiveOp("all_to_all_single", lambda n: Fraction(n - 1, n), _all_to_all)


COLLECTIVES = {c.name: c for c in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL)}


COLLECTIVE_OF = {c.target: c for c in COLLECTIVES.values()}


def is_collective(node: Any) -> bool:
    """True for the start of a collective (not for its wait_tensor)."""
    return is_call(node, *COLLECTIVE_OF)


def run_collective(graph: fx.Graph, collective: CollectiveOp, *args: Any) -> fx.Node:
    """Nodes that start `collective` and wait for it; returns the wait."""
    return named(graph, "wait_tensor", WAIT, named(graph, collective.name, collective.target, *args))
