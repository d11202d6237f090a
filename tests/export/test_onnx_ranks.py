"""Rank models of an ONNX export against the unmodified model, in onnx's reference evaluator, one thread a rank.

Logits alone see neither a wrong ledger that all ranks agree on nor a cache that is not handed on: final caches are compared with
those of the compiled module, whose ledger other tests hold to the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_compile import HelixModule, helix_compile
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.models import tiny_model
from tests.support.onnx_ranks import OnnxRanks, largest_difference

PROMPT = [5, 2, 9, 1]
STEPS = (1, 3, 1, 1, 3, 1, 1, 1)
TOLERANCE = 1e-5


def compiled_tiny(**options: Any) -> HelixModule:
    sizes = {"cp": 4, "tokens_per_block": 4, "max_batch_size": 4, "max_seq_len": 64}
    return helix_compile(tiny_model("plain", torch.float32), **{**sizes, **options})


def run(
    model: Any, compiled: HelixModule, ranks: OnnxRanks, idle: int | None = 3, steps: tuple[int, ...] = STEPS
) -> float:
    """Largest deviation over a ragged prompt and `steps`, one row idle in some of them; every rank has the same logits."""
    reference, mask, worst = Reference(model), left_padded(PROMPT), 0.0
    for number, tokens in enumerate((0, *steps)):
        if number:
            mask = torch.ones(len(PROMPT), tokens, dtype=torch.int64)
            if idle is not None and number % 2:
                mask[idle] = 0
        ids = random_ids(model, *mask.shape)
        compiled(ids, mask)
        logits = ranks.step(ids, mask)
        assert largest_difference(logits) == 0.0
        worst = max(worst, deviation(torch.tensor(logits[0]), reference.step(ids, mask), mask))
    return worst


def check_caches(compiled: HelixModule, ranks: OnnxRanks) -> None:
    """Each rank holds what the compiled module's does, token by token, and nothing else."""
    filled = 0
    for rank in compiled.ranks:
        for site, expected in enumerate(rank.cache):
            got: Tensor = torch.tensor(ranks.caches[rank.rank][f"cache_{site}"])
            assert torch.equal(got.flatten(2).any(-1), expected.flatten(2).any(-1)), (rank.rank, site)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            filled += int(expected.flatten(2).any(-1).sum())
    assert filled == int(compiled.lengths.sum()) * len(compiled.ranks[0].cache) * compiled.plan.layout.tpa


def test_four_ranks_are_the_model(tmp_path: Path) -> None:
    """Prompt and 8 steps: MLA, dense and routed FFN; row 3 idles, and most ranks hold nothing of the short rows."""
    compiled = compiled_tiny()
    ranks = OnnxRanks(tmp_path / "out", compiled.export(tmp_path / "out"))
    assert run(tiny_model("plain", torch.float32), compiled, ranks) <= TOLERANCE
    assert any(not cache.any() for rank in compiled.ranks for cache in [rank.cache[0][3]])
    check_caches(compiled, ranks)
