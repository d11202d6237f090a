"""The rank arithmetic once more, written apart from layout/placement: the verifier must not trust what it checks."""

from __future__ import annotations

from helix_compile.layout.degrees import HelixLayout


def deal(length: int, cp: int, tokens_per_block: int) -> list[list[int]]:
    """Positions of each CP rank, dealt block by block like cards: the contract, written apart from ledger.py."""
    hands: list[list[int]] = [[] for _ in range(cp)]
    for block, start in enumerate(range(0, length, tokens_per_block)):
        hands[block % cp].extend(range(start, min(start + tokens_per_block, length)))
    return hands


def head_places(heads: int, kv_heads: int, layout: HelixLayout) -> list[int | None]:
    """Which head of the model lies on each place of all ranks together, None where a zero head does; in order.

    As many KV heads as tpa can share; then the fewest query heads in each group with which every rank owns as many.
    """
    groups, ranks = max(kv_heads, 1), layout.kvp * layout.tpa
    there = groups
    while kv_heads and there % layout.tpa:
        there += 1
    size = heads // groups
    room = size
    while there * room % ranks:
        room += 1
    return places_of(groups, size, there, room)


def places_of(groups: int, size: int, there: int, room: int) -> list[int | None]:
    """Heads in `groups` of `size`, dealt onto `there` groups of `room` places; None: a zero head."""
    numbers = iter(range(groups * size))
    return [next(numbers) if g < groups and j < size else None for g in range(there) for j in range(room)]


def kv_share(heads: int, kv_heads: int, rank: int, layout: HelixLayout, alone: bool) -> tuple[int, int]:
    """(part, parts) of the KV heads that a rank caches. `alone`: it attends by itself, and has those that its own query heads read."""
    if not alone or not kv_heads:
        return coordinate("tpa", rank, layout), layout.tpa
    mine = heads // (layout.kvp * layout.tpa)
    read = sorted({q * kv_heads // heads for q in range(rank * mine, (rank + 1) * mine)})
    return read[0] // len(read), kv_heads // len(read)


def parts_of_batch(overlap: str, alone: bool) -> int:
    """In how many parts a batch attends and exchanges. `alone`: there is nothing to exchange."""
    return 2 if overlap == "hopb" and not alone else 1


# tokens of a page
PAGE = 128


def kept_in_ring(length: int, pages: int) -> list[int]:
    """Positions that a ring of so many pages still holds of a sequence: as each page is begun, the oldest one goes."""
    held: list[range] = []
    for start in range(0, length, PAGE):
        held = [*held, range(start, min(start + PAGE, length))][-pages:]
    return [p for page in held for p in page]


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
