"""Sparse attention in tests: the unmodified model with ties of its indexer broken by position, and steps side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids

_TOPK = torch.ops.aten.topk.default


class TiesByPosition(TorchDispatchMode):
    """torch.topk leaves it open which of equal scores it takes; an indexer's takes the earliest while this is open.

    An indexer's is told from a router's by its rows: [batch, tokens, context].
    """

    def __init__(self, batch: int, tokens: int):
        super().__init__()
        self.rows = (batch, tokens)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _TOPK or tuple(args[0].shape[:2]) != self.rows or args[0].dim() != 3:
            return func(*args, **(kwargs or {}))
        values, indices = (args[0] + 0.0).sort(dim=-1, descending=True, stable=True)
        return values[..., : args[1]], indices[..., : args[1]]


def sparse_deviation(model: Any, compiled: Any, lengths: list[int], steps: tuple[int, ...], seed: int = 0) -> float:
    """Largest deviation of a logit, over the largest, of a ragged left-padded prompt and steps; islands widened on both sides."""
    torch.manual_seed(seed)
    reference, mask, worst = Reference(model), left_padded(lengths), 0.0
    compiled.reset()
    for tokens in (mask.shape[1], *steps):
        if reference.mask is not None:
            mask = torch.ones(len(lengths), tokens, dtype=torch.int64)
        ids = random_ids(model, len(lengths), tokens)
        with WidenedIslands():
            got = compiled(ids, mask)
            with TiesByPosition(*ids.shape):
                expected = reference.step(ids, mask)
        worst = max(worst, deviation(got, expected, mask))
    return worst
