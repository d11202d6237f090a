"""Faults of windows and of sinks: what a query has forgotten, and a logit that must count once."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.stage import bodies_of
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.mutant import (
    A2A,
    MIXED,
    WINDOW_CATALOGUE,
    edit_param,
    helix_nodes,
    kernel_mutant,
    mutant,
)

# experts of the model are in no pattern
KEEP: dict[str, Any] = {**A2A, "unmatched": "keep"}
KEEP_MIXED: dict[str, Any] = {**MIXED, "unmatched": "keep"}

ALONE: dict[str, Any] = {**KEEP, "window": "replicate"}

_windows = partial(mutant, options=KEEP, catalogue=WINDOW_CATALOGUE)
_alone = partial(mutant, options=ALONE, catalogue=WINDOW_CATALOGUE)


def _kernel(name: str, family: int, base: str, kind: str = "kernel", options: dict[str, Any] = KEEP) -> Any:
    return kernel_mutant(name, family, base, options, kind, WINDOW_CATALOGUE)


def _first(*args: Any) -> Tensor:
    first: Tensor = torch.ops.helix.first_visible(*args)
    return first


@_kernel("a window begins one slot late", 7, "first_visible", "positions")
def one_slot_late(positions: Tensor, rank: Tensor, cp: int, block: int, window: int, chunk: int) -> Tensor:
    first = _first(positions, rank, cp, block, window, chunk)
    return first + (first > 0)


@_kernel("a window begins one slot early", 7, "first_visible", "positions", KEEP_MIXED)
def one_slot_early(positions: Tensor, rank: Tensor, cp: int, block: int, window: int, chunk: int) -> Tensor:
    return (_first(positions, rank, cp, block, window, chunk) - 1).clamp(min=0)


@_kernel("a query's own token is not counted in its window", 7, "first_visible", "positions")
def one_token_more(positions: Tensor, rank: Tensor, cp: int, block: int, window: int, chunk: int) -> Tensor:
    return _first(positions, rank, cp, block, window + 1, chunk)


@_kernel("where a window begins is a position, used as a slot", 4, "first_visible", "positions")
def position_as_slot(positions: Tensor, rank: Tensor, cp: int, block: int, window: int, chunk: int) -> Tensor:
    return (positions + 1 - window).clamp(min=0).int()


@_kernel("T > 1: all queries of a step have the first one's window", 7, "first_visible", "positions")
def window_of_the_first(positions: Tensor, rank: Tensor, cp: int, block: int, window: int, chunk: int) -> Tensor:
    first = _first(positions, rank, cp, block, window, chunk)
    kept = torch.where(positions >= 0, first, torch.iinfo(torch.int32).max).amin(dim=1, keepdim=True)
    return torch.where(positions >= 0, kept, 0)


@_windows("the layer with a window sees all", 7, "graph")
def no_window(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "gqa_decode"):
        decode.kwargs = {}


@_windows("the plan says another window than the model has", 9, "plan")
def other_window(compiled: HelixModule) -> None:
    body = compiled.plan.bodies[0]
    site = replace(body.attentions[0], window=body.attentions[0].window + 1)
    bodies = (replace(body, attentions=(site,)), *compiled.plan.bodies[1:])
    compiled.plan = replace(compiled.plan, bodies=bodies)


@_kernel("a sink stands in every rank's part", 6, "apply_sinks")
def sink_in_every_part(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    # parts normalised with a sink each, and merged, are exactly this: the sum of keys meets cp sinks
    return _applied(o, lse, sinks + math.log(KEEP["cp"]))


@_kernel("sinks are scaled as scores are", 8, "apply_sinks")
def scaled_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    return _applied(o, lse, sinks * 0.267)


@_kernel("sinks are left out", 6, "apply_sinks", options=KEEP_MIXED)
def no_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    return o.clone()


@_kernel("sinks are applied twice", 6, "apply_sinks")
def twice(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    return _applied(_applied(o, lse, sinks), lse, sinks)


@_kernel("sinks weigh against the keys of one rank", 6, "total_lse")
def of_one_rank(lse: Tensor) -> Tensor:
    return lse[0].clone()


@_windows("sinks of a rank are those of the heads beside its own", 2, "parameters")
def neighbours_sinks(compiled: HelixModule) -> None:
    edit_param(compiled, "sinks", lambda held, rank: held.roll(1, 0))


@_windows("sinks act on a rank's part before the exchange", 6, "graph")
def before_the_merge(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        applied = next(n for n in body.graph.nodes if n.target is torch.ops.helix.apply_sinks.default)
        decode = next(n for n in body.graph.nodes if n.name == "partial_o")
        lse = next(n for n in body.graph.nodes if n.name == "lse")
        applied.replace_all_uses_with(applied.args[0])
        sinks = applied.args[2]
        body.graph.erase_node(applied)
        with body.graph.inserting_after(lse):
            whole = body.graph.call_function(torch.ops.aten.repeat.default, (sinks, [KEEP["cp"]]))
        with body.graph.inserting_after(whole):
            moved = body.graph.call_function(torch.ops.helix.apply_sinks.default, (decode, lse, whole))
        decode.replace_all_uses_with(moved, delete_user_cb=lambda user, own=moved: user is not own)


def _ranks_heads(x: Tensor, rank: Tensor, peers: int) -> Tensor:
    heads: Tensor = torch.ops.helix.heads_of_rank(x, rank, peers)
    return heads


@_kernel("a ring holds the KV heads that the rank beside reads", 2, "heads_of_rank", "kernel", ALONE)
def neighbours_kv_heads(x: Tensor, rank: Tensor, peers: int) -> Tensor:
    return _ranks_heads(x, (rank + 1) % peers, peers)


@_alone("a ring begins again one page early", 4, "cache")
def one_page_short(compiled: HelixModule) -> None:
    ledger = compiled._ledger
    for pages, table in ledger.ring_tables.items():
        ledger.ring_tables[pages] = torch.where(table % pages == pages - 1, table - pages + 1, table)


@_alone("the plan's ring is shorter than a window", 9, "plan")
def short_ring(compiled: HelixModule) -> None:
    body = compiled.plan.bodies[0]
    bodies = (replace(body, attentions=(replace(body.attentions[0], ring=1),)), *compiled.plan.bodies[1:])
    compiled.plan = replace(compiled.plan, bodies=bodies)


@_alone("tokens are written to a ring one slot late", 7, "positions")
def one_slot_on(compiled: HelixModule) -> None:
    for node in helix_nodes(compiled, "shard_index"):
        if node.args[2] == 1:
            with node.graph.inserting_before(node):
                later = node.graph.call_function(torch.ops.aten.add.Tensor, (node.args[0], 1))
            node.args = (later, *node.args[1:])


def _applied(o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    out: Tensor = torch.ops.helix.apply_sinks(o, lse, sinks)
    return out
