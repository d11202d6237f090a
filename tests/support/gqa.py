"""A cache for gqa_decode in which everything that nobody may read is poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STALE = 1e4  # unused slots of a used page: old numbers, finite


@dataclass(frozen=True)
class GqaStep:
    """Sizes of a step; lengths are those that the last new token of each sequence sees.

    Attributes:
        lengths: one a sequence.
        T: new tokens; token t sees `min(T - 1 - t, ..)` fewer slots than the last one.
        K: KV heads.
        G: query heads a KV head.
        Dk: width of a key.
        Dv: width of a value.
        page_size: slots of a page.
        dtype: of q and the caches.
        size: of the scores, about.
    """

    lengths: tuple[int, ...]
    T: int = 1
    K: int = 2
    G: int = 3
    Dk: int = 16
    Dv: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    size: float = 1.0

    def arguments(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """Q, k_cache, v_cache, page_table, visible and scale on the CPU: the arguments of the op."""
        draw = torch.Generator().manual_seed(seed)
        B, pages = len(self.lengths), -(-max(*self.lengths, 1) // self.page_size) + 1
        q = torch.randn(B, self.T, self.K * self.G, self.Dk, generator=draw)
        used = [-(-length // self.page_size) for length in self.lengths]
        table = torch.randperm(B * pages, generator=draw).view(B, pages)
        caches = []
        for D in (self.Dk, self.Dv):
            cache = torch.full((B * pages, self.page_size, self.K, D), torch.nan)
            for b, length in enumerate(self.lengths):
                slots = torch.full((used[b] * self.page_size, self.K, D), STALE)
                slots[:length] = torch.randn(length, self.K, D, generator=draw)
                cache[table[b, : used[b]]] = slots.view(used[b], self.page_size, self.K, D)
            caches.append(cache.to(self.dtype))
        behind = torch.arange(self.T - 1, -1, -1)
        visible = (torch.tensor(self.lengths)[:, None] - behind).clamp(min=0).int()
        scale = self.size / self.Dk**0.5
        return q.to(self.dtype), caches[0], caches[1], table, visible, scale


def first_slots(visible: Tensor, reach: int) -> Tensor:
    """First slots [B, T] of rows that see `reach` slots, one or two fewer, or none of them."""
    spread = torch.arange(visible.numel()).view(visible.shape) % 3
    first = (visible - reach + spread).clamp(min=0).minimum(visible)
    first.view(-1)[::5] = visible.view(-1)[::5]
    return first.int()


def poison_below(cache: Tensor, table: Tensor, visible: Tensor, first: Tensor, tile: int) -> None:
    """NaN in every slot of `cache` below the tile of the first one that a row of the sequence sees, in place."""
    page = cache.shape[1]
    for b in range(len(table)):
        seen = first[b][first[b] < visible[b]]
        slots = torch.arange(int(seen.min()) // tile * tile if len(seen) else 0)
        cache[table[b, slots // page], slots % page] = torch.nan
