"""Find MLA sites by dataflow: anchor on attention, then ask where every element of K and V comes from.

    norm -> linear(kv_a) -> [latent | rope] -> cache -> linear(kv_up)(latent) -> [k_nope | v],  K = [k_nope, rope]

No class, module or parameter name is looked at: q_lora or not, interleaved or half rope never matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.matches import AttentionMatch, MatchFailure, Table
from helix_compile.passes.evaluate import evaluate
from helix_compile.passes.fx_edit import aten, calls, is_call, is_param, source_line
from helix_compile.passes.index_provenance import (
    Provenance,
    is_cache_update,
    is_layout_op,
    shape_of,
    trace_elements,
)


class _Reject(Exception):
    """Unwinds one candidate; becomes a MatchFailure."""

    def __init__(self, reason: str, node: fx.Node, depth: int):
        super().__init__(reason)
        self.failure = MatchFailure(reason, node.name, source_line(node), depth)


@dataclass(frozen=True)
class _Anchor:
    """One attention in normal form: softmax(scale * q k^T + mask) v."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float


def find_mla(graph: fx.Graph) -> list[AttentionMatch | MatchFailure]:
    """One entry per attention site of a body, in graph order."""
    sites = calls(graph, aten.scaled_dot_product_attention.default)
    sites += [n for n in calls(graph, aten.matmul.default, aten.bmm.default) if _softmax_of(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    results: list[AttentionMatch | MatchFailure] = []
    for node in sorted(sites, key=order.__getitem__):
        try:
            anchor = _fused_anchor(node) if node in calls(graph, _SDPA) else _eager_anchor(node)
            results.append(_match_site(anchor))
        except _Reject as rejection:
            results.append(rejection.failure)
    return results


_SDPA = aten.scaled_dot_product_attention.default


def _softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax whose result `node` multiplies, through casts and copies."""
    source: Any = node.args[0]
    while is_call(
        source, aten._to_copy.default, aten.clone.default, aten.expand.default, aten.view.default
    ):
        source = source.args[0]
    return source if is_call(source, aten.softmax.int, aten._softmax.default) else None


def _fused_anchor(node: fx.Node) -> _Anchor:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if node.kwargs.get("enable_gqa"):
        raise _Reject("grouped-query attention: K and V have fewer heads than q", node, 0)
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise _Reject("is_causal without a mask is not the causal mask of a decode step", node, 0)
    scale = node.kwargs.get("scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    return _Anchor(node, q, k, v, mask, scale)


def _eager_anchor(node: fx.Node) -> _Anchor:
    """matmul(softmax(scale * matmul(q, k^T) + mask), v), the form of attn_implementation="eager"."""
    softmax = _softmax_of(node)
    assert softmax is not None
    mask, scale = None, 1.0
    step: Any = softmax.args[0]
    while not is_call(step, aten.matmul.default):
        if is_call(step, aten.mul.Tensor, aten.div.Tensor) and isinstance(
            step.args[1], (int, float)
        ):
            factor = float(step.args[1])
            scale = scale * factor if step.target is aten.mul.Tensor else scale / factor
        elif is_call(step, aten.add.Tensor) and mask is None and isinstance(step.args[1], fx.Node):
            mask = step.args[1]
            if scale != 1.0:
                raise _Reject("the scores are scaled after the mask is added", step, 1)
        elif not is_call(step, aten._to_copy.default):
            raise _Reject(
                f"the score chain holds `{step.target}` (sinks, a cap or a bias?)", step, 1
            )
        step = step.args[0]
    key = step.args[1]
    if not is_call(key, aten.transpose.int):
        raise _Reject("the scores are not q times a transposed K", step, 1)
    return _Anchor(node, step.args[0], key.args[0], node.args[1], mask, scale)


def _match_site(anchor: _Anchor) -> AttentionMatch:
    node = anchor.node
    if anchor.mask is None:
        raise _Reject(
            "attention without a mask: a decode step over a cache needs the causal one", node, 1
        )
    v = trace_elements(anchor.v)
    kv_up, uv_rows = _rows_of_v(v, node)
    k = trace_elements(anchor.k)
    uk_rows, q_nope, rope, q_rope = _channels_of_k(k, kv_up, node)
    latent = _cached_latent(kv_up)
    new_latent, past_latent = _cache_parts(latent, "latent", kv_up)
    new_rope, past_rope = _cache_parts(rope, "rope part of K", node)
    o_proj = _output_projection(node)
    q_proj = _query_projection(anchor.q)
    _check_query_heads(anchor.q, q_proj)
    return AttentionMatch(
        anchor=node.name, q=anchor.q.name, q_proj=q_proj.name, kv_up=kv_up.name, o_proj=o_proj.name,
        latent=new_latent.name, k_rope=new_rope.name, mask=anchor.mask.name,
        past_latent=past_latent.name, past_rope=past_rope.name,
        q_weight=_param(q_proj, 1), q_bias=_bias(q_proj), kv_up_weight=_param(kv_up, 1),
        o_weight=_param(o_proj, 1), o_bias=_bias(o_proj), scale=anchor.scale,
        num_heads=len(uv_rows), kv_lora_rank=shape_of(latent)[-1],
        qk_rope_head_dim=len(q_rope), qk_nope_head_dim=len(q_nope), v_head_dim=len(uv_rows[0]),
        hidden_size=shape_of(o_proj)[-1], q_input_size=shape_of(q_proj.args[0])[-1], uk_rows=uk_rows, uv_rows=uv_rows,
        q_nope=q_nope, q_rope=q_rope,
    )  # fmt: skip


def _param(linear: fx.Node, place: int) -> str:
    weight = linear.args[place]
    if not is_param(weight):
        raise _Reject(
            f"the weight of `{linear.name}` is computed (`{weight}`), not a parameter", linear, 6
        )
    return weight.meta["input"][1]


def _bias(linear: fx.Node) -> str | None:
    return _param(linear, 2) if len(linear.args) > 2 and linear.args[2] is not None else None


def _check_grid(coordinates: tuple[Tensor, ...], what: str, node: fx.Node, depth: int) -> None:
    """Coordinates (b, ..., s, ...) must map batch to batch and sequence to sequence."""
    batch, sequence = coordinates
    B, _, S, _ = batch.shape
    if not bool((batch == torch.arange(B).view(B, 1, 1, 1)).all()):
        raise _Reject(f"{what}: an element comes from another sequence of the batch", node, depth)
    if not bool((sequence == torch.arange(S).view(1, 1, S, 1)).all()):
        raise _Reject(f"{what}: an element comes from another position", node, depth)


def _rows_of_v(v: Provenance, node: fx.Node) -> tuple[fx.Node, Table]:
    """The linear that makes V, and its rows [H][V]."""
    used = v.used()
    if v.undefined():
        raise _Reject("V holds elements that nothing wrote", node, 2)
    if len(used) != 1 or not is_call(used[0], aten.linear.default):
        names = ", ".join(f"`{s.name}`" for s in used)
        raise _Reject(
            f"V does not derive from one linear over the cache, but from {names}", node, 2
        )
    kv_up = used[0]
    coordinates = v.coordinates(kv_up)
    assert coordinates is not None
    _check_grid((coordinates[0], coordinates[-2]), "V", kv_up, 3)
    columns = coordinates[-1]
    if not bool((columns == columns[:1, :, :1]).all()):
        raise _Reject("V's channel map depends on batch or position", kv_up, 3)
    if len(kv_up.args) > 2 and kv_up.args[2] is not None:
        raise _Reject(
            "the linear that expands the latent has a bias; absorption can't hold it", kv_up, 3
        )
    return kv_up, tuple(map(tuple, columns[0, :, 0].tolist()))


def _channels_of_k(
    k: Provenance, kv_up: fx.Node, node: fx.Node
) -> tuple[Table, tuple[int, ...], fx.Node, tuple[int, ...]]:
    """(rows of kv_up [H][Dn], nope channels, rope source, rope channels in the order of the rope columns)."""
    if k.undefined():
        raise _Reject("K holds elements that nothing wrote", node, 4)
    others = [s for s in k.used() if s is not kv_up]
    if kv_up not in k.used():
        raise _Reject("no part of K derives from the linear that makes V", node, 4)
    if len(others) != 1:
        names = ", ".join(f"`{s.name}`" for s in others) or "nothing"
        raise _Reject(f"the rest of K must be one shared rope part, it is {names}", node, 4)
    rope, rows, nope, rope_of = others[0], [], [], {}
    for channel in range(k.ids.shape[3]):
        ids = k.ids[..., channel : channel + 1]
        from_linear, from_rope = k.coordinates(kv_up, ids), k.coordinates(rope, ids)
        if from_linear is not None:
            _check_grid((from_linear[0], from_linear[-2]), "K", kv_up, 4)
            row = from_linear[-1]
            if not bool((row == row[:1, :, :1]).all()):
                raise _Reject("K's channel map depends on batch or position", node, 4)
            nope.append(channel)
            rows.append(row[0, :, 0, 0].tolist())
        elif from_rope is not None:
            if rope.meta["val"].dim() != 4 or bool((from_rope[1] != 0).any()):
                raise _Reject("the rope part differs per head", rope, 4)
            _check_grid((from_rope[0], from_rope[2]), "rope part", rope, 4)
            if bool((from_rope[3] != from_rope[3].flatten()[0]).any()):
                raise _Reject("the rope part's channel map depends on head or position", rope, 4)
            rope_of[int(from_rope[3].flatten()[0])] = channel
        else:
            raise _Reject("K's split into nope and rope depends on head or position", node, 4)
    if not nope or sorted(rope_of) != list(range(shape_of(rope)[-1])):
        raise _Reject("K does not use each rope channel exactly once", rope, 4)
    table = tuple(map(tuple, torch.tensor(rows).T.tolist()))
    return table, tuple(nope), rope, tuple(rope_of[j] for j in sorted(rope_of))


def _cached_latent(kv_up: fx.Node) -> fx.Node:
    """The cached latent [B, 1, S + T, R] that kv_up reads, through reshapes only."""
    source = trace_elements(kv_up.args[0])
    used = source.used()
    if len(used) != 1 or not is_cache_update(used[0]):
        raise _Reject("the input of the linear that makes V is not what the layer caches", kv_up, 5)
    latent = used[0]
    straight = torch.arange(source.sources[latent], source.sources[latent] + source.ids.numel())
    if shape_of(latent)[1] != 1 or not torch.equal(source.ids.flatten(), straight):
        raise _Reject("the cached latent has heads or is permuted before it is expanded", kv_up, 5)
    return latent


def _cache_parts(update: fx.Node, what: str, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(new, past) of a cache update cat([past, new], dim=2)."""
    if not is_cache_update(update):
        raise _Reject(f"the {what} (`{update.name}`) is not cached", node, 5)
    past, new = update.args[0]
    return new, past


def _output_projection(anchor: fx.Node) -> fx.Node:
    """The first linear behind attention, reached by single users through layout ops; column h * V + v is (h, v)."""
    node = anchor
    while not is_call(node, aten.linear.default):
        if len(node.users) != 1:
            raise _Reject(
                f"{len(node.users)} users between attention and its output projection", node, 6
            )
        node = next(iter(node.users))
        if not (is_layout_op(node) or is_call(node, aten.linear.default)):
            raise _Reject(
                f"`{node.target}` stands between attention and its output projection", node, 6
            )
    source = trace_elements(node.args[0], stop=lambda n: n is anchor)
    coordinates = source.coordinates(anchor)
    if coordinates is None or source.ids.dim() != 3:
        raise _Reject("the output projection does not read all heads of attention", node, 6)
    B, T, width = source.ids.shape
    _, H, _, V = shape_of(anchor)
    batch, head, token, channel = coordinates
    straight = bool((batch == torch.arange(B).view(B, 1, 1)).all()) and bool(
        (token == torch.arange(T).view(1, T, 1)).all()
    )
    if not straight or width != H * V:
        raise _Reject("the output projection mixes sequences or positions", node, 6)
    if not torch.equal(head[0, 0] * V + channel[0, 0], torch.arange(width)):
        raise _Reject(
            "the output projection reads heads that are not whole blocks of columns", node, 6
        )
    return node


def _query_projection(q: fx.Node) -> fx.Node:
    """The one linear whose output becomes q."""
    found, seen, todo = [], {q}, [q]
    while todo:
        node = todo.pop()
        if is_call(node, aten.linear.default):
            found.append(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    if len(found) != 1:
        raise _Reject(f"q must come from one linear, it comes from {len(found)}", q, 6)
    return found[0]


def _check_query_heads(q: fx.Node, q_proj: fx.Node) -> None:
    """Rows [h * Dk, (h + 1) * Dk) of q's linear must give head h: run the piece on one head at a time."""
    generator = torch.Generator().manual_seed(0)

    def random(node: fx.Node) -> Tensor:
        shape = shape_of(node)
        return torch.randn(shape, generator=generator).to(node.meta["val"].dtype)

    full = random(q_proj)
    inputs: dict[fx.Node, Any] = {q_proj: full}
    q_BHTK = evaluate(q, inputs, random)
    fixed = {n: v for n, v in inputs.items() if n.op == "placeholder"}
    H = q_BHTK.shape[1]
    rows = full.shape[-1] // H
    for head in sorted({0, H // 2, H - 1}):
        part = full[..., head * rows : (head + 1) * rows].contiguous()
        try:
            one = evaluate(q, {**fixed, q_proj: part})
        except RuntimeError as error:
            raise _Reject(f"q can't be cut by heads: {error}", q, 6) from error
        if one.shape != q_BHTK[:, :1].shape or not torch.equal(one[:, 0], q_BHTK[:, head]):
            raise _Reject(f"rows {head * rows}.. of q's linear do not make head {head} alone", q, 6)
