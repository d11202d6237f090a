"""The ops of sparse attention, run by the ranks of one process, against a top-k over the whole sequence.

Everything is a small integer, so scores are exact in any order and ties are many. Ranks hold shuffled pages of NaN in which
only their own keys are written. The broken version that must be told apart is what one engine shipped: each rank attends
to its own top-k.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helix_compile.kernels.reference import merge_lse_reference
from helix_compile.kernels.reference_sparse import (
    NOWHERE,
    index_scores_reference,
    kth_candidate_reference,
    mla_decode_slots_reference,
    select_slots_reference,
    topk_candidates_reference,
)
from helix_compile.layout.ledger import local_length, position_of_slot, positions_on_rank
from tests.support.sparse_steps import HARD, hidden

Bound = tuple[Tensor, Tensor]  # score and position of the last key that is chosen
PAGE, J, WIDTH = 4, 8, 6


@dataclass
class World:
    """Two sequences of `lengths` tokens, dealt to cp ranks."""

    cp: int
    tokens_per_block: int
    lengths: list[int]
    T: int
    top_k: int
    keys: Tensor  # [B, S, I]
    q: Tensor  # [B, T, J, I]
    w: Tensor  # [B, T, J]

    def positions(self) -> Tensor:
        """[B, T] of the queries: the last T tokens."""
        return torch.stack([torch.arange(length - self.T, length) for length in self.lengths])

    def whole_scores(self) -> Tensor:
        """[B, T, S], -inf where a query does not see."""
        products = torch.einsum("btji,bsi->btjs", self.q, self.keys).relu()
        behind = torch.arange(self.keys.shape[1]) > self.positions()[..., None]
        return torch.einsum("btj,btjs->bts", self.w, products).masked_fill(behind, -torch.inf)

    def wanted(self) -> list[list[set[int]]]:
        """Positions that each query attends to: by score, then by position, one after the other."""
        scores, positions = self.whole_scores(), self.positions()
        return [
            [
                set(sorted(range(int(p) + 1), key=lambda s: (-float(scores[b, t, s]), s))[: self.top_k])
                for t, p in enumerate(row)
            ]
            for b, row in enumerate(positions)
        ]

    def ranks(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(scores, visible, rank) by index_scores over each rank's pages."""
        held = []
        pages = -(-max(self.lengths) // PAGE) + 1
        for rank in range(self.cp):
            cache = torch.full((len(self.lengths) * pages, PAGE, WIDTH + 3), torch.nan)[..., 1 : WIDTH + 1]
            table = torch.randperm(cache.shape[0]).view(-1, pages)
            for b, length in enumerate(self.lengths):
                mine = positions_on_rank(length, rank, self.cp, self.tokens_per_block)
                slot = torch.arange(len(mine))
                cache[table[b, slot // PAGE], slot % PAGE] = self.keys[b, mine]
            visible = local_length(self.positions() + 1, rank, self.cp, self.tokens_per_block).int()
            scores = index_scores_reference(self.q, self.w, cache, table, visible, 1.0)
            held.append((scores, visible, torch.tensor(rank)))
        return held

    def chosen(self, bound_of: Callable[[Tensor, int], list[Bound]]) -> list[list[set[int]]]:
        """Positions that the ranks choose together; `bound_of`: all candidates [P, B, T, m, 2] -> each rank's bound."""
        ledger = (self.top_k, self.cp, self.tokens_per_block)
        held = self.ranks()
        found = torch.stack([topk_candidates_reference(*one, *ledger) for one in held])
        got = [[set() for _ in range(self.T)] for _ in self.lengths]
        for (scores, visible, rank), bound in zip(held, bound_of(found, self.top_k), strict=True):
            slots, count = select_slots_reference(scores, visible, *bound, rank, *ledger)
            for b, t in itertools.product(range(len(self.lengths)), range(self.T)):
                mine = slots[b, t, : int(count[b, t])]
                assert mine.tolist() == sorted(set(mine.tolist())) and not slots[b, t, int(count[b, t]) :].any()
                places = position_of_slot(mine, int(rank), self.cp, self.tokens_per_block).tolist()
                assert not got[b][t] & set(places)
                got[b][t] |= set(places)
        return got


def exact(found: Tensor, top_k: int) -> list[Bound]:
    """One bound, out of all ranks' candidates."""
    return [kth_candidate_reference(found, top_k)] * len(found)


def union(found: Tensor, top_k: int) -> list[Bound]:
    """Each rank's own bound."""
    return [kth_candidate_reference(one[None], top_k) for one in found]


def world(cp: int, tokens_per_block: int, S: int, T: int, top_k: int, kind: str) -> World:
    lengths = [S, max(T, S // 3)]
    keys = torch.randint(-9, 9, (2, S, WIDTH)).float()
    if kind == "few":
        keys = torch.zeros_like(keys)
        keys[:, ::5] = 1
    q, w = torch.randint(-9, 9, (2, T, J, WIDTH)).float(), torch.randint(-9, 9, (2, T, J)).float()
    return World(cp, tokens_per_block, lengths, T, top_k, keys if kind != "same" else keys * 0, q, w)


@pytest.mark.parametrize("kind", ["drawn", "few", "same"])
@pytest.mark.parametrize("tokens_per_block", [1, 3, 32])
@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_all_ranks_choose_what_one_would(cp: int, tokens_per_block: int, kind: str) -> None:
    """S below, at and above k; k not a multiple of cp; empty shards."""
    for S, T, top_k in itertools.product((5, 7, 41), (1, 3), (1, 7, 64)):
        one = world(cp, tokens_per_block, S, T, top_k, kind)
        assert one.chosen(exact) == one.wanted(), (S, T, top_k)


def test_the_union_of_local_top_k_is_told_apart() -> None:
    """It chooses more wherever more than k are visible on more than one rank; below k it is the same."""
    long, short = world(4, 3, 41, 2, 7, "drawn"), world(4, 3, 7, 2, 7, "drawn")
    assert long.chosen(union) != long.wanted()
    assert sum(len(keys) for keys in long.chosen(union)[0]) > 2 * 7
    assert short.chosen(union) == short.wanted()


def in_order(entry: tuple[float, int]) -> tuple[float, int, int]:
    """Of (score, position): a NaN is above all, and -0.0 == 0.0."""
    score, position = entry
    return (-torch.inf, 0, position) if score != score else (-score, 1, position)


def test_candidates_are_this_ranks_best_by_position() -> None:
    """Against sorting tuples; what is hard to order: NaN of either sign first, -0.0 is 0.0."""
    scores = hidden(HARD[torch.randint(len(HARD), (2, 3, 30))], torch.tensor([[30, 0, 4], [29, 12, 1]]))
    visible = torch.tensor([[30, 0, 4], [29, 12, 1]], dtype=torch.int32)
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        got = topk_candidates_reference(scores.to(dtype), visible, torch.tensor(2), 9, 3, 4)
        assert got.shape == (2, 3, 9, 2) and got.dtype == bits
        for b, t in itertools.product(range(2), range(3)):
            row = [
                (float(x), position_of_slot(s, 2, 3, 4)) for s, x in enumerate(scores[b, t, : visible[b, t]].to(dtype))
            ]
            best = sorted(sorted(row, key=in_order)[:9], key=lambda entry: entry[1])
            best += [(-torch.inf, NOWHERE)] * (9 - len(best))
            wanted = torch.tensor([x for x, _ in best], dtype=dtype) + 0.0
            wanted[wanted.isnan()] = torch.nan
            assert got[b, t, :, 1].tolist() == [p for _, p in best]
            assert torch.equal(got[b, t, :, 0], wanted.view(bits))


def test_a_list_is_attended_to_as_its_rows_alone() -> None:
    """By softmax over gathered rows, in pages of NaN; over two ranks merged as over one list."""
    T, H, R, r, m = 3, 2, 5, 3, 6
    cache = torch.full((6, PAGE, R + r + 4), torch.nan, dtype=torch.float64)
    part, table = cache[..., 2 : 2 + R + r], torch.randperm(6).view(2, 3)
    q = torch.randn(2, T, H, R + r, dtype=torch.float64)
    slots, count = torch.full((2, T, m), -7, dtype=torch.int32), torch.tensor([[0, 3, 6], [1, 5, 2]], dtype=torch.int32)
    wanted = torch.zeros(2, T, H, R, dtype=torch.float64)
    for b, t in itertools.product(range(2), range(T)):
        chosen = torch.randperm(3 * PAGE)[: int(count[b, t])].sort().values
        slots[b, t, : len(chosen)] = chosen.int()
        at = (table[b, chosen // PAGE], chosen % PAGE)
        part[at] = torch.where(part[at].isnan(), torch.randn(len(chosen), R + r).double(), part[at])
    for b, t in itertools.product(range(2), range(T)):
        chosen = slots[b, t, : int(count[b, t])].long()
        rows = part[table[b, chosen // PAGE], chosen % PAGE]
        wanted[b, t] = torch.softmax(q[b, t] @ rows.T * 0.3, dim=-1) @ rows[:, :R]
    arguments = (q[..., :R], q[..., R:], part, table, torch.full((2, T), 3 * PAGE, dtype=torch.int32))
    o, lse = mla_decode_slots_reference(*arguments, slots, count, 0.3)
    torch.testing.assert_close(o, wanted, rtol=0, atol=1e-14)
    assert torch.equal(lse == -torch.inf, (count == 0)[..., None].expand_as(lse))
    first, second = count // 2, count - count // 2
    rest = torch.stack([torch.roll(row, -int(n)) for row, n in zip(slots.flatten(0, 1), first.flatten(), strict=True)])
    parts = [
        mla_decode_slots_reference(*arguments, listed, n, 0.3)
        for listed, n in ((slots, first), (rest.view_as(slots), second))
    ]
    merged = merge_lse_reference(*(torch.stack(x) for x in zip(*parts, strict=True)))
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-14)
