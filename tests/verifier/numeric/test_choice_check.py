"""Which keys ranks chose: the contract, the order and the near ties, on values made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from helix_compile.config.options import HelixOptions
from helix_compile.layout.degrees import HelixLayout
from helix_compile.verifier.contract import deal
from helix_compile.verifier.numeric.choice_check import (
    ChoiceNodes,
    Chosen,
    Queries,
    best,
    compare_with_original,
    ranks_choice,
)
from helix_compile.verifier.numeric.handed import columns_of, local_slots
from helix_compile.verifier.numeric.indexers import Indexers, SiteChoice
from helix_compile.verifier.numeric.routing import Choices, RecordTopK, compare_choices

CP, TPB, K = 3, 2, 4
BEFORE, T = (11, 2), 2
MASK = torch.ones(2, T, dtype=torch.int64)


def queries() -> Queries:
    assert HelixOptions(cp=CP).cp == CP
    return Queries(BEFORE, MASK, HelixLayout(kvp=CP, tpa=1, ep=1, tpf=CP), TPB)


def nodes() -> ChoiceNodes:
    graph = fx.Graph()
    named = {n: graph.placeholder(n) for n in ("slots", "count", "scores", "kth", "select")}
    return ChoiceNodes(named["slots"], named["count"], named["scores"], (named["kth"],), named["select"])


def values_of(keys: Tensor, scores: Tensor) -> list[dict[str, Any]]:
    """What ranks hold that chose these keys [B, T, n]."""
    found = []
    for rank in range(CP):
        slots, count = local_slots(keys, rank, CP, TPB, 64)
        local = torch.full((2, T, 64), -torch.inf, dtype=torch.float64)
        for b, past in enumerate(BEFORE):
            hand = deal(past + T, CP, TPB)[rank]
            local[b][:, : len(hand)] = scores[b][:, hand]
        found.append({"slots": slots, "count": count, "scores": local, "kth": torch.zeros(2, T)})
    return found


def right() -> tuple[Tensor, Tensor]:
    """Scores of all keys, with ties, and the keys that are chosen by them."""
    seen = queries().seen
    drawn = torch.randint(-2, 3, seen.shape, generator=torch.Generator().manual_seed(0)).double()
    scores = drawn.masked_fill(~seen, -torch.inf)
    return scores, best(scores, seen, K)


def test_the_right_keys_pass_and_are_read_off_the_slots() -> None:
    scores, keys = right()
    chosen = ranks_choice(nodes(), values_of(keys, scores), queries(), K)
    assert chosen.fault is None and torch.equal(chosen.keys, keys)
    assert chosen.scores is not None and torch.equal(chosen.scores, scores)
    # written apart: as many as there are, at most k, and of equal ones the first
    assert keys.sum(-1).tolist() == [[K, K], [3, K]]
    for b in range(2):
        for t in range(T):
            order = sorted(range(keys.shape[-1]), key=lambda i: (-float(scores[b, t, i]), i))
            visible = int(queries().seen[b, t].sum())
            assert keys[b, t].nonzero().flatten().tolist() == sorted(order[: min(K, visible)])


def _swap(found: list[dict[str, Any]], rank: int, **new: Tensor) -> list[dict[str, Any]]:
    return [{**v, **new} if r == rank else v for r, v in enumerate(found)]


def test_each_fault_of_the_contract_is_told() -> None:
    scores, keys = right()
    good = values_of(keys, scores)

    def fault(found: list[dict[str, Any]]) -> str:
        told = ranks_choice(nodes(), found, queries(), K).fault
        assert told is not None
        return " | ".join(told)

    rank = next(r for r in range(CP) if int(good[r]["count"][0, 0]) >= 1)
    slots, count = good[rank]["slots"].clone(), good[rank]["count"].clone()
    count[0, 0] -= 1
    assert "3 keys over all ranks" in fault(_swap(good, rank, count=count))
    slots[0, 0, :] = slots[0, 0, 0]
    count[0, 0] = 2
    assert "twice" in fault(_swap(good, rank, slots=slots, count=count))
    slots[0, 0, 0] = 60
    assert "slot 60 of a shard" in fault(_swap(good, rank, slots=slots))
    late, one = torch.zeros_like(slots), count.clone()
    owner = next(r for r in range(CP) if 12 in deal(13, CP, TPB)[r])
    late[0, 0, 0], one[0, 0] = deal(13, CP, TPB)[owner].index(12), 1
    assert "position 12, which the query does not see" in fault(_swap(good, owner, slots=late, count=one))
    assert "another k-th key" in fault(_swap(good, 1, kth=torch.ones(2, T)))


def test_the_order_of_the_ranks_own_scores_is_held_to_exactly() -> None:
    scores, keys = right()
    row = scores[0, 0]
    kth = float(row[keys[0, 0]].min())
    tied = [i for i in range(12) if float(row[i]) == kth]
    inside, outside = [i for i in tied if keys[0, 0, i]], [i for i in tied if not keys[0, 0, i]]
    assert inside and outside
    turned = keys.clone()
    turned[0, 0, inside[0]], turned[0, 0, outside[0]] = False, True
    told = ranks_choice(nodes(), values_of(turned, scores), queries(), K).fault
    assert told is not None and f"keys [{outside[0]}] in place of [{inside[0]}]" in told[1]


@pytest.mark.parametrize(("gap", "clear"), [(1e-13, False), (1e-9, True)])
def test_a_near_tie_of_the_kth_score_is_no_finding(gap: float, clear: bool) -> None:
    seen = queries().seen
    scores = torch.arange(seen.shape[-1], dtype=torch.float64).expand(seen.shape).clone()
    scores[..., 8] = scores[..., 7] + gap  # of position 10 on, 8 to 11 are the best four
    scores = scores.masked_fill(~seen, -torch.inf)
    original = SiteChoice(scores, best(scores, seen, K))
    mine = original.keys.clone()
    mine[0, 0, 8], mine[0, 0, 7] = False, True
    compared = compare_with_original(Chosen(mine, None), original, queries(), torch.float64)
    assert bool(compared.turned[0, 0]) and int(compared.turned.sum()) == 1
    assert bool(compared.clear[0, 0]) is clear and int(compared.clear.sum()) == clear
    far = original.keys.clone()
    far[0, 0, 8], far[0, 0, 0] = False, True
    assert bool(compare_with_original(Chosen(far, None), original, queries(), torch.float64).clear[0, 0])


def test_the_oracle_takes_the_earlier_of_equal_keys_and_follows_what_it_is_told() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = torch.tensor([[[-torch.inf, 0.0, -0.0, 0.0, 1.0]], [[0.0, -0.0, 0.0, -1.0, 2.0]]])
    indexers = Indexers(mask)
    indexers.arm()
    with RecordTopK(choices := Choices(), indexers):
        indices = scores.topk(3, dim=-1).indices
        torch.ones(2, 1, 5).topk(3)  # a router of the same shape
    assert indices.tolist() == [[[4, 1, 2]], [[4, 0, 1]]]
    assert len(choices.indices) == 1 and len(indexers.choices) == 1
    assert indexers.choices[0].keys.tolist() == [[[True, True, False, True, False]], [[True, True, False, False, True]]]
    told = Indexers(mask, [indexers.choices[0].keys.roll(1, -1) & (torch.arange(5) < 4)])
    _, chosen = told.topk(scores, 3)
    # positions 1 and 2 of the first sequence are columns 2 and 3; column 0 is padding, which nobody sees
    assert [sorted(row[0]) for row in chosen.tolist()] == [[0, 2, 3], [0, 1, 2]]


def test_handed_keys_are_the_same_for_the_original_and_for_the_ranks() -> None:
    _, keys = right()
    mask = torch.tensor([[1] * 13, [0] * 9 + [1] * 4])
    columns = columns_of(keys, mask)
    for b, past in enumerate(BEFORE):
        for t in range(T):
            first, seen = 13 - past - T, past + t + 1
            from_columns = {int(c) - first for c in columns[b, t] if first <= int(c) < first + seen}
            from_slots = set()
            for rank in range(CP):
                slots, count = local_slots(keys, rank, CP, TPB, 64)
                hand = deal(past + T, CP, TPB)[rank]
                from_slots |= {hand[s] for s in slots[b, t, : int(count[b, t])].tolist()}
            assert from_columns == from_slots == set(keys[b, t].nonzero().flatten().tolist())


def test_another_number_of_top_ks_is_not_taken_for_agreement() -> None:
    one, two = Choices(), Choices()
    for side in (one, two):
        side.add(torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64))
    assert not compare_choices(one, two, 2, 2, torch.float64).unpaired
    two.add(torch.randn(4, 8), torch.zeros(4, 3, dtype=torch.int64))
    told = compare_choices(one, two, 2, 2, torch.float64).unpaired
    assert "1, #1 of none" in told and "2, #1 of (4, 3)" in told
