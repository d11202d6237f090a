"""topk_candidates, kth_candidate and select_slots by Triton against their references, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.kernels.reference_sparse import (
    NOWHERE,
    kth_candidate_reference,
    select_slots_reference,
    topk_candidates_reference,
)
from helix_compile.kernels.registry import Capacity, Kernel, Site
from helix_compile.kernels.sparse.kth import KTH_CANDIDATE, kth_candidate_triton
from helix_compile.kernels.sparse.select import SELECT_SLOTS, select_slots_triton
from helix_compile.kernels.sparse.topk import TOPK_CANDIDATES, topk_candidates_triton
from helix_compile.kernels.target import offline_target
from tests.support.kernel_checks import INTERPRETED, assert_case_is_complete, poisoned_memory
from tests.support.sparse_steps import candidates_of_ranks, shard_scores

CP, TOKENS_PER_BLOCK, RANK = 3, 4, torch.tensor(1)
LEDGER = (CP, TOKENS_PER_BLOCK)
# visible [B, T], n, top_k: a shard that is empty, below, at and above k; tiles of 32 begun, full and one beyond
SHARDS = [([[0, 1, 12]], 12, 12), ([[31], [32]], 33, 7), ([[65, 33, 64]], 66, 33)]


def check_topk(scores: Tensor, visible: Tensor, top_k: int, parts: int | None) -> None:
    with poisoned_memory():
        got = topk_candidates_triton(scores, visible, RANK, top_k, *LEDGER, parts)
    wanted = topk_candidates_reference(scores, visible, RANK, top_k, *LEDGER)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["few", "same", "hard"])
@pytest.mark.parametrize(("visible", "n", "top_k"), SHARDS)
def test_local_candidates(visible: list[list[int]], n: int, top_k: int, kind: str, parts: int) -> None:
    """Few values and one alone tie across tiles and parts; the lowest slots win."""
    check_topk(*shard_scores(kind, visible, n, seed=n), top_k, parts)


def test_keys_that_differ_in_their_last_bits_alone() -> None:
    """Every pass of the radix search decides: neighbours of 1.0, of 0.0 and of the largest float, of both signs."""
    around = torch.cat(
        [bits + torch.arange(-9, 10, dtype=torch.int32) for bits in (0x3F800000, 0x0000000A, 0x7F7FFFF0)]
    )
    scores = torch.cat([around.view(torch.float32), -around.view(torch.float32)])
    scores = scores[torch.randperm(len(scores))][None, None]
    check_topk(scores, torch.tensor([[scores.shape[2]]], dtype=torch.int32), 50, 1)
    check_topk(scores, torch.tensor([[scores.shape[2]]], dtype=torch.int32), 11, 2)


def test_a_score_of_minus_infinity_is_a_key_like_any_other() -> None:
    scores = torch.full((1, 1, 40), -torch.inf)
    scores[..., 30] = 0.0
    visible = torch.tensor([[35]], dtype=torch.int32)
    check_topk(scores, visible, 5, 1)
    check_topk(scores, visible, 38, 2)
    bound = torch.tensor([[-torch.inf]]), torch.tensor([[17]])
    arguments = (scores, visible, *bound, RANK, 9, *LEDGER)
    for got, wanted in zip(select_slots_triton(*arguments), select_slots_reference(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["few", "same", "hard", "random"])
@pytest.mark.parametrize("top_k", [1, 13, 40])
def test_the_kth_of_all_ranks_and_the_slots_it_bounds(kind: str, top_k: int) -> None:
    """Candidates in any order, one row with fewer visible keys than top_k; then each rank's list."""
    lengths, n = [[100, 39], [3, 0]], 36
    ranks, found = candidates_of_ranks(kind, lengths, n, top_k, *LEDGER, seed=top_k)
    wanted = kth_candidate_reference(found, top_k)
    assert wanted[1][1].tolist() == ([NOWHERE] * 2 if top_k > 3 else [wanted[1][1, 0], NOWHERE])
    shuffled = found[:, :, :, torch.randperm(found.shape[3])]
    with poisoned_memory():
        got = kth_candidate_triton(shuffled, top_k)
    assert torch.equal(got[1], wanted[1]) and got[1].dtype == torch.int64
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0, equal_nan=True)
    for rank, (scores, visible) in enumerate(ranks):
        arguments = (scores, visible, *wanted, torch.tensor(rank), top_k, *LEDGER)
        with poisoned_memory():
            slots, count = select_slots_triton(*arguments, parts=1 + rank)
        slots_wanted, count_wanted = select_slots_reference(*arguments)
        assert torch.equal(slots, slots_wanted) and torch.equal(count, count_wanted)


def test_fewer_candidates_than_top_k_choose_all() -> None:
    _, found = candidates_of_ranks("random", [[9]], 4, 64, *LEDGER, seed=1)
    score, position = kth_candidate_triton(found, 64)
    assert score.tolist() == [[-torch.inf]] and position.tolist() == [[NOWHERE]]


def test_candidates_at_an_odd_offset() -> None:
    """A pair of 32 bits is read as one of 64, whose address must be a multiple of 8."""
    _, found = candidates_of_ranks("random", [[50]], 20, 5, *LEDGER, seed=1)
    odd = found.new_empty(found.numel() + 1)[1:].copy_(found.flatten()).view(found.shape)
    assert odd.storage_offset() == 1
    assert torch.equal(kth_candidate_triton(odd, 5)[1], kth_candidate_reference(found, 5)[1])


SCORES = torch.zeros(8, 1, 32768, device="meta")
VISIBLE = torch.zeros(8, 1, dtype=torch.int32, device="meta")
POSITION = torch.zeros(8, 1, dtype=torch.int64, device="meta")
PLACE = (torch.zeros((), dtype=torch.int64, device="meta"), 2048, 4, 128)
SITES = [
    (TOPK_CANDIDATES, (SCORES, VISIBLE, *PLACE), 0),
    (KTH_CANDIDATE, (torch.zeros(4, 8, 1, 2048, 2, dtype=torch.int32, device="meta"), 2048), 0),
    (SELECT_SLOTS, (SCORES, VISIBLE, SCORES[..., 0], POSITION, *PLACE), 0),
]


@pytest.mark.parametrize(("kernel", "arguments", "wide"), SITES, ids=[kernel.op for kernel, _, _ in SITES])
def test_what_they_refuse_and_what_they_compile(kernel: Kernel, arguments: tuple, wide: int) -> None:
    site = Site(kernel.op, arguments, Capacity(8, 32768))
    for target in (INTERPRETED, offline_target("sm_90"), offline_target("sm_100")):
        assert kernel.supports(site, target) is None
        cases = kernel.cases(site, target)
        for case in cases:
            assert_case_is_complete(case)
        # eight rows leave most of a card idle: parts of them, then what the parts left
        assert len(cases) == (1 if kernel is KTH_CANDIDATE else 2)
    double = arguments[wide].long() if kernel is KTH_CANDIDATE else arguments[wide].double()
    reason = kernel.supports(Site(kernel.op, (double, *arguments[1:]), site.capacity), INTERPRETED)
    assert reason is not None and ("float64" in reason) and ("float32" in reason)
