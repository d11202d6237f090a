"""Faults of sparse attention inside its ops: which keys are chosen, and what is read of a list of slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.reference_sparse import NOWHERE
from helix_compile.verifier.mutants.mutant import SPARSE_CATALOGUE, kernel_mutant

SELECTION = 16  # the family of a wrong choice
Pair = tuple[Tensor, Tensor]

# name -> (op, what stands in for it): tests hold each against the cases of the op's kernel
FAULTY_OPS: dict[str, tuple[str, Callable[..., Any]]] = {}


def _fault(
    name: str, base: str, family: int = SELECTION, *, of_the_op_alone: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`of_the_op_alone`: the op's result is wrong, and no choice of keys follows from it."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        FAULTY_OPS[name] = (base, kernel)
        if of_the_op_alone:
            return kernel
        return kernel_mutant(name, family, base, catalogue=SPARSE_CATALOGUE)(kernel)

    return register


def _reference(base: str, *args: Any) -> Any:
    return getattr(torch.ops.helix, base)(*args)


# scores of this rank's slots


@_fault("an indexer's query sees one slot too many", "index_scores", 7)
def scores_one_more(q: Tensor, w: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Tensor:
    more = (visible + (visible > 0).int()).clamp(max=table.shape[1] * cache.shape[1])
    return _reference("index_scores", q, w, cache, table, more, scale)


@_fault("the new index key is appended after its query is scored", "index_scores", 7)
def scores_without_itself(q: Tensor, w: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Tensor:
    return _reference("index_scores", q, w, cache, table, (visible - 1).clamp(min=0), scale)


@_fault("relu of the sum over index heads, not of each", "index_scores")
def relu_of_the_sum(q: Tensor, w: Tensor, cache: Tensor, table: Tensor, visible: Tensor, scale: float) -> Tensor:
    # w relu(q k) + w relu(-q k) is w |q k|: the difference of the two is w q k
    plus = _reference("index_scores", q, w, cache, table, visible, scale)
    minus = _reference("index_scores", -q, w, cache, table, visible, scale)
    return torch.where(plus == -torch.inf, plus, (plus - minus).relu())


# each rank's best


@_fault("of keys that tie the last ones are kept", "topk_candidates")
def last_of_ties(scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int) -> Tensor:
    m = min(top_k, scores.shape[-1])
    seen = torch.arange(scores.shape[-1], device=scores.device) < visible[..., None]
    by_place = torch.where(seen, scores, -torch.inf).flip(-1)
    kept = scores.shape[-1] - 1 - by_place.argsort(dim=-1, descending=True, stable=True)[..., :m]
    only = torch.zeros_like(seen).scatter(-1, kept, True) & seen
    # a key that is not kept comes behind all that are
    lowered = torch.where(only, scores, -torch.inf)
    return _reference("topk_candidates", lowered, visible, rank, top_k, cp, tokens_per_block)


@_fault("a rank offers k / cp candidates", "topk_candidates")
def too_few_offered(
    scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int
) -> Tensor:
    offered = _reference("topk_candidates", scores, visible, rank, -(-top_k // cp), cp, tokens_per_block)
    filler = _reference("topk_candidates", scores, torch.zeros_like(visible), rank, top_k, cp, tokens_per_block)
    return torch.cat([offered, filler[:, :, offered.shape[2] :]], dim=2)


@_fault("candidates are named by their local slots", "topk_candidates", 4)
def slots_for_positions(
    scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int
) -> Tensor:
    return _reference("topk_candidates", scores, visible, torch.zeros_like(rank), top_k, 1, tokens_per_block)


# its score is -inf and its position behind every one that the query sees
@_fault("a slot past the visible ones is a candidate", "topk_candidates", 7, of_the_op_alone=True)
def offers_one_more(
    scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int
) -> Tensor:
    more = (visible + 1).clamp(max=scores.shape[-1])
    return _reference("topk_candidates", scores, more, rank, top_k, cp, tokens_per_block)


# the bound


@_fault("the union of local top-ks: the bound is one rank's", "kth_candidate")
def bound_of_one_rank(candidates_P: Tensor, top_k: int) -> Pair:
    return _reference("kth_candidate", candidates_P[:1], top_k)


@_fault("the bound says no position: every key that ties is chosen", "kth_candidate")
def bound_without_position(candidates_P: Tensor, top_k: int) -> Pair:
    score, position = _reference("kth_candidate", candidates_P, top_k)
    return score, torch.full_like(position, NOWHERE)


@_fault("the bound of another sequence or query", "kth_candidate")
def bound_of_another(candidates_P: Tensor, top_k: int) -> Pair:
    score, position = _reference("kth_candidate", candidates_P, top_k)
    return score.flatten().roll(1).view_as(score), position.flatten().roll(1).view_as(position)


# the list


@_fault("the k-th key itself is left out", "select_slots")
def without_the_last(scores: Tensor, visible: Tensor, score: Tensor, position: Tensor, *ledger: Any) -> Pair:
    return _reference("select_slots", scores, visible, score, position - 1, *ledger)


@_fault("a local slot is compared with the position of the bound", "select_slots", 4)
def slots_against_positions(
    scores: Tensor, visible: Tensor, score: Tensor, position: Tensor, rank: Tensor, top_k: int, cp: int, tpb: int
) -> Pair:
    return _reference("select_slots", scores, visible, score, position, torch.zeros_like(rank), top_k, 1, tpb)


@_fault("a key without a number is not chosen", "select_slots")
def drops_nan(scores: Tensor, visible: Tensor, *bound: Any) -> Pair:
    return _reference("select_slots", torch.where(scores.isnan(), -torch.inf, scores), visible, *bound)


# attention to a list


@_fault("a list is read to its end", "mla_decode_slots")
def count_ignored(
    q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, slots: Tensor, count: Tensor, scale: float
) -> Pair:
    filled = torch.where(torch.arange(slots.shape[2], device=slots.device) < count[..., None], slots, 0)
    every = torch.full_like(count, slots.shape[2])
    return _reference("mla_decode_slots", q, qr, cache, table, visible, filled, every, scale)


@_fault("T > 1: every query reads the list of the last one", "mla_decode_slots")
def one_list_for_all(
    q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, slots: Tensor, count: Tensor, scale: float
) -> Pair:
    last = slots[:, -1:].expand_as(slots).contiguous(), count[:, -1:].expand_as(count).contiguous()
    return _reference("mla_decode_slots", q, qr, cache, table, visible, *last, scale)


@_fault("places of the list are taken for slots", "mla_decode_slots", 4)
def places_for_slots(
    q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, slots: Tensor, count: Tensor, scale: float
) -> Pair:
    places = torch.arange(slots.shape[2], device=slots.device, dtype=slots.dtype).expand_as(slots).contiguous()
    return _reference("mla_decode_slots", q, qr, cache, table, visible, places, count, scale)
