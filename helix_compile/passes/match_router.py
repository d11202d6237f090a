"""Find the router that kernels know: sigmoid scores, a correction bias, top groups, top experts (DeepSeek-V3's).

Accepted by evaluation: logits on a coarse grid and random ones go through the captured nodes and through
moe_router_reference; ids and weights must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, fx

from helix_compile.kernels.reference_router import moe_router_reference
from helix_compile.passes.cones import (
    ancestors,
    blank,
    close,
    constants,
    shape_of_value,
    single_inputs,
)
from helix_compile.passes.evaluate import evaluate
from helix_compile.passes.fx_edit import aten, is_call, is_param
from helix_compile.passes.index_provenance import shape_of

DRAWS = 4


@dataclass(frozen=True)
class RouterMatch:
    """expert_ids, weights = moe_router(logits [N, E], bias [E], ...)."""

    logits: fx.Node
    bias: fx.Node
    num_groups: int
    top_groups: int
    top_k: int
    normalize: bool
    scale: float


def find_router(graph: fx.Graph, expert_ids: fx.Node, weights: fx.Node) -> RouterMatch | str:
    """The router behind a MoE's choice, or why it is not one that the kernel knows."""
    tokens, top_k = shape_of(expert_ids)
    for logits in single_inputs(graph, [expert_ids, weights]):
        shape = shape_of_value(logits)
        if len(shape) != 2 or shape[0] != tokens or logits.meta["val"].dtype != torch.float32:
            continue
        between = ancestors([expert_ids, weights], [logits])
        biases = [n for n in between if is_param(n) and shape_of(n) == (shape[1],)]
        groups = _groups(between, shape[1])
        scales = sorted({1.0, *constants(between)}, reverse=True)
        options = product(biases, groups, (True, False), scales)
        for bias, (num_groups, top_groups), normalize, scale in options:
            match = RouterMatch(logits, bias, num_groups, top_groups, top_k, normalize, scale)
            if _is_router(expert_ids, weights, match):
                return match
    return "the router is not sigmoid scores + bias, top groups, top experts"


def _groups(nodes: set[fx.Node], num_experts: int) -> list[tuple[int, int]]:
    """(groups, groups kept) that the top-k nodes of a cone allow; (1, 1): no groups."""
    topks = [n for n in nodes if is_call(n, aten.topk.default)]
    grids = [shape_of(n.args[0]) for n in topks]
    numbers = [s[-2] for s in grids if len(s) == 3 and s[-2] * s[-1] == num_experts]
    kept = [(s[-1], int(n.args[1])) for s, n in zip(grids, topks, strict=True) if len(s) == 2]
    return [(g, k) for g in numbers for width, k in kept if width == g] + [(1, 1)]


def _is_router(expert_ids: fx.Node, weights: fx.Node, match: RouterMatch) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(match.logits)
    for _ in range(DRAWS):
        logits = torch.randn(shape, generator=generator)
        bias = torch.randn(shape[1], generator=generator).to(match.bias.meta["val"].dtype)
        known: dict[fx.Node, Tensor] = {match.logits: logits, match.bias: bias}
        got_ids = evaluate(expert_ids, known, blank)
        got_weights = evaluate(weights, known, blank)
        ids, expected = moe_router_reference(
            logits,
            bias,
            match.num_groups,
            match.top_groups,
            match.top_k,
            match.normalize,
            match.scale,
        )
        # the original leaves the order of the chosen open
        order, own = got_ids.sort(-1), ids.sort(-1)
        if not torch.equal(order.values, own.values):
            return False
        if not close(got_weights.gather(-1, order.indices), expected.gather(-1, own.indices)):
            return False
    return True
