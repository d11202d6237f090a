"""Arguments of the ops of sparse attention in hostile memory, and scores that are hard to order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.kernels.reference_sparse import topk_candidates_reference
from helix_compile.layout.ledger import local_length

# what a comparison may get wrong: signed zeros, NaN of both signs, infinities, subnormals
NEGATIVE_NAN = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32).item()
HARD = torch.tensor([0.0, -0.0, torch.nan, NEGATIVE_NAN, torch.inf, -torch.inf, 1.0, -1.0, 1e-40, -1e-40])


def hidden(scores: Tensor, visible: Tensor) -> Tensor:
    """Scores [B, T, n] as index_scores leaves them: -inf from `visible` on."""
    return scores.masked_fill(torch.arange(scores.shape[-1]) >= visible[..., None], -torch.inf)


def scores_of(kind: str, B: int, T: int, n: int, draw: torch.Generator) -> Tensor:
    """[B, T, n] float32: "random", "few" values, "same" everywhere, "hard" ones, or "near": steps of a float apart."""
    if kind == "near":
        steps = torch.randint(0, 200, (B, T, n), generator=draw, dtype=torch.int32)
        return (0x3F800000 + steps).view(torch.float32)
    if kind == "hard":
        return HARD[torch.randint(len(HARD), (B, T, n), generator=draw)]
    if kind == "few":
        return torch.randint(-1, 2, (B, T, n), generator=draw).float()
    return torch.full((B, T, n), 0.5) if kind == "same" else torch.randn(B, T, n, generator=draw)


def shard_scores(kind: str, visible: list[list[int]], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores and `visible` [B, T] of one rank."""
    draw = torch.Generator().manual_seed(seed)
    seen = torch.tensor(visible, dtype=torch.int32)
    return hidden(scores_of(kind, *seen.shape, n, draw), seen), seen


def candidates_of_ranks(
    kind: str, lengths: list[list[int]], n: int, top_k: int, cp: int, tokens_per_block: int, seed: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(scores, visible) of every rank of sequences that are so long, and all their candidates [P, B, T, m, 2]."""
    ranks = []
    for rank in range(cp):
        visible = local_length(torch.tensor(lengths), rank, cp, tokens_per_block).tolist()
        ranks.append(shard_scores(kind, visible, n, seed + rank))
    found = [
        topk_candidates_reference(scores, visible, torch.tensor(rank), top_k, cp, tokens_per_block)
        for rank, (scores, visible) in enumerate(ranks)
    ]
    return ranks, torch.stack(found)


@dataclass(frozen=True)
class SparseStep:
    """Sizes of a step over one cache [pages, page_size, R + r + I] of latents and index keys.

    Attributes:
        lengths: slots that the last query of each sequence sees.
        T: queries; earlier ones see one slot fewer each.
        m: length of a list of slots.
        H, R, r: query heads, latent and rope width.
        J, index_width: index heads and their width.
        page_size: slots of a page.
        dtype: of queries and cache.
    """

    lengths: tuple[int, ...]
    T: int = 1
    m: int = 7
    H: int = 5
    R: int = 20
    r: int = 6
    J: int = 3
    index_width: int = 10
    page_size: int = 5
    dtype: torch.dtype = torch.float32

    def _memory(self, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A cache of NaN, its page table, `visible`."""
        pages = -(-max(*self.lengths, 1) // self.page_size) + 1
        table = torch.randperm(len(self.lengths) * pages, generator=draw).view(-1, pages)
        width = self.R + self.r + self.index_width
        cache = torch.full((table.numel(), self.page_size, width), torch.nan)
        behind = torch.arange(self.T - 1, -1, -1)
        visible = (torch.tensor(self.lengths)[:, None] - behind).clamp(min=0).int()
        return cache, table, visible

    def attention(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """Arguments of mla_decode_slots: each query has its own random list; what no list names holds NaN."""
        draw = torch.Generator().manual_seed(seed)
        cache, table, visible = self._memory(draw)
        B, width = len(self.lengths), self.R + self.r
        nobodys = table.shape[1] * self.page_size - 1  # behind a list's count: a slot whose row is NaN
        slots = torch.full((B, self.T, self.m), nobodys, dtype=torch.int32)
        count = visible.clamp(max=self.m)
        for b, t in itertools.product(range(B), range(self.T)):
            chosen = torch.randperm(int(visible[b, t]), generator=draw)[: int(count[b, t])].sort().values
            slots[b, t, : len(chosen)] = chosen.int()
            rows = torch.randn(len(chosen), width, generator=draw)
            cache[table[b, chosen // self.page_size], chosen % self.page_size, :width] = rows
        q = torch.randn(B, self.T, self.H, width, generator=draw).to(self.dtype)
        part = cache.to(self.dtype)[..., :width]
        return q[..., : self.R], q[..., self.R :], part, table, visible, slots, count, 0.3

    def indexer(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """Arguments of index_scores; slots that no query sees hold NaN."""
        draw = torch.Generator().manual_seed(seed)
        cache, table, visible = self._memory(draw)
        start = self.R + self.r
        for b, length in enumerate(self.lengths):
            slot = torch.arange(length)
            rows = torch.randn(length, self.index_width, generator=draw)
            cache[table[b, slot // self.page_size], slot % self.page_size, start:] = rows
        shape = (len(self.lengths), self.T, self.J)
        q, w = torch.randn(*shape, self.index_width, generator=draw), torch.randn(shape, generator=draw)
        return q.to(self.dtype), w, cache.to(self.dtype)[..., start:], table, visible, 0.3
