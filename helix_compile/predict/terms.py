"""What nodes cost as a function of batch and context: terms that a planner adds up, and a page too (views/plan_page.js).

    flops  =  f0 + f1 B + fL B L        bytes  =  b0 + b1 B + bL B L  +  weights * hit(B)  +  cached * B L        wire  =  w B

B sequences of one new token each; L what of a sequence's context a rank's attention sees (`seen`). Plain data: no node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from helix_compile.layout.ledger import local_length
from helix_compile.predict.accelerators import Times

ATTENTION, MATMUL, OTHER = "attention", "matmul", "other"
ALL, WINDOW, CHUNK, TOP = "all", "window", "chunk", "top"


@dataclass(frozen=True)
class Term:
    """One node, or all nodes of a group that only move bytes.

    Attributes:
        what: its name in the graph, or what the nodes are; equal terms may have several.
        kind: "attention", "matmul", "other", or a collective's name.
        flops, moved: coefficients of 1, B and B L; `moved` are bytes besides weights and cache.
        weights: bytes of parameters that a matmul reads; of experts all that a rank holds.
        cached: bytes of cache for each B L.
        wire: bytes that leave the rank for each B.
        peers: ranks of a collective's group.
        routed: (experts a token chooses, experts) where only those that some token chose are read.
        reach: ("all", 0), ("window", W), ("chunk", C) or ("top", k): what a query sees.
        launches: nodes that it stands for.
        chunk: (site, step) of what is done once for each part of the batch; see overlap.py.
        whole: of that, what every part does with the rows of all.
    """

    what: str = field(compare=False)
    kind: str
    flops: tuple[float, float, float] = (0.0, 0.0, 0.0)
    moved: tuple[float, float, float] = (0.0, 0.0, 0.0)
    weights: float = 0.0
    cached: float = 0.0
    wire: float = 0.0
    peers: int = 1
    routed: tuple[int, int] | None = None
    reach: tuple[str, int] = (ALL, 0)
    launches: int = 1
    chunk: tuple[int, int] | None = None
    whole: bool = False

    @property
    def is_collective(self) -> bool:
        """Does it move between ranks?"""
        return self.kind not in (ATTENTION, MATMUL, OTHER)

    @property
    def is_idle(self) -> bool:
        """A collective of one rank, which no graph has."""
        return self.is_collective and self.peers == 1

    @property
    def attends(self) -> bool:
        """Does it go by what a rank holds of the context?"""
        return bool(self.flops[2] or self.moved[2] or self.cached)

    def flops_at(self, B: Times, L: int) -> Times:
        """On one rank."""
        f0, f1, fL = self.flops
        return f0 + f1 * B + fL * B * L

    def bytes_at(self, B: Times, L: int, weights: float = 1.0, cache: float = 1.0) -> Times:
        """Of memory, on one rank; `weights` and `cache`: what another format makes of a byte of these."""
        b0, b1, bL = self.moved
        hit = 1.0 - (1.0 - self.routed[0] / self.routed[1]) ** B if self.routed else 1.0
        return b0 + b1 * B + bL * B * L + weights * hit * self.weights + cache * self.cached * B * L


def seen(reach: tuple[str, int], context: int, cp: int, tokens_per_block: int) -> int:
    """Tokens of a sequence of `context` cached ones and a new one that a query sees on CP rank 0, which has the most."""
    kind, width = reach
    held = local_length(context + 1, 0, cp, tokens_per_block)
    if kind == TOP:
        return min(held, -(-width // cp))
    oldest = 0
    if kind == WINDOW:
        oldest = max(0, context + 1 - width)
    elif kind == CHUNK:
        oldest = context // width * width
    return int(held - local_length(oldest, 0, cp, tokens_per_block))


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The same, nodes that only move bytes in one: each of them is bound by memory on every machine there is."""
    kept: list[Term] = []
    moving: dict[tuple[object, bool], list[Term]] = {}
    for term in terms:
        if term.kind == OTHER and term.reach == (ALL, 0) and not term.flops[2] and not term.moved[2]:
            moving.setdefault((term.chunk, term.whole), []).append(term)
        else:
            kept.append(term)
    for small in moving.values():
        flops, moved = (tuple(sum(getattr(t, name)[i] for t in small) for i in range(3)) for name in ("flops", "moved"))
        launches = sum(t.launches for t in small)
        kept.append(replace(small[0], what="elementwise", flops=flops, moved=moved, launches=launches))
    return tuple(kept)
