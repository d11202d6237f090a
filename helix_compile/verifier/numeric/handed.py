"""Keys that an earlier layer chose, for a layer that is run alone: drawn at random, for the original and for the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.plan.matches import HandedSelection, LayerMatch
from helix_compile.verifier.contract import deal
from helix_compile.verifier.numeric.indexers import as_indices, by_column


def drawn_keys(match: LayerMatch, lengths: list[int], T: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Name of the input -> keys [B, T, n] by position: of each query as many as an indexer would choose.

    The last query sees its own token and those where needles lie (sharpen.plant), as far as k allows.
    """
    found = {}
    for attention in match.attentions:
        selection = attention.selection
        if isinstance(selection, HandedSelection):
            keys = torch.zeros(len(lengths), T, max(lengths) + T, dtype=torch.bool)
            for b, past in enumerate(lengths):
                for t in range(T):
                    seen = past + t + 1
                    drawn = torch.randperm(seen, generator=generator).tolist()
                    first = [seen - 1, 0, past - 1, past // 2] if t == T - 1 and past else []
                    keys[b, t, list(dict.fromkeys([*first, *drawn]))[: selection.top_k]] = True
            found[selection.indices] = keys
    return found


def columns_of(keys: Tensor, mask: Tensor) -> Tensor:
    """Keys [B, T, n] by position as indices [B, T, k] of columns, k of the query that has most; padding in front."""
    T, total = keys.shape[1], mask.shape[1]
    seen = (torch.arange(total) <= torch.arange(total - T, total)[:, None]) & (mask[:, None] > 0)
    chosen = by_column(keys, mask, False)
    k = int(chosen.sum(dim=-1).max())
    return as_indices(chosen, ~seen, k, otherwise=torch.zeros(*keys.shape[:2], k, dtype=torch.int64))


def local_slots(keys: Tensor, kvp_rank: int, cp: int, tokens_per_block: int, most: int) -> tuple[Tensor, Tensor]:
    """A rank's slots [B, T, m] int32 of keys [B, T, n] by position, ascending, and how many there are [B, T].

    Args:
        most: slots of a sequence on one rank.
    """
    mine = keys[..., deal(keys.shape[-1], cp, tokens_per_block)[kvp_rank]]
    count = mine.sum(dim=-1).to(torch.int32)
    m = min(int(keys.sum(dim=-1).max()), most)
    slots = torch.sort((~mine).int(), dim=-1, stable=True).indices[..., :m]
    slots = torch.nn.functional.pad(slots, (0, m - slots.shape[-1]))
    return torch.where(torch.arange(m) < count[..., None], slots, 0).to(torch.int32), count
