"""Find MLA sites by dataflow: anchor on attention, then ask where every element of K and V comes from.

    norm -> linear(kv_a) -> [latent | rope] -> cache -> linear(kv_up)(latent) -> [k_nope | v],  K = [k_nope, rope]

No class, module or parameter name is looked at: q_lora or not, interleaved or half rope never matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from helix_compile.matches import AttentionMatch, MatchFailure, UpWeight, permuted
from helix_compile.passes.contractions import PRODUCTS, up_weight
from helix_compile.passes.fx_edit import aten, calls, is_call, is_param
from helix_compile.passes.index_provenance import (
    Provenance,
    is_cache_update,
    shape_of,
    trace_elements,
)
from helix_compile.passes.match_absorbed import absorbed_site
from helix_compile.passes.match_einsum import Operand, SpelledAnchor, is_spelled, spelled_anchor
from helix_compile.passes.match_expansion import (
    Expansion,
    check_grid,
    expanded,
    expansion_of_k,
    weight_of_v,
)
from helix_compile.passes.match_heads import (
    Reject,
    check_head_rows,
    one_linear,
    output_projection,
)
from helix_compile.passes.narrow_weights import computed_weight


@dataclass(frozen=True)
class _Anchor:
    """One attention in normal form: softmax(scale * q k^T + mask) v."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    q_form: str = "BHTC"
    k_form: str = "BHSC"
    v_form: str = "BHSC"
    form: str = "BHTV"
    mask_form: str = "BHTS"


def find_mla(graph: fx.Graph) -> list[AttentionMatch | MatchFailure]:
    """One entry per attention site of a body, in graph order."""
    sites = calls(graph, aten.scaled_dot_product_attention.default)
    sites += [n for n in calls(graph, aten.matmul.default, aten.bmm.default) if _softmax_of(n)]
    spelled = [n for n in calls(graph, *PRODUCTS) if is_spelled(n)]
    sites = list(dict.fromkeys(sites + spelled))
    order = {n: i for i, n in enumerate(graph.nodes)}
    results: list[AttentionMatch | MatchFailure] = []
    for node in sorted(sites, key=order.__getitem__):
        try:
            if node in spelled:
                results.append(_match_spelled(spelled_anchor(node)))
            else:
                fused = node.target is _SDPA
                results.append(_match_site(_fused_anchor(node) if fused else _eager_anchor(node)))
        except Reject as rejection:
            results.append(rejection.failure)
    return results


_SDPA = aten.scaled_dot_product_attention.default


_BEHIND_SOFTMAX = (
    aten._to_copy.default, aten.clone.default, aten.expand.default, aten.view.default, aten.slice.Tensor,
)  # fmt: skip


def _softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax whose result `node` multiplies, through casts, copies and cuts."""
    source: Any = node.args[0]
    while is_call(source, *_BEHIND_SOFTMAX):
        source = source.args[0]
    return source if is_call(source, aten.softmax.int, aten._softmax.default) else None


def _fused_anchor(node: fx.Node) -> _Anchor:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if node.kwargs.get("enable_gqa"):
        raise Reject("grouped-query attention: K and V have fewer heads than q", node, 0)
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise Reject("is_causal without a mask is not the causal mask of a decode step", node, 0)
    scale = node.kwargs.get("scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    return _Anchor(node, q, k, v, mask, scale)


def _eager_anchor(node: fx.Node) -> _Anchor:
    """matmul(softmax(scale * matmul(q, k^T) + mask), v), the form of attn_implementation="eager"."""
    softmax = _softmax_of(node)
    assert softmax is not None
    mask, scale = None, 1.0
    if softmax.args[1] not in (-1, len(shape_of(softmax)) - 1):
        raise Reject(f"the softmax runs over dim {softmax.args[1]}, not over the keys", softmax, 1)
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
                raise Reject("the scores are scaled after the mask is added", step, 1)
        elif not is_call(step, aten._to_copy.default):
            raise Reject(
                f"the score chain holds `{step.target}` (sinks, a cap or a bias?)", step, 1
            )
        step = step.args[0]
    source: Any = node.args[0]
    while source is not softmax:
        cuts = is_call(source, aten.slice.Tensor) and shape_of(source) != shape_of(source.args[0])
        if cuts:
            raise Reject("part of the softmax is cut off before it meets V (sinks?)", source, 1)
        source = source.args[0]
    key = step.args[1]
    if not is_call(key, aten.transpose.int):
        raise Reject("the scores are not q times a transposed K", step, 1)
    return _Anchor(node, step.args[0], key.args[0], node.args[1], mask, scale)


def _match_spelled(anchor: SpelledAnchor) -> AttentionMatch:
    """A site of products in any order of dims: scores of one product over expanded K, or absorbed already."""
    out_form = anchor.out_form.replace("C", "V")
    if len(anchor.pairs) == 1:
        ((q, k),) = anchor.pairs
        return _match_site(
            _Anchor(
                anchor.node, q.node, k.node, anchor.v.node, anchor.mask, anchor.scale,
                q.form, k.form, anchor.v.form, out_form, anchor.form,
            )
        )  # fmt: skip
    _refuse_no_mask(anchor.mask, anchor.node)
    site = absorbed_site(anchor)
    nope, rope = (shape_of(o.node)[o.form.index("C")] for o in (site.q, site.q_rope))
    return _site(
        _Anchor(
            site.v_up, site.q.node, site.k_up, site.v_up, anchor.mask, anchor.scale, site.q.form,
            form=site.form, mask_form=anchor.form,
        ),
        site.q_rope, site.latent, site.rope, (site.k_up, site.w_uk), (site.v_up, site.w_uv),
        tuple(range(nope)), tuple(range(rope)),
    )  # fmt: skip


def _refuse_no_mask(mask: fx.Node | None, node: fx.Node) -> None:
    if mask is None:
        raise Reject(
            "attention without a mask: a decode step over a cache needs the causal one", node, 1
        )


def _match_site(anchor: _Anchor) -> AttentionMatch:
    """A site of K and V that are expanded from a latent."""
    node = anchor.node
    _refuse_no_mask(anchor.mask, node)
    v_up, w_uv = weight_of_v(_in_order(anchor.v, anchor.v_form, "V"), node)
    k = _in_order(anchor.k, anchor.k_form, "K")
    k_up = expansion_of_k(k, v_up, node)
    w_uk, q_nope, rope, q_rope = _channels_of_k(k, k_up, node)
    return _site(
        anchor, None, v_up.latent, rope, (k_up.node, w_uk), (v_up.node, w_uv), q_nope, q_rope
    )


def _in_order(value: fx.Node, form: str, what: str) -> Provenance:
    """Where the elements of K or V [form] come from, as [B, H, S, C]."""
    if sorted(form) != sorted("BHSC"):
        raise Reject(f"{what} has no heads: [{', '.join(form)}]", value, 2)
    source = trace_elements(value)
    return Provenance(permuted(source.ids, form, "BHSC"), source.sources)


def _site(
    anchor: _Anchor,
    rope_of_q: Operand | None,
    latent: fx.Node,
    rope: fx.Node,
    uk: tuple[fx.Node, UpWeight],
    uv: tuple[fx.Node, UpWeight],
    q_nope: tuple[int, ...],
    q_rope: tuple[int, ...],
) -> AttentionMatch:
    """The match, given where W_UK, W_UV and the cached parts are: what is left are q, the mask and the way to o_proj."""
    node, mask = anchor.node, anchor.mask
    assert mask is not None
    new_latent, past_latent = _cache_parts(latent, "latent", uv[0])
    new_rope, past_rope = _cache_parts(rope, "rope part of K", node)
    o_proj, gate = output_projection(node, anchor.form)
    q_proj = one_linear(anchor.q, "q")
    views = check_head_rows(anchor.q, q_proj, lambda q: permuted(q, anchor.q_form, "BTHC"), "q")
    if rope_of_q is not None:
        value, form = rope_of_q.node, rope_of_q.form
        if one_linear(value, "the rope part of q") is not q_proj:
            raise Reject("the rope part of q comes from another linear than the rest", value, 6)
        more = check_head_rows(value, q_proj, lambda q: permuted(q, form, "BTHC"), "q")
        views = tuple(dict.fromkeys(views + more))
    return AttentionMatch(
        anchor=node.name, q=anchor.q.name, q_proj=q_proj.name, v_up=uv[0].name, k_up=uk[0].name, o_proj=o_proj.name,
        latent=new_latent.name, k_rope=new_rope.name, mask=mask.name,
        past_latent=past_latent.name, past_rope=past_rope.name,
        q_weight=_param(q_proj, 1), q_bias=_bias(q_proj), w_uk=uk[1], w_uv=uv[1],
        o_weight=_param(o_proj, 1), o_bias=_bias(o_proj), scale=anchor.scale,
        num_heads=len(uv[1].at), kv_lora_rank=shape_of(latent)[-1],
        qk_rope_head_dim=len(q_rope), qk_nope_head_dim=len(q_nope), v_head_dim=len(uv[1].at[0]),
        hidden_size=shape_of(o_proj)[-1], q_input_size=shape_of(q_proj.args[0])[-1],
        q_nope=q_nope, q_rope=q_rope, head_views=views, gate=gate,
        q_rope_value=rope_of_q.node.name if rope_of_q else "", form=anchor.form, q_form=anchor.q_form,
        q_rope_form=rope_of_q.form if rope_of_q else anchor.q_form, mask_form=anchor.mask_form,
    )  # fmt: skip


def _param(linear: fx.Node, place: int) -> str:
    weight = linear.args[place]
    if not is_param(weight):
        raise Reject(computed_weight(linear, weight), linear, 6)
    return weight.meta["input"][1]


def _bias(linear: fx.Node) -> str | None:
    return _param(linear, 2) if len(linear.args) > 2 and linear.args[2] is not None else None


def _channels_of_k(
    k: Provenance, k_up: Expansion, node: fx.Node
) -> tuple[UpWeight, tuple[int, ...], fx.Node, tuple[int, ...]]:
    """(W_UK, nope channels, rope source, rope channels in the order of the rope columns)."""
    if k.undefined():
        raise Reject("K holds elements that nothing wrote", node, 4)
    others = [s for s in k.used() if s is not k_up.node]
    if len(others) != 1:
        names = ", ".join(f"`{s.name}`" for s in others) or "nothing"
        raise Reject(f"the rest of K must be one shared rope part, it is {names}", node, 4)
    rope, columns, nope, rope_of, step = others[0], [], [], {}, 1
    for channel in range(k.ids.shape[3]):
        ids = k.ids[..., channel : channel + 1]
        from_rope = k.coordinates(rope, ids)
        if k.coordinates(k_up.node, ids) is not None:
            first, step = expanded(k, k_up, ids, "K", 4)
            nope.append(channel)
            columns.append(first)
        elif from_rope is not None:
            if rope.meta["val"].dim() != 4 or bool((from_rope[1] != 0).any()):
                raise Reject("the rope part differs per head", rope, 4)
            check_grid(from_rope[0], from_rope[2], "rope part", rope, 4)
            if bool((from_rope[3] != from_rope[3].flatten()[0]).any()):
                raise Reject("the rope part's channel map depends on head or position", rope, 4)
            rope_of[int(from_rope[3].flatten()[0])] = channel
        else:
            raise Reject("K's split into nope and rope depends on head or position", node, 4)
    if not nope or sorted(rope_of) != list(range(shape_of(rope)[-1])):
        raise Reject("K does not use each rope channel exactly once", rope, 4)
    w_uk = up_weight(k_up.view, torch.cat(columns, dim=1), step, k_up.width, "W_UK", k_up.node)
    return w_uk, tuple(nope), rope, tuple(rope_of[j] for j in sorted(rope_of))


def _cache_parts(update: fx.Node, what: str, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(new, past) of a cache update cat([past, new], dim=2)."""
    if not is_cache_update(update):
        raise Reject(f"the {what} (`{update.name}`) is not cached", node, 5)
    past, new = update.args[0]
    return new, past
