"""Weights that make faults matter: attention that looks at few keys, a router bias that decides, layers that add
as much as they were given.

A random model attends to everything alike; a lost token, a wrong position or a plain mean then hides below any limit in
16 bits. Each edit is a scale, or acts on what every rank holds, so it commutes with every cut: applied to a rank's own
shard it leaves a fault in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.matches import LayerMatch
from helix_compile.passes.fx_edit import aten, is_call, is_param, placeholders
from helix_compile.verifier.layer_run import CapturedReference, LayerInputs
from helix_compile.verifier.needles import scores
from helix_compile.verifier.site_terms import empty_past, new_entries, query_parts

Edit = Callable[[Tensor], Tensor]
Edits = dict[str, Edit]  # full parameter name -> its edit

# standard deviation of the scores of new tokens after the edit: a few keys a head matter. In float32 the noise of
# sharp scores would reach the limit of 1e-5 over four layers, and 2 shows every fault there.
SPREAD = {torch.float64: 6.0, torch.float32: 2.0, torch.bfloat16: 6.0, torch.float16: 6.0}
# spread of norm weights around what they are, and of what is added to biases; none in float32, where it lifts the
# rounding of far RoPE angles over the limit: verify(dtype=torch.float64) shows a vector that is left out
VECTOR = {torch.float64: 0.2, torch.float32: 0.0, torch.bfloat16: 0.2, torch.float16: 0.2}
BIAS = 0.2  # spread of the router's correction bias, as a part of the spread of its scores: some choices turn


def sharpening(reference: CapturedReference, seed: int, spread: float | None = None) -> Edits:
    """Edits by full parameter name, measured on one layer of each body with random hidden states.

    Args:
        spread: standard deviation of the scores afterwards; by default that of SPREAD for the captured dtype.
    """
    spread = SPREAD[reference.captured.dtype] if spread is None else spread
    edits: Edits = {}
    generator = torch.Generator().manual_seed(seed)
    for body, match in reference.matches.items():
        graph = reference.captured.bodies[body].graph
        hidden = placeholders(graph)[0].meta["val"]
        for layer in reference.captured.layers_of(body):
            B, T = 2, 8
            given = LayerInputs(
                torch.randn(B, T, int(hidden.shape[-1]), generator=generator, dtype=torch.float64),
                torch.ones(B, T, dtype=torch.int64),
                torch.arange(T).expand(B, T).contiguous(),
                tuple(
                    (a.double(), b.double())
                    for a, b in (empty_past(site, B, 0) for site in match.attentions)
                ),
            )
            values = reference.layer(layer.index, given)
            for attention in match.attentions:
                query = query_parts(attention, values, reference.tensors, layer.prefix)
                seen = scores(attention, query, *new_entries(attention, values))
                factor = max(1.0, spread / max(float(seen.std()), 1e-6))
                edits[layer.prefix + attention.q_weight] = partial(_scaled, factor=factor)
                if attention.q_bias:
                    edits[layer.prefix + attention.q_bias] = partial(_scaled, factor=factor)
            for name, rms in _contributions(match, values):
                factor = max(1.0, 1.0 / max(rms, 1e-6))  # the hidden state has an RMS of one
                edits[layer.prefix + name] = partial(_scaled, factor=factor)
            edits |= _vectors(
                graph, layer.prefix, match, seed, edits, VECTOR[reference.captured.dtype]
            )
    return edits | _vectors(
        reference.captured.graph.graph, "", None, seed, edits, VECTOR[reference.captured.dtype]
    )


def _vectors(
    graph: fx.Graph,
    prefix: str,
    match: LayerMatch | None,
    seed: int,
    known: Edits,
    spread: float,
) -> Edits:
    """Norm weights that are not all one, biases that are not zero: without them one that is left out goes unseen.

    A new model has ones and zeros there, a trained one has not. Vectors that ranks hold parts of are left alone: noise
    would not commute with their cut.
    """
    experts = {m.num_experts for m in match.moes} if match is not None else set()
    cut = set() if match is None else {b for a in match.attentions for b in a.cut_biases}
    cut |= (
        set() if match is None else {b for f in match.dense_ffns for b in (f.gate_bias, f.up_bias)}
    )
    edits: dict[str, Edit] = {}
    for node in placeholders(graph):
        shape = tuple(node.meta["val"].shape) if is_param(node) else ()
        name = prefix + node.meta["input"][1]
        readers = [u for u in node.users if u.op == "call_function"]
        if len(shape) != 1 or node.meta["input"][1] in cut or not readers:
            continue
        is_bias = any(is_call(u, aten.linear.default) and node in u.args[2:] for u in readers)
        if shape[0] in experts:
            edits[name] = partial(_biased, seed=seed)
        elif is_bias:
            edits[name] = partial(_shifted, seed=seed, spread=spread, scaled=known.get(name))
        else:
            edits[name] = partial(_uneven, seed=seed, spread=spread)
    return edits


def _contributions(match: LayerMatch, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(weight, RMS of what it adds to the hidden state): o_proj and every down projection, biases alike.

    Where a random model adds a hundredth of the hidden state, a wrong expert drowns in the rounding of the sum.
    """

    def rms(name: str) -> float:
        return float(values[name].double().square().mean().sqrt())

    for attention in match.attentions:
        yield attention.o_weight, rms(attention.o_proj)
        if attention.o_bias:
            yield attention.o_bias, rms(attention.o_proj)
    for ffn in match.dense_ffns:
        yield ffn.down_weight, rms(ffn.down)
        if ffn.down_bias:
            yield ffn.down_bias, rms(ffn.down)
    for moe in match.moes:
        yield moe.down, rms(moe.output)


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight * factor


def _shifted(bias: Tensor, seed: int, spread: float, scaled: Edit | None) -> Tensor:
    """Scaled as its weight is, and added to: what a model holds stays in it."""
    bias = bias if scaled is None else scaled(bias)
    noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed + 1))
    return bias + (spread * noise).to(bias)


def _uneven(weight: Tensor, seed: int, spread: float) -> Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 2))
    return weight * (1.0 + spread * noise.clamp(-2, 2)).to(weight)


def _biased(bias: Tensor, seed: int) -> Tensor:
    noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed))
    return bias + (BIAS * noise).to(bias)
