"""Faults of sparse attention between its ops: who agrees on the keys, who reads whose, and what is scored; those inside of
the ops are in selection_mutants.py. Served engines had most of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.graph import aten, calls
from helix_compile.ir.stage import bodies_of
from helix_compile.layout.ledger import position_of_slot
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.kernel_mutants import multiplies_dead_parts
from helix_compile.verifier.mutants.mutant import SPARSE_CATALOGUE, c10d, helix_nodes, kernel_mutant, mutant, wait_of

Pair = tuple[Tensor, Tensor]
NOWHERE = torch.iinfo(torch.int32).max

_sparse = partial(mutant, catalogue=SPARSE_CATALOGUE)


def _kernel(name: str, base: str, family: int = 16, kind: str = "kernel") -> Any:
    return kernel_mutant(name, family, base, kind=kind, catalogue=SPARSE_CATALOGUE)


def _reference(base: str, *args: Any) -> Any:
    return getattr(torch.ops.helix, base)(*args)


# each rank for itself


@_sparse("candidates are not exchanged: each rank attends to its own top-k", 10, "graph")
def union(compiled: HelixModule) -> None:
    for kth in helix_nodes(compiled, "kth_candidate"):
        wait = kth.args[0]
        kth.update_arg(0, wait.args[0].args[0])
    for body in bodies_of(compiled.graph).values():
        for node in calls(body.graph, c10d.all_gather_into_tensor.default):
            wait = wait_of(node)
            if not wait.users:
                body.graph.erase_node(wait)
                body.graph.erase_node(node)


@_kernel("the last rank's candidates are dropped", "kth_candidate")
def drops_a_rank(candidates: Tensor, k: int) -> Pair:
    kept = candidates.clone()
    dtype = torch.float64 if candidates.dtype is torch.int64 else torch.float32
    kept[-1] = _without(kept[-1], slice(None), dtype)
    return _reference("kth_candidate", kept, k)


def _without(candidates: Tensor, gone: slice, dtype: torch.dtype) -> Tensor:
    """Candidates of which some are none."""
    candidates = candidates.clone()
    nothing = torch.tensor([-torch.inf], dtype=dtype).view(candidates.dtype)
    candidates[..., gone, 0], candidates[..., gone, 1] = nothing, NOWHERE
    return candidates


# the order


def _choose(scores: Tensor, visible: Tensor, chosen: Tensor, k: int) -> Pair:
    """Slots and count of what is chosen [B, T, n]."""
    n = scores.shape[-1]
    slot = torch.arange(n)
    chosen = chosen & (slot < visible[..., None])
    m = min(k, n)
    slots = torch.sort(torch.where(chosen, slot, n), dim=-1).values[..., :m]
    count = chosen.sum(dim=-1).clamp(max=m).to(torch.int32)
    return torch.where(slots < n, slots, 0).to(torch.int32), count


def _before_and_tied(scores: Tensor, kth: Tensor) -> Pair:
    bound = kth[..., None]
    before = (scores > bound) | (scores.isnan() & ~bound.isnan())
    return before, (scores == bound) | (scores.isnan() & bound.isnan())


def _positions(scores: Tensor, rank: Tensor, cp: int, tpb: int) -> Tensor:
    return position_of_slot(torch.arange(scores.shape[-1]), rank, cp, tpb)


@_kernel("of tied keys each rank takes the last", "select_slots")
def ties_descending(
    scores: Tensor, visible: Tensor, kth: Tensor, position: Tensor, rank: Tensor, k: int, cp: int, tpb: int
) -> Pair:
    before, tied = _before_and_tied(scores, kth)
    return _choose(scores, visible, before | (tied & (_positions(scores, rank, cp, tpb) >= position[..., None])), k)


@_kernel("a rank offers the last of its tied keys, all ranks together take the first", "topk_candidates")
def other_comparator(scores: Tensor, visible: Tensor, rank: Tensor, k: int, cp: int, tpb: int) -> Tensor:
    n = scores.shape[-1]
    best, place = (x[..., :k] for x in torch.sort(scores.flip(-1) + 0.0, dim=-1, descending=True, stable=True))
    return _candidates(best, n - 1 - place, visible, rank, cp, tpb)


def _candidates(best: Tensor, slot: Tensor, visible: Tensor, rank: Tensor, cp: int, tpb: int) -> Tensor:
    alive = torch.arange(best.shape[-1]) < visible[..., None]
    kind = torch.int64 if best.dtype is torch.float64 else torch.int32
    bits = torch.where(alive, best, -torch.inf).contiguous().view(kind)
    position = torch.where(alive, position_of_slot(slot, rank, cp, tpb), NOWHERE)
    return torch.stack([bits, position.to(kind)], dim=-1)


@_kernel("-0.0 stands behind 0.0, as its bits do", "topk_candidates")
def by_bits(scores: Tensor, visible: Tensor, rank: Tensor, k: int, cp: int, tpb: int) -> Tensor:
    kind = torch.int64 if scores.dtype is torch.float64 else torch.int32
    bits = scores.contiguous().view(kind)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)
    slot = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :k]
    return _candidates(scores.gather(-1, slot), slot, visible, rank, cp, tpb)


# slots and positions, queries and sequences


@_kernel("candidates of every rank have rank 0's positions", "topk_candidates", kind="positions")
def rank_ignored(scores: Tensor, visible: Tensor, rank: Tensor, k: int, cp: int, tpb: int) -> Tensor:
    return _reference("topk_candidates", scores, visible, rank * 0, k, cp, tpb)


@_kernel("T > 1: every query attends to the first one's slots", "mla_decode_slots")
def first_query_only(
    q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, slots: Tensor, count: Tensor, scale: float
) -> Pair:
    slots, count = (x[:, :1].expand_as(x).contiguous() for x in (slots, count))
    return _reference("mla_decode_slots", q, qr, cache, table, visible, slots, count, scale)


@_kernel("attention takes a slot for one of the next page", "mla_decode_slots")
def wrong_page(
    q: Tensor, qr: Tensor, cache: Tensor, table: Tensor, visible: Tensor, slots: Tensor, count: Tensor, scale: float
) -> Pair:
    return _reference("mla_decode_slots", q, qr, cache, table.roll(1, 0), visible, slots, count, scale)


@_kernel("the list of slots has a hole of -1, which is read as a slot", "select_slots")
def hole_in_the_list(
    scores: Tensor, visible: Tensor, kth: Tensor, position: Tensor, rank: Tensor, k: int, cp: int, tpb: int
) -> Pair:
    slots, count = _reference("select_slots", scores, visible, kth, position, rank, k, cp, tpb)
    width = slots.shape[-1]
    holed = torch.where(torch.arange(width) < count[..., None], slots, -1)
    return holed, (count + 1).clamp(max=width)


_kernel("a rank that holds no chosen key counts as 0 * NaN", "merge_lse", family=5)(multiplies_dead_parts)


# layers that attend to what an earlier one chose


@_sparse("a shared layer attends to another sequence's keys", 4, "graph")
def shared_slots_of_another(compiled: HelixModule) -> None:
    _edit_shared(compiled, lambda node: (aten.roll.default, (node, [1], [0])))


@_sparse("a shared layer attends to the keys of the query before", 4, "graph")
def shared_slots_of_the_query_before(compiled: HelixModule) -> None:
    _edit_shared(compiled, lambda node: (aten.roll.default, (node, [1], [1])))


@_sparse("a shared layer loses one key of each rank", 4, "graph")
def shared_loses_one(compiled: HelixModule) -> None:
    for decode in _shared(compiled):
        with decode.graph.inserting_before(decode):
            fewer = decode.graph.call_function(aten.sub.Tensor, (decode.args[6], 1))
            decode.update_arg(6, decode.graph.call_function(aten.clamp.default, (fewer, 0)))


@_sparse("a shared layer runs an index of its own", 4, "graph")
def shared_layer_chooses_itself(compiled: HelixModule) -> None:
    """As many keys as were handed to it, but those that its own queries and latents score highest."""
    for decode in _shared(compiled):
        graph, (q, _, cache, table, visible, slots, *_) = decode.graph, decode.args
        R = q.meta["val"].shape[3]
        with graph.inserting_before(decode):
            latents = graph.call_function(aten.slice.Tensor, (cache, 2, 0, R))
            weights = graph.call_function(aten.amax.default, (graph.call_function(aten.ones_like.default, (q,)), [3]))
            scores = graph.call_function(
                torch.ops.helix.index_scores.default, (q, weights, latents, table, visible, 1.0)
            )
            best = graph.call_function(aten.argsort.default, (scores, -1, True))
            own = graph.call_function(aten.slice.Tensor, (best, 2, 0, slots.meta["val"].shape[2]))
            decode.update_arg(5, graph.call_function(aten._to_copy.default, (own,), {"dtype": torch.int32}))


def _shared(compiled: HelixModule) -> list[Any]:
    return [n for n in helix_nodes(compiled, "mla_decode_slots") if n.args[5].op == "placeholder"]


def _edit_shared(compiled: HelixModule, edit: Any) -> None:
    for decode in _shared(compiled):
        with decode.graph.inserting_before(decode):
            for place in (5, 6):
                target, args = edit(decode.args[place])
                decode.update_arg(place, decode.graph.call_function(target, args))


# scores and index keys


@_sparse("keys are scored before the new ones are written", 7, "graph")
def scored_too_early(compiled: HelixModule) -> None:
    for scores in helix_nodes(compiled, "index_scores"):
        append = scores.args[4]
        scores.update_arg(4, append.args[3])
        keys = scores.args[2]
        scores.append(append)
        assert keys.target is aten.slice.Tensor


@_sparse("the indexer's scale is of another width", 8, "graph")
def other_scale(compiled: HelixModule) -> None:
    for scores in helix_nodes(compiled, "index_scores"):
        width = scores.args[0].meta["val"].shape[-1]
        scores.update_arg(5, (width + 4) ** -0.5)


@_sparse("the norm of index keys has the eps of the other norms", 8, "graph")
def other_eps(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        for norm in calls(body.graph, aten.layer_norm.default):
            norm.update_arg(4, 1e-5)


@_sparse("the index key is read one channel late", 4, "graph")
def key_one_channel_late(compiled: HelixModule) -> None:
    for scores in helix_nodes(compiled, "index_scores"):
        cache, dim, start, stop = scores.args[2].args
        scores.args[2].args = (cache, dim, start - 1, stop - 1)


@_kernel("the index key is not written", "cache_append", family=8, kind="cache")
def index_key_not_written(
    cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, rest: Tensor
) -> Tensor:
    kept = torch.where(torch.arange(rest.shape[-1]) < 6, rest, 0)
    return _reference("cache_append", cache, table, slots, visible, latent, kept)


@_sparse("sparse attention over the cache is computed twice", 13, "graph")
def attends_twice(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "mla_decode_slots"):
        with decode.graph.inserting_after(decode):
            decode.graph.call_function(decode.target, decode.args)
