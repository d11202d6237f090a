"""Caches with known content, and a sender that deals its tokens out one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helix_compile import HelixModule
from helix_compile.cache.shards import CacheEntries


def random_entries(
    lengths: list[int], R: list[int], r: list[int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> CacheEntries:
    """A left-aligned cache of random numbers, 0 behind each row's tokens."""
    g = torch.Generator().manual_seed(seed)
    alive = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])[..., None]
    parts = [
        [torch.randn(len(lengths), max(lengths), w, generator=g, dtype=dtype) * alive for w in widths]
        for widths in (R, r)
    ]
    return CacheEntries(parts[0], parts[1], torch.tensor(lengths))


def dealt(
    entries: CacheEntries, cp: int, tokens_per_block: int, prompts: list[int] | None
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """(latents, k_ropes)[rank][site] of a sender that hands tokens out one by one, apart from ledger.py.

    With `prompts`, a block counter of their own counts the tokens after each row's prompt, as TensorRT-LLM's executor does.
    """
    hands: list[list[list[int]]] = []
    for row, length in enumerate(entries.lengths.tolist()):
        hand: list[list[int]] = [[] for _ in range(cp)]
        prompt = length if prompts is None else prompts[row]
        for position in range(length):
            iteration = position - prompt + 1  # of the decode step that wrote it
            block = (position if position < prompt else iteration - 1) // tokens_per_block
            hand[block % cp].append(position)
        hands.append(hand)
    parts: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
    for rank in range(cp):
        width = max(len(hand[rank]) for hand in hands)
        for part, whole in zip(parts, entries[:2], strict=True):
            shard = [t.new_zeros(t.shape[0], width, t.shape[2]) for t in whole]
            for site, tensor in enumerate(whole):
                for row, hand in enumerate(hands):
                    shard[site][row, : len(hand[rank])] = tensor[row, hand[rank]]
            part.append(shard)
    return parts


def columns_of(entries: CacheEntries) -> int:
    return entries.latents[0].shape[1]


@contextmanager
def untouched(compiled: HelixModule) -> Iterator[None]:
    """Nothing of the module's caches and lengths may change inside."""
    caches = [c.clone() for rank in compiled.ranks for c in rank.cache]
    lengths = compiled.lengths
    yield
    after = [c for rank in compiled.ranks for c in rank.cache]
    assert all(torch.equal(a, b) for a, b in zip(caches, after, strict=True))
    assert torch.equal(compiled.lengths, lengths)
