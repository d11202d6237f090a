"""Find MLA sites by dataflow: anchor on attention, then ask where every element of K and V comes from.

    norm -> linear(kv_a) -> [latent | rope] -> cache -> linear(kv_up)(latent) -> [k_nope | v],  K = [k_nope, rope]

No class, module or parameter name is looked at: q_lora or not, interleaved or half rope never matter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.elements import Provenance, is_cached, trace_elements
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.absorbed import absorbed_site
from helix_compile.passes.match.anchor import Anchor, Operand, cached_by, names
from helix_compile.passes.match.contractions import up_weight
from helix_compile.passes.match.expansion import Expansion, check_grid, expanded, expansion_of_k, weight_of_v
from helix_compile.passes.match.head_cuts import cut_or_whole
from helix_compile.passes.match.heads import bias_of, head_linear, heads_of_q, one_linear, output_projection, param_of
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import AttentionMatch, Latent, UpWeight, permuted


def match_absorbed_site(anchor: Anchor) -> AttentionMatch:
    """A site whose scores are over the cached latent and the cached rope part: W_UK and W_UV are applied already."""
    site = absorbed_site(anchor)
    nope, rope = (range(shape_of(o.node)[o.form.index("C")]) for o in (site.q, site.q_rope))
    whole = replace(anchor, node=site.v_up, form=site.form)
    return _site(whole, site.q, site.q_rope, site.latent, site.rope, site.w_uk, site.w_uv, tuple(nope), tuple(rope))


def match_split_site(anchor: Anchor, v: Provenance) -> AttentionMatch:
    """A site of expanded K and V whose scores are one product over the nope part and one over the rope part of K."""
    node = anchor.node
    if len(anchor.pairs) != 2:
        raise Reject(f"the scores are a sum of {len(anchor.pairs)} products", node, 1)
    v_up, w_uv = weight_of_v(v, node)
    (first, first_k), (second, second_k) = anchor.pairs
    k = _side_by_side(first_k, second_k, v.ids.shape[1], node)
    k_up = expansion_of_k(k, v_up, node)
    w_uk, q_nope, rope, q_rope = _channels_of_k(k, k_up, first_k.node, node)
    width = shape_of(first_k.node)[first_k.form.index("C")]
    parts = [{channel < width for channel in channels} for channels in (q_nope, q_rope)]
    if parts not in ([{True}, {False}], [{False}, {True}]):
        raise Reject("one product of the scores reads both the nope and the rope part of K", node, 4)
    of_nope, of_rope = (first, second) if parts[0] == {True} else (second, first)
    q_nope, q_rope = (
        tuple(c if is_first == {True} else c - width for c in channels)
        for channels, is_first in zip((q_nope, q_rope), parts, strict=True)
    )
    return _site(anchor, of_nope, of_rope, v_up.latent, rope, w_uk, w_uv, q_nope, q_rope)


def _side_by_side(first: Operand, second: Operand, heads: int, node: fx.Node) -> Provenance:
    """Where the elements of two parts of K come from, as of one K [B, heads, S, C] that is both."""
    parts = [_with_heads(k, node) for k in (first, second)]
    both = set(parts[0].used()) & set(parts[1].used())
    if both:
        said = ", ".join(f"`{n.name}`" for n in both)
        raise Reject(f"both products of the scores read K from {said}", node, 4)
    behind = int(parts[0].ids.max())
    moved = torch.where(parts[1].ids > 0, parts[1].ids + behind, 0)
    if {x.ids.shape[1] for x in parts} - {1, heads}:
        raise Reject(f"K has other heads than V's {heads}", node, 4)
    ids = [x.expand(-1, heads, -1, -1) for x in (parts[0].ids, moved)]
    sources = {n: base for n, base in parts[0].sources.items() if n in parts[0].used()}
    sources |= {n: base + behind for n, base in parts[1].sources.items() if n in parts[1].used()}
    return Provenance(torch.cat(ids, dim=3), sources)


def _with_heads(k: Operand, node: fx.Node) -> Provenance:
    """A part of K as [B, H, S, C], H = 1 where all heads share it."""
    source, form = trace_elements(k.node), k.form.replace("1", "H")
    ids = source.ids
    if "H" not in form:
        form, ids = f"H{form}", ids[None]
    if sorted(form) != sorted("BHSC"):
        raise Reject(f"a part of K is [{', '.join(k.form)}]", node, 4)
    return Provenance(permuted(ids, form, "BHSC"), source.sources)


def match_mla_site(anchor: Anchor, v: Provenance) -> AttentionMatch:
    """A site of K and V that are expanded from a latent, given where V's elements come from; Reject says why it is none."""
    ((q, key),) = anchor.pairs
    v_up, w_uv = weight_of_v(v, anchor.node)
    k = in_order(key, "K")
    k_up = expansion_of_k(k, v_up, anchor.node)
    w_uk, q_nope, rope, q_rope = _channels_of_k(k, k_up, key.node, anchor.node)
    return _site(anchor, q, None, v_up.latent, rope, w_uk, w_uv, q_nope, q_rope)


def in_order(value: Operand, what: str) -> Provenance:
    """Where the elements of K or V come from, as [B, H, S, C]."""
    if sorted(value.form) != sorted("BHSC"):
        raise Reject(f"{what} has no heads: [{', '.join(value.form)}]", value.node, 2)
    source = trace_elements(value.node)
    return Provenance(permuted(source.ids, value.form, "BHSC"), source.sources)


def _site(
    anchor: Anchor,
    q: Operand,
    rope_of_q: Operand | None,
    latent: fx.Node,
    rope: fx.Node,
    w_uk: UpWeight,
    w_uv: UpWeight,
    q_nope: tuple[int, ...],
    q_rope: tuple[int, ...],
) -> AttentionMatch:
    """The match, given where W_UK, W_UV and the cached parts are: what is left are q, the mask and the way to o_proj."""
    node, mask = anchor.node, anchor.mask
    assert mask is not None
    cached = cached_by(((latent, "latent"), (rope, "rope part of K")), node)
    queries = [o.node for o in (q, rope_of_q) if o is not None]
    o_proj, gate = output_projection(node, anchor.form, queries)
    q_proj = one_linear(q.node, "q")
    made = heads_of_q(q_proj, queries, len(w_uv.at), gate)
    width, form = len(q_nope) + len(q_rope), q.form
    for order in (form, rope_of_q.form if rope_of_q else form):
        if order[-1] != "C":
            raise Reject(f"q is [{', '.join(order)}], expected its channels last", q.node, 6)
    views, uncut = cut_or_whole(q.node, made, lambda x: permuted(x, q.form, "BTHC"), form.index("H"), width, "q")
    if rope_of_q is not None:
        value, form = rope_of_q.node, rope_of_q.form
        if one_linear(value, "the rope part of q") is not q_proj:
            raise Reject("the rope part of q comes from another linear than the rest", value, 6)
        more, why = cut_or_whole(value, made, lambda x: permuted(x, form, "BTHC"), form.index("H"), width, "q")
        views, uncut = tuple(dict.fromkeys(views + more)), uncut + why
    return AttentionMatch(
        kind=Latent(
            kv_lora_rank=shape_of(latent)[-1],
            w_uk=w_uk,
            w_uv=w_uv,
            q_nope=q_nope,
            q_rope=q_rope,
            q_rope_value=rope_of_q.node.name if rope_of_q else "",
            q_rope_form=rope_of_q.form if rope_of_q else q.form,
        ),
        anchor=node.name,
        q=q.node.name,
        q_proj=head_linear(made, len(w_uv.at), views),
        o_proj=o_proj.name,
        new=names(cached.new),
        past=names(cached.past),
        shared=names(cached.shared),
        mask=mask.name,
        o_weight=param_of(o_proj, 1),
        o_bias=bias_of(o_proj),
        scale=anchor.scale,
        hidden_size=shape_of(o_proj)[-1],
        gate=gate,
        uncut=uncut,
        form=anchor.form,
        q_form=q.form,
        mask_form=anchor.mask_form,
        sinks=anchor.sinks,
    )


def _empty_rope(key: fx.Node) -> list[fx.Node]:
    """What a layer without rope caches beside its latent: a part without channels."""
    before = ancestors([key], until=[])
    return [n for n in before if is_cached(n) and n.meta["val"].dim() == 4 and shape_of(n)[-1] == 0]


def _channels_of_k(
    k: Provenance, k_up: Expansion, key: fx.Node, node: fx.Node
) -> tuple[UpWeight, tuple[int, ...], fx.Node, tuple[int, ...]]:
    """(W_UK, nope channels, rope source, rope channels in the order of the rope columns)."""
    others = [s for s in k.used() if s is not k_up.node] or _empty_rope(key)
    if len(others) != 1:
        said = ", ".join(f"`{s.name}`" for s in others) or "nothing"
        raise Reject(f"the rest of K must be one shared rope part, it is {said}", node, 4)
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
