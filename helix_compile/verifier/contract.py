"""The rank arithmetic once more, written apart from layout/placement: the verifier must not trust what it checks."""

from __future__ import annotations

from helix_compile.layout.degrees import HelixLayout


def deal(length: int, cp: int, tokens_per_block: int) -> list[list[int]]:
    """Positions of each CP rank, dealt block by block like cards: the contract, written apart from ledger.py."""
    hands: list[list[int]] = [[] for _ in range(cp)]
    for block, start in enumerate(range(0, length, tokens_per_block)):
        hands[block % cp].extend(range(start, min(start + tokens_per_block, length)))
    return hands


# the two axes of each view: ranks that agree on one differ in the other
OTHER_AXIS = {"kvp": "tpa", "tpa": "kvp", "ep": "tpf", "tpf": "ep"}


def coordinate(axis: str, rank: int, layout: HelixLayout) -> int:
    """Place of a rank along an axis, by the contract."""
    return {
        "world": rank,
        "kvp": rank % layout.kvp,
        "tpa": rank // layout.kvp,
        "tpf": rank % layout.tpf,
        "ep": rank // layout.tpf,
    }[axis]
