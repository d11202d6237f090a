"""TensorRT-LLM's placement vectors, and the formulas against plain counting."""

from __future__ import annotations

import pytest
import torch

from helix_compile.layout.ledger import local_length, local_slot, owner_rank, position_of_slot, positions_on_rank

# (tokens_per_block, cp, tokens) -> tokens of each rank, named 1, 2, ... (helix-algorithm, section 4)
PLACEMENT = [
    (2, 4, 13, [[1, 2, 9, 10], [3, 4, 11, 12], [5, 6, 13], [7, 8]]),
    (4, 2, 12, [[1, 2, 3, 4, 9, 10, 11, 12], [5, 6, 7, 8]]),
    (4, 4, 10, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]),
]
LENGTHS = [
    (1, 32, 4, [1, 0, 0, 0]),
    (100, 32, 4, [32, 32, 32, 4]),
    (129, 32, 4, [33, 32, 32, 32]),
    (7, 1, 3, [3, 2, 2]),
]


@pytest.mark.parametrize(("tokens_per_block", "cp", "tokens", "ranks"), PLACEMENT)
def test_placement_vectors(tokens_per_block: int, cp: int, tokens: int, ranks: list[list[int]]) -> None:
    for rank, expected in enumerate(ranks):
        held = positions_on_rank(tokens, rank, cp, tokens_per_block) + 1
        assert held.tolist() == expected


@pytest.mark.parametrize(("length", "tokens_per_block", "cp", "expected"), LENGTHS)
def test_local_lengths(length: int, tokens_per_block: int, cp: int, expected: list[int]) -> None:
    assert [local_length(length, r, cp, tokens_per_block) for r in range(cp)] == expected
    tensor = torch.tensor([length])
    assert [int(local_length(tensor, r, cp, tokens_per_block)) for r in range(cp)] == expected


@pytest.mark.parametrize("tokens_per_block", [1, 2, 3, 5, 32])
@pytest.mark.parametrize("cp", [1, 2, 3, 8])
def test_formulas_against_counting(tokens_per_block: int, cp: int) -> None:
    held: list[list[int]] = [[] for _ in range(cp)]
    for position in range(300):
        rank = owner_rank(position, cp, tokens_per_block)
        assert local_slot(position, cp, tokens_per_block) == len(held[rank])
        assert position_of_slot(len(held[rank]), rank, cp, tokens_per_block) == position
        held[rank].append(position)
        lengths = [local_length(position + 1, r, cp, tokens_per_block) for r in range(cp)]
        assert lengths == [len(h) for h in held]


def test_decode_goes_on_where_the_prompt_ended() -> None:
    """L=10, tpb=4, cp=4: the first decoded token belongs to rank 2, not to a rotation that restarts at rank 0."""
    assert owner_rank(10, 4, 4) == 2
