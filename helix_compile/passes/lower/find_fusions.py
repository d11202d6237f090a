"""Find what kernels fuse: the latent's RMSNorm, RoPE of a key or of the queries, and DeepSeek-V3's router.

    router = sigmoid scores, a correction bias, top groups, top experts

All are accepted by what they compute on random values (the router also on ids), so no spelling of any is looked for.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors, blank, close, constants, evaluate, shape_of_value, single_inputs
from helix_compile.ir.graph import aten, input_ref, is_call, is_param, placeholders
from helix_compile.ir.sizes import shape_of
from helix_compile.kernels.reference import moe_router_reference
from helix_compile.kernels.reference_fused import rms_norm_reference, rope_reference


class NormMatch(NamedTuple):
    """`result` = rms_norm(source [.., R], weight [R], eps)."""

    source: fx.Node
    weight: fx.Node
    eps: float


class RopeMatch(NamedTuple):
    """`result` = rope(source [.., T, r], cos [B, T, r], sin [B, T, r])."""

    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool


def find_norm(graph: fx.Graph, result: fx.Node) -> NormMatch | str:
    """The RMSNorm that makes `result` [B, T, R] of a value of the same shape, or why there is none."""
    width = shape_of(result)[-1]
    found: NormMatch | None = None
    for source in single_inputs(graph, [result]):
        if shape_of_value(source) != shape_of(result):
            continue
        between = ancestors([result], [source])
        weights = [n for n in between if is_param(n) and shape_of(n) == (width,)]
        for weight in weights:
            for eps in constants(between):
                if _is_norm(result, source, weight, eps):
                    found = NormMatch(source, weight, eps)
        if found is None and len(between) > 24:
            break
    return found or f"no RMSNorm with a weight [{width}] makes `{result.name}`"


def _random(node: fx.Node, scale: float = 1.0) -> Tensor:
    """Values of a node's shape and dtype; the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = shape_of(node), node.meta["val"].dtype
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def _is_norm(result: fx.Node, source: fx.Node, weight: fx.Node, eps: float) -> bool:
    for scale in (1.0, 1e-3):  # small values show the epsilon
        x, w = _random(source, scale), _random(weight)
        got = evaluate(result, {source: x, weight: w}, blank)
        if not close(got, rms_norm_reference(x, w, eps)):
            return False
    return True


def find_rope(graph: fx.Graph, result: fx.Node) -> RopeMatch | str:
    """The RoPE that makes `result` [.., T, r], or why there is none. Tables are inputs [B, T, r] of the body."""
    r = shape_of(result)[-1]
    tables = [
        n
        for n in placeholders(graph)
        if input_ref(n).kind not in ("param", "hidden", "step", "cache", "layer")
        and shape_of_value(n)[1:] == (shape_of(result)[-2], r)
    ]
    for source in single_inputs(graph, [result], besides=tables):
        shape = shape_of_value(source)
        if shape[-2:] != shape_of(result)[-2:]:
            continue
        for (cos, sin), interleaved in product(permutations(tables, 2), (True, False)):
            match = RopeMatch(source, cos, sin, interleaved)
            if _is_rope(result, match):
                return match
    return f"no RoPE by two tables [B, T, {r}] makes `{result.name}`"


def _is_rope(result: fx.Node, match: RopeMatch) -> bool:
    x = _random(match.source)
    # both halves of a table are alike in every rope: cos(theta_j) stands at j and at j + r/2
    half = [_random(t)[..., : shape_of(t)[-1] // 2] for t in (match.cos, match.sin)]
    cos, sin = (torch.cat([half[0], half[0]], -1), torch.cat([half[1].flip(-1), half[1].flip(-1)], -1))
    got = evaluate(result, {match.source: x, match.cos: cos, match.sin: sin}, blank)
    heads = x.reshape(x.shape[0], -1, *x.shape[-2:])
    expected = rope_reference(heads, cos[:, None], sin[:, None], match.interleaved)
    return got.numel() == expected.numel() and close(got.reshape(expected.shape), expected)


DRAWS = 4


class RouterMatch(NamedTuple):
    """expert_ids, weights = moe_router(logits [N, E], bias [E], ...): its arguments, in order."""

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
        ids, expected = moe_router_reference(logits, bias, *match[2:])
        # the original leaves the order of the chosen open
        order, own = got_ids.sort(-1), ids.sort(-1)
        if not torch.equal(order.values, own.values):
            return False
        if not close(got_weights.gather(-1, order.indices), expected.gather(-1, own.indices)):
            return False
    return True
