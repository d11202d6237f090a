"""Pieces of a lowered graph that one kernel computes. Each is found by a finder and replaced here, or left with a reason.

latent -> RMSNorm, k -> RoPE, cache_append      helix_triton::cache_append.norm_rope
q -> RoPE -> [B, T, H, r]                       helix_triton::rope_heads
logits -> sigmoid, bias, groups, top-k          helix_triton::moe_router
mla_decode -> pack_heads                        mla_decode.splits -> pack_heads.splits: the merge of a rank's splits
                                                writes the exchange buffer
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from helix_compile.ir.graph import aten, calls, erase_unused, getitems, helix_op, is_call, named, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.ir.sizes import shape_of
from helix_compile.kernels.mla.tuning import split_count
from helix_compile.kernels.registry import Capacity, kernel_of
from helix_compile.kernels.target import KernelTarget
from helix_compile.passes.lower.find_fusions import find_norm, find_rope, find_router
from helix_compile.passes.lower.select_kernels import (
    KERNEL,
    PROVIDER,
    capacity_of,
    choose,
    is_kernel,
    select_kernels,
    site_of,
)
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import LayerMatch


def kernels_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Give a body whose moves are lowered the kernels of the target."""
    import helix_compile.kernels.catalog  # noqa: F401  needs Triton, and is slow the first time

    assert context.target is not None
    capacity = capacity_of(context.plan)
    select_kernels(gm.graph, context.target, capacity)
    # after selection: what is fused are kernels of the same provider
    fuse_kernels(gm.graph, context.target, capacity)
    erase_unused(gm.graph, keep=placeholders(gm.graph))
    return 1


def fuse_kernels(graph: fx.Graph, target: KernelTarget, capacity: Capacity) -> None:
    """Fuse what can be; `graph` has its kernels selected. Reasons go to meta["kernel"] of the op that stays."""
    forward_slices(graph)
    for node in [n for n in graph.nodes if is_kernel(n, "cache_append")]:
        _fuse_norm_rope(graph, node, target, capacity)
    widths = {shape_of(n.args[1])[-1] for n in graph.nodes if is_kernel(n, "mla_decode")}
    for node in calls(graph, aten.transpose.int):
        if shape_of(node)[-1] in widths and sorted(node.args[1:]) == [1, 2]:
            _fuse_rope_heads(graph, node, target, capacity)
    for node in [n for n in graph.nodes if helix_op(n) == "moe_experts"]:
        _fuse_router(graph, node, target, capacity)
    propagate_shapes(graph)
    for node in [n for n in graph.nodes if is_kernel(n, "pack_heads")]:
        _fuse_split_merge(graph, node, target, capacity)
    propagate_shapes(graph)


def forward_slices(graph: fx.Graph) -> None:
    """slice(cat([a, b], d), d, range of a) is a: a rope then is not held back by the channels beside it."""
    for node in calls(graph, aten.slice.Tensor):
        whole, dim, start, end = (*node.args, None, None)[:4]
        if len(node.args) != 4 or not is_call(whole, aten.cat.default):
            continue
        parts, cut = whole.args[0], (whole.args[1] if len(whole.args) > 1 else 0)
        if cut % len(shape_of(whole)) != dim:
            continue
        first = 0
        for part in parts:
            width = shape_of(part)[dim]
            if (start, end) == (first, first + width):
                node.replace_all_uses_with(part)
                break
            first += width


def _retarget(node: fx.Node, op: str, args: tuple[Any, ...], target: KernelTarget, capacity: Capacity) -> str | None:
    """Make `node` a call of the fused kernel `op`; where the target can't run it, leave it and say why."""
    kernel = kernel_of(op)
    if kernel is None:
        return f"no Triton kernel for {op}"
    before = node.target, node.args
    node.target, node.args = kernel.target, args
    propagate_shapes(node.graph)
    reason = kernel.supports(site_of(node, capacity), target)
    if reason is not None:
        node.target, node.args = before
        return reason
    node.meta[KERNEL] = [PROVIDER, f"Triton kernel for {target.arch}"]
    return None


def _note(node: fx.Node, what: str, reason: str) -> None:
    provider, said = node.meta[KERNEL]
    node.meta[KERNEL] = [provider, f"{said}; {what} not fused: {reason}"]


def _fuse_norm_rope(graph: fx.Graph, node: fx.Node, target: KernelTarget, capacity: Capacity) -> None:
    cache, table, slots, visible, latent, k_rope = node.args
    norm, rope = find_norm(graph, latent), find_rope(graph, k_rope)
    if isinstance(norm, str) or isinstance(rope, str):
        _note(node, "norm and RoPE", norm if isinstance(norm, str) else str(rope))
        return
    with made_from(graph, node), graph.inserting_before(node):
        sources = [_tokens(graph, x) for x in (norm.source, rope.source)]
    fused = (cache, table, slots, visible, *sources, norm.weight, norm.eps, rope.cos, rope.sin, rope.interleaved)
    reason = _retarget(node, "cache_append.norm_rope", fused, target, capacity)
    if reason:
        _note(node, "norm and RoPE", reason)


def _tokens(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """[B, 1, T, R] as [B, T, R]."""
    return graph.call_function(aten.squeeze.dim, (source, 1)) if len(shape_of(source)) == 4 else source


def _fuse_rope_heads(graph: fx.Graph, node: fx.Node, target: KernelTarget, capacity: Capacity) -> None:
    rope = find_rope(graph, node.args[0])
    if isinstance(rope, str) or len(shape_of(rope.source)) != 4:
        return
    _retarget(node, "rope_heads", tuple(rope), target, capacity)


def _fuse_router(graph: fx.Graph, node: fx.Node, target: KernelTarget, capacity: Capacity) -> None:
    ids, weights = node.args[1:3]
    router = find_router(graph, ids, weights)
    if isinstance(router, str):
        _note(node, "router", router)
        return
    first = min((ids, weights), key=list(graph.nodes).index)
    with made_from(graph, ids, weights), graph.inserting_before(first):
        routed = named(graph, "router", helix.moe_router.default, *router)
        parts = getitems(graph, routed, "expert_ids", "expert_weights")
    propagate_shapes(graph)
    if not choose(routed, target, capacity):
        _note(node, "router", routed.meta[KERNEL][1])
        for part in (*parts, routed):
            graph.erase_node(part)
        return
    for old, part in zip((ids, weights), parts, strict=True):
        old.replace_all_uses_with(part)


def _fuse_split_merge(graph: fx.Graph, pack: fx.Node, target: KernelTarget, capacity: Capacity) -> None:
    """Only where the exchange ships what attention leaves; a W_UV before it needs the merged heads."""
    partial_o, lse, peers = pack.args
    attention = partial_o.args[0] if is_call(partial_o, operator.getitem) else None
    if not is_kernel(attention, "mla_decode") or lse.args[0] is not attention:
        return
    q_latent = attention.args[0]
    heads = shape_of(q_latent)[2]
    splits = split_count(capacity.max_batch_size, 1, heads, capacity.max_slots, target)
    dtype = q_latent.meta["val"].dtype
    # all at once: between these edits shapes do not fit
    _become(attention, "mla_decode.splits", (*attention.args, splits), target)
    _become(pack, "pack_heads.splits", (partial_o, lse, peers, dtype), target)
    for unpack in calls(graph, helix.unpack_heads.default):
        # these two only give shape and dtype, and the queries have those of the partial output
        if unpack.args[1:] == (partial_o, lse):
            unpack.args = (unpack.args[0], q_latent, lse)


def _become(node: fx.Node, op: str, args: tuple[Any, ...], target: KernelTarget) -> None:
    """A fused form that takes whatever the op's own kernel takes."""
    kernel = kernel_of(op)
    assert kernel is not None, op
    node.target, node.args = kernel.target, args
    node.meta[KERNEL] = [PROVIDER, f"Triton kernel for {target.arch}"]
