"""Padding before, behind or instead of a row's tokens, another kind at every step: each row is its own sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, random_ids
from tests.support.models import tiny_model
from tests.support.numerics import LIMIT

L, R, IDLE, FULL = "left", "right", "idle", "full"
# (columns, for each row: kind and tokens); row 2 begins late, row 1 pauses, one step is idle for all
STEPS: list[tuple[int, list[tuple[str, int]]]] = [
    (9, [(L, 4), (R, 7), (IDLE, 0)]),
    (5, [(FULL, 5), (IDLE, 0), (L, 2)]),
    (1, [(FULL, 1), (IDLE, 0), (FULL, 1)]),
    (4, [(IDLE, 0), (R, 3), (L, 1)]),
    (1, [(IDLE, 0), (IDLE, 0), (IDLE, 0)]),
    (6, [(R, 1), (L, 6), (R, 5)]),
    (1, [(FULL, 1), (FULL, 1), (FULL, 1)]),
]


def row_mask(columns: int, kind: str, tokens: int) -> list[int]:
    rest = [0] * (columns - tokens)
    return rest + [1] * tokens if kind == L else [1] * tokens + rest


@pytest.mark.parametrize(
    "plan",
    [
        {"cp": 4, "tokens_per_block": 3, "v_up": "after"},
        {"cp": 8, "tokens_per_block": 1},
        {"cp": 2, "tpa": 2, "tokens_per_block": 2, "merge": "ag_rs", "q_proj": "gather"},
    ],
    ids=str,
)
def test_each_row_is_its_own_sequence(plan: dict[str, Any]) -> None:
    model = tiny_model()
    compiled = helix_compile(model, max_seq_len=64, **plan)
    references = [Reference(model) for _ in range(3)]
    lengths = [0, 0, 0]
    for columns, rows in STEPS:
        mask = torch.tensor([row_mask(columns, *row) for row in rows])
        ids = random_ids(model, 3, columns)
        with WidenedIslands():
            logits: Tensor = compiled(ids, mask)
            for row, (reference, (_, tokens)) in enumerate(zip(references, rows, strict=True)):
                lengths[row] += tokens
                if tokens:
                    kept = mask[row].bool()
                    ones = torch.ones(1, tokens, dtype=torch.int64)
                    expected = reference.step(ids[row : row + 1, kept], ones)
                    got = logits[row : row + 1, kept]
                    assert deviation(got, expected, ones) <= LIMIT[torch.float64]
        assert torch.isfinite(logits).all()
        assert compiled.lengths.tolist() == lengths


def test_what_stands_at_padding_does_not_matter() -> None:
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=2, max_seq_len=64)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    ids, step = random_ids(model, 2, 5), random_ids(model, 2, 1)
    results = []
    for filler in (0, 96):
        compiled.reset()
        prompt = compiled(torch.where(mask.bool(), ids, filler), mask)
        results.append(torch.cat([prompt[mask.bool()], compiled(step)[:, 0]]))
    assert torch.equal(*results)


def test_masks_of_other_dtypes_and_int32_ids() -> None:
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=2, max_seq_len=64)
    mask, ids = torch.tensor([[0, 1, 1], [1, 1, 1]]), random_ids(model, 2, 3)
    expected = compiled(ids, mask)
    for dtype in (torch.bool, torch.int32, torch.float32):
        compiled.reset()
        assert torch.equal(compiled(ids.int(), mask.to(dtype)), expected)
