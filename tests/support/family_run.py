"""One family against the unmodified model: ragged left-padded prompt, six steps of T in {1, 3}, greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from helix_compile import helix_compile
from helix_compile.numerics import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids

PROMPT = [5, 2, 9]
STEPS = (1, 3, 1, 1, 3, 1)


@dataclass(frozen=True)
class FamilyRun:
    """Largest deviation of a logit over the largest logit, and whether every greedy token was the same."""

    worst: float
    same_tokens: bool


def compiled_family(model: Any, cp: int, **options: Any) -> Any:
    return helix_compile(
        model, cp=cp, tokens_per_block=2, max_batch_size=3, max_seq_len=64, **options
    )


def run_family(model: Any, compiled: Any) -> FamilyRun:
    """Steps of one token feed the greedy one, so a wrong token is not forgotten."""
    reference, mask = Reference(model), left_padded(PROMPT)
    torch.manual_seed(1)
    ids, worst, same = random_ids(model, *mask.shape), 0.0, True
    for tokens in (*STEPS, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        worst = max(worst, deviation(got, expected, mask))
        last = expected[:, -1].argmax(-1)
        same = same and torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(PROMPT), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(PROMPT), tokens)
    return FamilyRun(worst, same)
