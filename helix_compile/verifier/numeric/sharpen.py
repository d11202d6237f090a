"""Weights and keys that make faults matter: attention that looks at few keys, a router bias that decides, layers that add as
much as they were given, needles.

A random model attends to everything alike; a lost token, a wrong position or a plain mean then hides below any limit in
16 bits. Each edit is a scale, or acts on what every rank holds, so it commutes with every cut: applied to a rank's own
shard it leaves a fault in place.

On random keys one token in 32768 carries no weight, and a lost one passes any limit. A needle is a key that one head of the last query must find: its score is the row's maximum + ln(S) / 2 + 4
(the bug families of served systems were told apart so, and by no tighter tolerance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import aten, input_ref, is_call, is_param, placeholders
from helix_compile.plan.matches import AttentionMatch, LayerMatch, Table
from helix_compile.verifier.numeric.handed import drawn_keys
from helix_compile.verifier.numeric.layer_run import CapturedReference, LayerInputs, hidden_shape
from helix_compile.verifier.numeric.site_terms import Past, empty_past, given_length, new_entries, terms_of

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
        for layer in reference.captured.layers_of(body):
            B, T = 2, 8
            given = LayerInputs(
                torch.randn(hidden_shape(graph, B, T), generator=generator, dtype=torch.float64),
                torch.ones(B, T, dtype=torch.int64),
                torch.arange(T).expand(B, T).contiguous(),
                tuple(_given(site, B, T, generator) for site in match.attentions),
                drawn_keys(match, [0] * B, T, generator),
            )
            values = reference.layer(layer.index, given)
            for attention in match.attentions:
                query = terms_of(attention).query_parts(values, reference.tensors, layer.prefix)
                seen = scores(attention, query, *new_entries(attention, values)[:2])
                factor = max(1.0, spread / max(float(seen.std()), 1e-6))
                for rows in attention.q_proj.params:
                    edits[layer.prefix + rows.name] = partial(_scaled, factor=factor)
                    if rows.role:  # what ranks hold is called otherwise than the original
                        edits[layer.prefix + rows.param] = partial(_scaled, factor=factor, rows=rows.rows)
                if attention.sinks:
                    name = layer.prefix + attention.sinks.name
                    edits[name] = _as_heavy_as_keys(reference.tensors[name], torch.logsumexp(seen * factor, dim=-1))
            for name, rms in _contributions(match, values):
                factor = max(1.0, 1.0 / max(rms, 1e-6))  # the hidden state has an RMS of one
                edits[layer.prefix + name] = partial(_scaled, factor=factor)
            edits |= _vectors(graph, layer.prefix, match, seed, edits, VECTOR[reference.captured.dtype])
    edits |= _vectors(reference.captured.graph.graph, "", None, seed, edits, VECTOR[reference.captured.dtype])
    # what the model's code makes anew in every call can't be edited there
    return {name: edit for name, edit in edits.items() if name not in reference.captured.constants}


def _given(match: AttentionMatch, B: int, T: int, generator: torch.Generator) -> Past:
    """Nothing is cached; but what an earlier layer has cached of the T new tokens, normal numbers."""
    zeros = empty_past(match, B, given_length(match, 0, T))
    return tuple(torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in zeros)


def _vectors(graph: fx.Graph, prefix: str, match: LayerMatch | None, seed: int, known: Edits, spread: float) -> Edits:
    """Norm weights that are not all one, biases that are not zero: without them one that is left out goes unseen.

    A new model has ones and zeros there, a trained one has not. Vectors that ranks hold parts of are left alone: noise
    would not commute with their cut.
    """
    experts = {m.num_experts for m in match.moes} if match is not None else set()
    cut: set[str | None] = set()
    if match is not None:
        cut |= {part.param for a in match.attentions for _, part in a.cuts}
        cut |= {a.sinks.name for a in match.attentions if a.sinks}
        cut |= {b for f in match.dense_ffns for b in (f.gate_bias, f.up_bias)}
    edits: dict[str, Edit] = {}
    for node in placeholders(graph):
        shape = tuple(node.meta["val"].shape) if is_param(node) else ()
        name = prefix + input_ref(node).name
        readers = [u for u in node.users if u.op == "call_function"]
        if len(shape) != 1 or input_ref(node).name in cut or not readers:
            continue
        is_bias = any(is_call(u, aten.linear.default) and node in u.args[2:] for u in readers)
        is_bias |= any(is_call(u, aten.layer_norm.default) and node in u.args[3:] for u in readers)
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


def _as_heavy_as_keys(sinks: Tensor, lse: Tensor) -> Edit:
    """Sinks that differ by about one and take about half of the weights; else one that is lost would not show."""
    spread = float(sinks.double().std())
    factor = max(1.0, 1.0 / spread) if spread > 1e-6 else 1.0
    return partial(_moved, factor=factor, shift=float(lse.mean()) - factor * float(sinks.double().mean()))


def _moved(sinks: Tensor, factor: float, shift: float) -> Tensor:
    return (sinks.double() * factor + shift).to(sinks)  # rounded once


def _scaled(weight: Tensor, factor: float, rows: Table = ()) -> Tensor:
    """All of it, or rows that make q where others make a gate."""
    if not rows:
        return weight * factor
    scaled, at = weight.clone(), torch.tensor(rows).flatten()
    scaled[at] *= factor
    return scaled


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


def scores(match: AttentionMatch, query: tuple[Tensor, Tensor], latent: Tensor, k_rope: Tensor) -> Tensor:
    """[B, T, H, S] of keys latent [B, S, R], k_rope [B, S, r]."""
    q_latent, q_rope = query
    by_latent = torch.einsum("bthr,bsr->bths", q_latent, latent.double())
    return match.scale * (by_latent + torch.einsum("bthr,bsr->bths", q_rope, k_rope.double()))


def background(
    match: AttentionMatch, query: tuple[Tensor, Tensor], S: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random entries [B, S, R], [B, S, r] whose scores have a spread of about one."""
    B = query[0].shape[0]
    parts = []
    for part, width in zip(query, match.kind.cache.widths, strict=True):
        keys = torch.randn(B, S, width, generator=generator, dtype=torch.float64)
        norm = float(part.square().sum(-1).mean().sqrt()) if width else 1.0
        # V has no part in the scores: values of about one
        parts.append(keys / max(norm * match.scale, 1e-12) / math.sqrt(2) if norm else keys)
    return parts[0], parts[1]


def need_the_new_token(
    match: AttentionMatch, query: tuple[Tensor, Tensor], new: tuple[Tensor, ...], latent: Tensor, lengths: list[int]
) -> int:
    """Shift all past keys so that the last query's own token outweighs them in the last heads; in place.

    The new token's key comes from the hidden state and can't be chosen. A vector u with q_h . u = -1 for these heads,
    added to every past key, lowers all their scores alike. Returns how many heads were made so.
    """
    B, S = latent.shape[:2]
    heads = list(range(match.num_heads))[-2:]
    if S == 0:
        return 0
    for b in range(B):
        first, n = S - lengths[b], lengths[b]
        if n == 0:
            continue
        one = tuple(part[b : b + 1, -1:] for part in query)
        own = scores(match, (one[0], one[1]), new[0][b : b + 1, -1:], new[1][b : b + 1, -1:])[0, 0, heads, 0]
        # a k_rope of zeros would do for the latent part alone: needles in the rope part are planted later
        top = match.scale * torch.einsum("hr,sr->hs", query[0][b, -1, heads], latent[b, first:]).amax(-1)
        lower = (top + math.log(n) + 3 - own).clamp(min=0) / match.scale
        latent[b, first:] += torch.linalg.pinv(query[0][b, -1, heads]) @ -lower
    return B * len(heads)


def needle_places(match: AttentionMatch, n: int, T: int) -> list[int]:
    """Positions of plant()'s needles among n cached tokens, in order of the heads that must find them; of T new tokens the
    last one's.
    """
    if n < 5:
        return []
    places, query_at = [0, n - 1, n // 2, 1, n - 2], n + T - 1
    if match.window or match.chunk:  # what is just forgotten, and what is just seen
        oldest = query_at + 1 - match.window if match.window else query_at // match.chunk * match.chunk
        places = [at for at in (oldest - 1, oldest) if 0 <= at < n] + places
    return places[: max(1, match.num_heads - 2)]


def plant(
    match: AttentionMatch, query: tuple[Tensor, Tensor], latent: Tensor, k_rope: Tensor, lengths: list[int]
) -> int:
    """Overwrite keys of each sequence with needles, in place; returns how many.

    For the last query, head by head in turn: at the start of the context, near its end, in the middle (by the latent),
    and at the start and the end by the rope part alone. Rows are aligned at the end: the first key of row b is at
    S - lengths[b].
    """
    B, S = latent.shape[:2]
    q_latent, q_rope = query[0][:, -1], query[1][:, -1]  # [B, H, *] of the last query
    planted = 0
    for b in range(B):
        first, n = S - lengths[b], lengths[b]
        places = needle_places(match, n, query[0].shape[1])
        for h, place in enumerate(first + p for p in places):
            by_rope = h >= 3 and bool(q_rope.any())
            part, keys = (q_rope, k_rope) if by_rope else (q_latent, latent)
            direction = part[b, h]
            row = scores(match, query, latent, k_rope)[b, -1, h, first:]
            target = float(row.max()) + math.log(n) / 2 + 4
            now = float(row[place - first])
            strength = (target - now) / (match.scale * float(direction.square().sum()))
            keys[b, place] += strength * direction
            planted += 1
    return planted
