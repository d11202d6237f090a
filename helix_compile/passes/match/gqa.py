"""Find grouped-query sites by dataflow: K and V are what the layer caches, their heads repeated for groups of query heads.

    k = rope(norm(linear_k(x))),  v = linear_v(x)  -> cache [B, K, S, D] -> each head G times -> attention

Norm and rope are optional; one linear may make both, the same rows for K and V. No class, module or parameter name is looked at; K = H (plain multi-head attention) is the
same thing with groups of one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from helix_compile.ir.elements import Provenance, is_cached, trace_elements
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.anchor import Anchor, cached_by, names
from helix_compile.passes.match.expansion import check_grid
from helix_compile.passes.match.head_cuts import cut_or_whole, heads_of
from helix_compile.passes.match.heads import bias_of, head_linear, heads_of_q, one_linear, output_projection, param_of
from helix_compile.passes.match.reject import Reject
from helix_compile.passes.match.sinks import scaled_by_sinks
from helix_compile.plan.matches import AttentionMatch, Grouped


def match_gqa_site(anchor: Anchor, v: Provenance) -> AttentionMatch:
    """The site, given where V's elements come from; Reject says why it is none."""
    node, mask = anchor.node, anchor.mask
    assert mask is not None
    q = anchor.pairs[0][0].node
    k = trace_elements(anchor.pairs[0][1].node)
    used = k.used()
    if k.undefined() or len(used) != 1 or not is_cached(used[0]):
        said = ", ".join(f"`{s.name}` ({s.target})" for s in used)
        raise Reject(f"V is what the layer caches, K is not: it comes from {said}", node, 3)
    H = shape_of(q)[1]
    k_update, v_update = used[0], v.used()[0]
    if k_update is v_update:
        raise Reject("K and V are one cached value", node, 3)
    kv_heads = shape_of(v_update)[1]
    if shape_of(k_update)[1] != kv_heads or H % kv_heads:
        raise Reject(
            f"{H} query heads, {shape_of(k_update)[1]} heads of K and {kv_heads} of V are cached: no groups", node, 3
        )
    for what, source, update in (("K", k, k_update), ("V", v, v_update)):
        _check_repeated(what, source, update, H, anchor.shared_heads, node)
    cached = cached_by(((k_update, "K"), (v_update, "V")), node)
    behind, scaling = scaled_by_sinks(node, anchor.scores, "BHTV")
    o_proj, gate = output_projection(behind, "BHTV", [q])
    values = (("q", q), *zip("KV", cached.new, strict=False))
    linears = [one_linear(value, what) for what, value in values]
    widths = shape_of(k_update)[3], shape_of(v_update)[3]
    one_for_both = (
        len(linears) == 3 and linears[1] is linears[2] and widths == (shape_of(linears[1])[-1] // kv_heads,) * 2
    )
    if len(set(linears)) < len(values) - one_for_both:
        raise Reject(
            "q, K and V come from fewer than three linears, whose rows can't be cut by one rule (nearest that works: three "
            "linears, or one whose rows are both K and V)",
            linears[0],
            6,
        )
    made = [heads_of_q(linears[0], [q], H, gate), *map(heads_of, linears[1:])]
    cuts = [
        cut_or_whole(value, heads, lambda x: x.transpose(1, 2), 1, shape_of(value)[3], what)
        for (what, value), heads in zip(values, made, strict=True)
    ]
    counts = (H, kv_heads, kv_heads)
    q_proj, *of_kv = (head_linear(m, h, c[0]) for m, h, c in zip(made, counts, cuts, strict=False))
    if one_for_both:  # V is K before its norm and rope: cut once, but both have views of their own
        of_kv = [replace(of_kv[0], views=tuple(dict.fromkeys(of_kv[0].views + of_kv[1].views)))]
    return AttentionMatch(
        kind=Grouped(kv_heads, *widths, tuple(of_kv)),
        anchor=node.name,
        q=q.name,
        q_proj=q_proj,
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
        uncut=tuple(u for _, uncut in cuts for u in uncut),
        sinks=anchor.sinks or scaling,
    )


def _check_repeated(what: str, source: Provenance, update: fx.Node, H: int, shared: bool, node: fx.Node) -> None:
    """Query head j must read all channels of KV head j // G of its own sequence, at every position in place."""
    kv_heads = shape_of(update)[1]
    ids = source.ids.repeat_interleave(H // source.ids.shape[1], dim=1) if shared else source.ids
    coordinates = source.coordinates(update, ids)
    if coordinates is None or ids.shape[1] != H:
        raise Reject(f"{what} of {ids.shape[1]} heads meets {H} query heads", node, 4)
    if ids.shape[2] != shape_of(update)[2]:
        raise Reject(
            f"{what}: attention sees {ids.shape[2]} positions of {shape_of(update)[2]} that are cached (a window?)",
            node,
            4,
        )
    batch, head, position, channel = coordinates
    check_grid(batch, position, what, node, 4)
    group = H // kv_heads
    read = head[:, :, :, 0].flatten(2)[0, :, 0]
    if not bool((head == read.view(1, H, 1, 1)).all()):
        raise Reject(f"{what}: the KV head depends on position or channel", node, 4)
    if not torch.equal(read, torch.arange(H) // group):
        tiled = torch.equal(read, torch.arange(H) % kv_heads)
        first = int((read != torch.arange(H) // group).nonzero()[0])
        raise Reject(
            f"{what}: query head {first} reads KV head {int(read[first])}, expected {first // group}"
            + (" (the heads are tiled as a whole; repeat each one, as repeat_interleave does)" if tiled else ""),
            node,
            4,
        )
    width = shape_of(update)[3]
    if ids.shape[3] != width or not bool((channel == torch.arange(width)).all()):
        raise Reject(f"{what}: channels are cut or permuted between cache and attention", node, 4)
