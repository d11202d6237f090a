"""Faults of one rank that a comparison of two runs must find, put into a compiled module before its steps, in either world."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from helix_compile.ir.stage import copy_module
from helix_compile.runtime.values import ValueDump
from tests.distributed.steps import prompts

FAULTY, OTHER = 2, 1
NORM, SPLIT = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.o_proj.weight"


def dump_run(compiled: Any, folder: Path, fault: Callable[[Any], None]) -> None:
    """A ragged prompt and one step, with the fault, written to `folder`; then the module is as it was."""
    stage, params = compiled.stages["lowered"], [dict(rank.params) for rank in compiled.ranks]
    compiled.stages["lowered"] = copy_module(stage)
    with patch.dict(os.environ, {"HELIX_DUMP_VALUES": str(folder)}):
        compiled._value_dump = ValueDump.from_environment(compiled.plan)  # as if it were made now: a compile is dear
    fault(compiled)
    compiled.reset()
    ids, mask = prompts()
    compiled(ids, mask), compiled(ids[:, :1])
    compiled.stages["lowered"], compiled._value_dump = stage, None
    for rank, held in zip(compiled.ranks, params, strict=True):
        for name, tensor in held.items():
            rank.params[name] = tensor


def wrong_norm(compiled: Any) -> None:
    """The input norm of layer 1 is a tenth larger on one rank."""
    for rank in compiled.ranks:
        if rank.rank == FAULTY:
            rank.params[NORM] = rank.params[NORM] * 1.1


def swapped_shards(compiled: Any) -> None:
    """Two ranks have each other's part of o_proj of layer 1."""
    held = {rank.rank: rank.params[SPLIT] for rank in compiled.ranks}
    if len(held) == 1:
        (mine,) = held.values()
        everyone = [torch.empty_like(mine) for _ in range(compiled.plan.layout.world_size)]
        dist.all_gather(everyone, mine.contiguous())
        held = dict(enumerate(everyone))
    for rank in compiled.ranks:
        swapped = {FAULTY: OTHER, OTHER: FAULTY}
        rank.params[SPLIT] = held[swapped.get(rank.rank, rank.rank)]


def off_by_one(compiled: Any) -> None:
    """One rank turns its queries and keys by the position after the right one. On real ranks its graph alone is edited."""
    if FAULTY not in [rank.rank for rank in compiled.ranks]:
        return
    graph = compiled.graph.graph
    first = next(n for n in graph.nodes if str(n.target) == "aten.unsqueeze.default" and _is_whole(n.args[0]))
    rank = next(n for n in graph.nodes if n.name == "kvp_rank")
    with graph.inserting_before(first):
        more = graph.call_function(torch.ops.aten.eq.Scalar, (rank, FAULTY))
        moved = graph.call_function(torch.ops.aten.add.Tensor, (first.args[0], more))
    first.replace_input_with(first.args[0], moved)
    compiled.graph.recompile()


def _is_whole(node: Any) -> bool:
    """Positions, not the frequencies that older versions of transformers unsqueeze before them."""
    return node.meta["val"].dtype is torch.int64


def sees_less(compiled: Any) -> None:
    """One rank attends to one token fewer than it has."""
    if FAULTY not in [rank.rank for rank in compiled.ranks]:
        return
    graph = compiled.graph.graph
    visible, rank = (next(n for n in graph.nodes if n.name == name) for name in ("visible", "kvp_rank"))
    users = list(visible.users)
    with graph.inserting_after(visible):
        is_faulty = graph.call_function(torch.ops.aten.eq.Scalar, (rank, FAULTY))
    with graph.inserting_after(is_faulty):
        less = graph.call_function(torch.ops.aten.mul.Tensor, (is_faulty, -1))
    with graph.inserting_after(less):
        moved = graph.call_function(torch.ops.aten.add.Tensor, (visible, less))
    with graph.inserting_after(moved):
        clamped = graph.call_function(torch.ops.aten.clamp.default, (moved, 0))
    for user in users:
        user.replace_input_with(visible, clamped)
    compiled.graph.recompile()


def nothing(compiled: Any) -> None:
    """As it is."""


FAULTS: dict[str, Callable[[Any], None]] = {
    "plain": nothing,
    "again": nothing,
    "norm": wrong_norm,
    "swapped": swapped_shards,
    "position": off_by_one,
    "length": sees_less,
}


def check_found(name: str, found: Any) -> None:
    """What compare() of "plain" and a fault must say: the first wrong node, its layer and the ranks."""
    first = found.first
    weights = [(d.place, d.node, d.ranks) for d in found.parameters]
    match name:
        case "plain" | "again":
            assert found.equal and first is None and found.compared > 300
            assert max(g.off for g in found.growth) == 0
        case "norm":
            assert (first.step, first.place, first.ranks) == (0, "layer_1", (FAULTY,))
            assert first.op == "aten.mul.Tensor" and ("input_layernorm_weight", "differs") in first.reads
            assert weights == [("layer_1", "input_layernorm_weight", (FAULTY,))]
            assert [(c.run, c.ranks) for c in found.contradictions] == [("B", (FAULTY,))]
        case "swapped":
            assert (first.step, first.place, first.ranks) == (0, "layer_1", (OTHER, FAULTY))
            assert first.op == "aten.linear.default" and ("self_attn_o_proj_weight", "differs") in first.reads
            assert weights == [("layer_1", "self_attn_o_proj_weight", (OTHER, FAULTY))]
        case "position":
            assert (first.step, first.place, first.ranks) == (0, "outer", (FAULTY,))
            assert first.op == "aten.unsqueeze.default" and first.values == (0.0, 1.0)
            assert not found.parameters and found.only["B"]
            # RoPE is relative: a rank that turns its queries and its own keys alike has the right attention
            assert max(g.off for g in found.growth) < 1e-5
        case "length":
            assert (first.step, first.place, first.ranks) == (0, "layer_0", (FAULTY,))
            assert first.op == "helix.cache_append.default" and not found.parameters
            growth = {(g.step, g.place, g.role): g for g in found.growth}
            assert growth[0, "layer_0", "attn_out"].off > 1e-2  # it reaches what ranks share
            assert growth[0, "layer_0", "attn_out"].ranks == (0, 1, 2, 3)
        case _:
            raise AssertionError(name)
