"""Embedding and head cut by rows of the vocabulary, with rows that are another rank's, and zeros that become words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.graph import aten, is_call
from helix_compile.module import HelixModule
from helix_compile.plan.helix_plan import OuterPlan
from helix_compile.verifier.mutants.mutant import A2A, edit_param, mutant

SHARDED: dict[str, Any] = {**A2A, "cp": 5, "head": "shard", "pad_heads": True}  # the vocabulary does not divide by 5


@mutant("two ranks hold each other's rows of the head", 2, "parameters", SHARDED)
def swapped_rows(compiled: HelixModule) -> None:
    first, second = (compiled.ranks[r].params for r in (1, 2))
    for name in [n for n in first if n.endswith("lm_head.weight")]:
        first[name], second[name] = second[name], first[name]


@mutant("ranks count their rows of the embedding from the one before", 2, "graph", SHARDED)
def first_row_off(compiled: HelixModule) -> None:
    for node in [n for n in compiled.graph.graph.nodes if n.name == "first_row"]:
        node.args = (node.args[0], node.args[1] - 1)


@mutant("the logits are those of the last words and the rows of zeros, without the first", 2, "graph", SHARDED)
def padded_rows_chosen(compiled: HelixModule) -> None:
    for node in [n for n in compiled.graph.graph.nodes if is_call(n, aten.slice.Tensor) and n.args[1] == 2]:
        x, dim, start, stop = node.args
        node.args = (x, dim, start + 1, stop + 1)


@mutant("rows of zeros of the head are not zero, and no logit shows it", 2, "parameters", SHARDED)
def zeros_filled(compiled: HelixModule) -> None:
    def filled(weight: Tensor, rank: int) -> Tensor:
        return torch.where(weight == 0, weight.mean() + 1, weight)

    partial(edit_param, ending="lm_head.weight", edit=filled)(compiled)


@mutant("the plan has no word of what is cut around the layers", 12, "plan", SHARDED)
def unsaid(compiled: HelixModule) -> None:
    compiled.plan = replace(compiled.plan, outer=OuterPlan())
