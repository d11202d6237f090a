"""A lowered graph in pieces for TensorRT: what lies between collectives and helix:: ops, and an engine can take whole.

    norm, q, latent, rope, W_UK | cache_append, mla_decode, pack, all_to_all, wait, unpack, merge | W_UV, o_proj | all_reduce, wait |
    segment_0                                                                                       segment_1
    add, norm, dense FFN        | all_reduce, wait | add
    segment_2

Pieces are segments of a narrower cut (segments.py): runs of neighbours. Outside stay attention, cache, merge, exchange and routed
experts, which have ops and kernels of ours; the choice of experts, which rounding would change; and what no engine of free B and T
takes: integers, and sizes that are no B, no T and no number. The outer graph is not cut: embedding, tables and head stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import PassError
from helix_compile.ir.collectives import WAIT, is_collective
from helix_compile.ir.graph import helix_op, input_ref, is_call, is_param, placeholders
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.ir.sizes import HINT_B, HINT_T, hint_of, shape_text
from helix_compile.ir.stage import SEGMENTS, bodies_of, copy_module
from helix_compile.passes.lower.segments import computes, cut_graph, is_boundary, is_size
from helix_compile.passes.runner import PassContext

NO_ENGINE = "no_engine"  # meta of a node in a cut graph: why it is in no piece
ALONE = "one op between two that stay: calling an engine for it costs more"
_ENDS = ("placeholder", "output")
_OF_EXPERTS = ("moe_experts",)  # its second and third argument say which experts, and how much of each


@dataclass(frozen=True)
class PiecesPass:
    """The stage behind `lowered` where engines are built. See Pass."""

    stage: str = SEGMENTS

    def requires(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Any lowered stage can be cut."""

    def run(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Cut every body."""
        _cut_bodies(stage)

    def ensures(self, stage: fx.GraphModule, context: PassContext) -> None:
        """No piece holds what has no engine."""
        for name, piece in pieces(stage):
            if bad := [n.name for n in piece.graph.nodes if n.op == "call_function" and _stays(n) is not None]:
                raise PassError(f"{name}: {', '.join(bad)} inside a piece")


def pieces_of(lowered: fx.GraphModule) -> fx.GraphModule:
    """The stage `segments` of a lowered one whose pieces become engines; the lowered one is left as it is."""
    copy = copy_module(lowered)
    _cut_bodies(copy)
    return copy


def pieces(stage: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """("body_0_segment_1", graph) of each piece of a cut stage."""
    for body in bodies_of(stage).values():
        yield from bodies_of(body).items()


def piece_facts(stage: fx.GraphModule) -> list[dict[str, Any]]:
    """Of each body of a cut stage: its pieces (ops, what their engines take, hold and return), and of the other ops why not. Plain data."""
    found = []
    for name, body in bodies_of(stage).items():
        rows = [_facts(called, piece) for called, piece in bodies_of(body).items()]
        left = [
            {"node": n.name, "op": str(n.target), "why": n.meta[NO_ENGINE]}
            for n in body.graph.nodes
            if NO_ENGINE in n.meta and not is_call(n, operator.getitem)
        ]
        found.append({"body": name, "pieces": rows, "in_no_engine": left})
    return found


def _facts(name: str, piece: fx.GraphModule) -> dict[str, Any]:
    taken, output = placeholders(piece.graph), next(n for n in piece.graph.nodes if n.op == "output")
    return {
        "piece": name,
        "ops": sum(
            n.op == "call_function" and not is_size(n) and not is_call(n, operator.getitem) for n in piece.graph.nodes
        ),
        "inputs": [f"{n.name}{shape_text(n.meta['val'])}" for n in taken if not is_param(n)],
        "weights": [input_ref(n).name for n in taken if is_param(n)],
        "outputs": [f"{n.name}{shape_text(n.meta['val'])}" for n in output.args[0]],
    }


def why_in_none(graph: fx.Graph) -> dict[fx.Node, str]:
    """Of every node that is in no piece: why. Sizes, inputs and what is taken out of tuples are not judged."""
    reasons: dict[fx.Node, str] = {}
    chosen = _only_choose_experts(graph)
    for node in graph.nodes:
        if node.op in _ENDS or is_size(node):
            continue
        reason = "it chooses experts: rounded otherwise, it would choose others" if node in chosen else _stays(node)
        if reason is not None:
            reasons[node] = reason
    return reasons


def _cut_bodies(stage: fx.GraphModule) -> None:
    for name, body in bodies_of(stage).items():
        propagate_shapes(body.graph)
        for node, reason in why_in_none(body.graph).items():
            node.meta[NO_ENGINE] = reason
        cut_graph(body, name, lambda node: node.op in _ENDS or NO_ENGINE in node.meta)
        for node in body.graph.nodes:  # what is left is in a run that is no piece
            left = node.op == "call_function" and "segment" not in node.meta and NO_ENGINE not in node.meta
            if left and computes(node) and not is_size(node):
                node.meta[NO_ENGINE] = ALONE


def _stays(node: fx.Node) -> str | None:
    """Why an op by itself is no engine's; None where it may be in one."""
    if is_collective(node) or is_call(node, WAIT):
        return "a collective"
    if is_boundary(node):
        return "no op of torch" if node.op == "call_function" else "a module's or a constant's"
    if str(node.target).startswith(("helix.", "helix_triton.")):
        return f"{helix_op(node) or str(node.target)}: an op of ours"
    for value in (node, *node.all_input_nodes):
        if (reason := _not_of_an_engine(value.meta.get("val"))) is not None:
            return reason if value is node else f"reads `{value.name}`: {reason}"
    return None


def _not_of_an_engine(value: Any) -> str | None:
    """Why a value can't be an engine's."""
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if not isinstance(part, Tensor):
            continue  # a number, or a size, which the engine computes from its inputs
        if not part.dtype.is_floating_point:
            return f"{str(part.dtype).removeprefix('torch.')}, where engines hold floats"
        if not all(map(_is_free_or_fixed, part.shape)):
            return f"{shape_text(part)}, where B, T and numbers are an engine's sizes"
    return None


def _is_free_or_fixed(size: int | torch.SymInt) -> bool:
    if isinstance(size, int):
        return True
    return bool(size.node.expr.is_Symbol) and hint_of(size) in (HINT_B, HINT_T)


def _only_choose_experts(graph: fx.Graph) -> set[fx.Node]:
    """What leads to which experts a token gets and how much of each, and to nothing else."""
    found: set[fx.Node] = set()

    def chooses(user: fx.Node, node: fx.Node) -> bool:
        if helix_op(user) in _OF_EXPERTS:
            return node in user.args[1:3] and node not in (user.args[0], *user.args[3:])
        return user in found

    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.users and all(chooses(user, node) for user in node.users):
            found.add(node)
    return found
