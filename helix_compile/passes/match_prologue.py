"""Find what stands before the cache and the attention: the latent's RMSNorm, and RoPE of a key or of the queries.

Both are accepted by what they compute on random values, so no spelling of either is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from helix_compile.kernels.reference_fused import rms_norm_reference, rope_reference
from helix_compile.passes.cones import (
    ancestors,
    blank,
    close,
    constants,
    shape_of_value,
    single_inputs,
)
from helix_compile.passes.evaluate import evaluate
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.passes.index_provenance import shape_of


@dataclass(frozen=True)
class NormMatch:
    """`result` = rms_norm(source [.., R], weight [R], eps)."""

    source: fx.Node
    weight: fx.Node
    eps: float


@dataclass(frozen=True)
class RopeMatch:
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
        if n.meta["input"][0] not in ("param", "hidden", "step", "cache")
        and shape_of_value(n)[1:] == (shape_of(result)[-2], r)
    ]
    for source in single_inputs(graph, [result], besides=tables):
        shape = shape_of_value(source)
        if shape[-2:] != shape_of(result)[-2:]:
            continue
        for cos, sin in ((a, b) for a in tables for b in tables if a is not b):
            for interleaved in (True, False):
                if _is_rope(result, RopeMatch(source, cos, sin, interleaved)):
                    return RopeMatch(source, cos, sin, interleaved)
    return f"no RoPE by two tables [B, T, {r}] makes `{result.name}`"


def _is_rope(result: fx.Node, match: RopeMatch) -> bool:
    x = _random(match.source)
    # both halves of a table are alike in every rope: cos(theta_j) stands at j and at j + r/2
    half = [_random(t)[..., : shape_of(t)[-1] // 2] for t in (match.cos, match.sin)]
    cos, sin = (
        torch.cat([half[0], half[0]], -1),
        torch.cat([half[1].flip(-1), half[1].flip(-1)], -1),
    )
    got = evaluate(result, {match.source: x, match.cos: cos, match.sin: sin}, blank)
    heads = x.reshape(x.shape[0], -1, *x.shape[-2:])
    expected = rope_reference(heads, cos[:, None], sin[:, None], match.interleaved)
    return got.numel() == expected.numel() and close(got.reshape(expected.shape), expected)
