"""Find MLA sites by dataflow: anchor on attention, then ask where every element of K and V comes from.

    norm -> linear(kv_a) -> [latent | rope] -> cache -> linear(kv_up)(latent) -> [k_nope | v],  K = [k_nope, rope]

No class, module or parameter name is looked at: q_lora or not, interleaved or half rope never matter.
"""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.matches import AttentionMatch, Table
from helix_compile.passes.attention_anchor import Anchor, cache_parts, check_grid
from helix_compile.passes.fx_edit import aten, is_call
from helix_compile.passes.index_provenance import (
    Provenance,
    is_cache_update,
    shape_of,
    trace_elements,
)
from helix_compile.passes.match_heads import (
    Reject,
    bias_of,
    check_head_rows,
    one_linear,
    output_projection,
    param_of,
)


def match_mla_site(anchor: Anchor, v: Provenance) -> AttentionMatch:
    """The site, given where V's elements come from; Reject says why it is none."""
    node, mask = anchor.node, anchor.mask
    assert mask is not None
    kv_up, uv_rows = _rows_of_v(v, node)
    k = trace_elements(anchor.k)
    uk_rows, q_nope, rope, q_rope = _channels_of_k(k, kv_up, node)
    latent = _cached_latent(kv_up)
    new_latent, past_latent = cache_parts(latent, "latent", kv_up)
    new_rope, past_rope = cache_parts(rope, "rope part of K", node)
    o_proj, gate = output_projection(node)
    q_proj = one_linear(anchor.q, "q")
    head_views = check_head_rows(anchor.q, q_proj, lambda q: q.transpose(1, 2), "q")
    return AttentionMatch(
        anchor=node.name, q=anchor.q.name, q_proj=q_proj.name, kv_up=kv_up.name, o_proj=o_proj.name,
        latent=new_latent.name, k_rope=new_rope.name, mask=mask.name,
        past_latent=past_latent.name, past_rope=past_rope.name,
        q_weight=param_of(q_proj, 1), q_bias=bias_of(q_proj), kv_up_weight=param_of(kv_up, 1),
        o_weight=param_of(o_proj, 1), o_bias=bias_of(o_proj), scale=anchor.scale,
        num_heads=len(uv_rows), kv_lora_rank=shape_of(latent)[-1],
        qk_rope_head_dim=len(q_rope), qk_nope_head_dim=len(q_nope), v_head_dim=len(uv_rows[0]),
        hidden_size=shape_of(o_proj)[-1], q_input_size=shape_of(q_proj.args[0])[-1], uk_rows=uk_rows, uv_rows=uv_rows,
        q_nope=q_nope, q_rope=q_rope, head_views=head_views, gate=gate,
    )  # fmt: skip


def _rows_of_v(v: Provenance, node: fx.Node) -> tuple[fx.Node, Table]:
    """The linear that makes V, and its rows [H][V]."""
    used = v.used()
    if v.undefined():
        raise Reject("V holds elements that nothing wrote", node, 2)
    if len(used) != 1 or not is_call(used[0], aten.linear.default):
        names = ", ".join(f"`{s.name}`" for s in used)
        raise Reject(f"V does not derive from one linear over the cache, but from {names}", node, 2)
    kv_up = used[0]
    coordinates = v.coordinates(kv_up)
    assert coordinates is not None
    check_grid((coordinates[0], coordinates[-2]), "V", kv_up, 3)
    columns = coordinates[-1]
    if not bool((columns == columns[:1, :, :1]).all()):
        raise Reject("V's channel map depends on batch or position", kv_up, 3)
    if len(kv_up.args) > 2 and kv_up.args[2] is not None:
        raise Reject(
            "the linear that expands the latent has a bias; absorption can't hold it", kv_up, 3
        )
    return kv_up, tuple(map(tuple, columns[0, :, 0].tolist()))


def _channels_of_k(
    k: Provenance, kv_up: fx.Node, node: fx.Node
) -> tuple[Table, tuple[int, ...], fx.Node, tuple[int, ...]]:
    """(rows of kv_up [H][Dn], nope channels, rope source, rope channels in the order of the rope columns)."""
    if k.undefined():
        raise Reject("K holds elements that nothing wrote", node, 4)
    others = [s for s in k.used() if s is not kv_up]
    if kv_up not in k.used():
        raise Reject("no part of K derives from the linear that makes V", node, 4)
    if len(others) != 1:
        names = ", ".join(f"`{s.name}`" for s in others) or "nothing"
        raise Reject(f"the rest of K must be one shared rope part, it is {names}", node, 4)
    rope, rows, nope, rope_of = others[0], [], [], {}
    for channel in range(k.ids.shape[3]):
        ids = k.ids[..., channel : channel + 1]
        from_linear, from_rope = k.coordinates(kv_up, ids), k.coordinates(rope, ids)
        if from_linear is not None:
            check_grid((from_linear[0], from_linear[-2]), "K", kv_up, 4)
            row = from_linear[-1]
            if not bool((row == row[:1, :, :1]).all()):
                raise Reject("K's channel map depends on batch or position", node, 4)
            nope.append(channel)
            rows.append(row[0, :, 0, 0].tolist())
        elif from_rope is not None:
            if rope.meta["val"].dim() != 4 or bool((from_rope[1] != 0).any()):
                raise Reject("the rope part differs per head", rope, 4)
            check_grid((from_rope[0], from_rope[2]), "rope part", rope, 4)
            if bool((from_rope[3] != from_rope[3].flatten()[0]).any()):
                raise Reject("the rope part's channel map depends on head or position", rope, 4)
            rope_of[int(from_rope[3].flatten()[0])] = channel
        else:
            raise Reject("K's split into nope and rope depends on head or position", node, 4)
    if not nope or sorted(rope_of) != list(range(shape_of(rope)[-1])):
        raise Reject("K does not use each rope channel exactly once", rope, 4)
    table = tuple(map(tuple, torch.tensor(rows).T.tolist()))
    return table, tuple(nope), rope, tuple(rope_of[j] for j in sorted(rope_of))


def _cached_latent(kv_up: fx.Node) -> fx.Node:
    """The cached latent [B, 1, S + T, R] that kv_up reads, through reshapes only."""
    source = trace_elements(kv_up.args[0])
    used = source.used()
    if len(used) != 1 or not is_cache_update(used[0]):
        raise Reject("the input of the linear that makes V is not what the layer caches", kv_up, 5)
    latent = used[0]
    straight = torch.arange(source.sources[latent], source.sources[latent] + source.ids.numel())
    if shape_of(latent)[1] != 1 or not torch.equal(source.ids.flatten(), straight):
        raise Reject("the cached latent has heads or is permuted before it is expanded", kv_up, 5)
    return latent
