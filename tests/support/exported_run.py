"""Steps of an exported folder by real ranks in fresh processes, against the unmodified model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helix_compile import HelixModule
from tests.distributed.steps import torchrun
from tests.support.driver import Reference, deviation, left_padded, random_ids

LENGTHS = [11, 1, 6]
STEPS = (1, 3, 1, 1, 3, 1)


def steps_of(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask) of a ragged prompt and the steps after it; the last row idles in every other one."""
    masks = [left_padded(LENGTHS), *(torch.ones(len(LENGTHS), tokens, dtype=torch.int64) for tokens in STEPS)]
    for mask in masks[1::2]:
        mask[-1] = 0
    return [(random_ids(model, *mask.shape), mask) for mask in masks]


def worst_of_ranks(model: Any, compiled: HelixModule, folder: Path, out: Path, by_axis: bool = False) -> float:
    """Largest deviation of any rank's logits from the model's over all steps.

    Every rank's caches are also those of `compiled` after the same steps, whose ledger other tests hold to the plan.
    """
    steps = steps_of(model)
    named = [
        (f"{what}_{n}", value)
        for n, pair in enumerate(steps)
        for what, value in zip(("ids", "mask"), pair, strict=True)
    ]
    out.mkdir()
    save_file(dict(named), out / "steps.safetensors")
    ranks = compiled.plan.layout.world_size
    arguments = [str(folder), str(out / "steps.safetensors"), str(out), *(["--by-axis"] if by_axis else [])]
    result = torchrun("exported_worker.py", *arguments, processes=ranks, AOTI_RUNTIME_CHECK_INPUTS="1")
    assert result.returncode == 0, result.stderr
    seen = [load_file(out / f"rank_{rank}.safetensors") for rank in range(ranks)]
    reference, worst = Reference(model), 0.0
    for number, (ids, mask) in enumerate(steps):
        compiled(ids, mask)
        expected = reference.step(ids, mask)
        worst = max(worst, *(deviation(rank[f"logits_{number}"], expected, mask) for rank in seen))
    for rank, of_rank in zip(compiled.ranks, seen, strict=True):
        for site, cache in enumerate(rank.cache):
            got = of_rank[f"cache_{site}"]
            assert torch.equal(got.flatten(2).any(-1), cache.flatten(2).any(-1)), (rank.rank, site)
            torch.testing.assert_close(got, cache, rtol=1e-4, atol=1e-5)
    return worst
