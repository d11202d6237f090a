"""Attention in normal form, softmax(scale * q k^T + mask) v, found by its ops: fused (sdpa) or spelled out (eager)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from helix_compile.passes.fx_edit import aten, is_call
from helix_compile.passes.index_provenance import is_cache_update, shape_of
from helix_compile.passes.reject import Reject, unknown_in_scores

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Anchor:
    """One attention in normal form. `shared_heads`: k and v have fewer heads than q, and the op repeats each one.

    Forms are the orders of dims of q, k, v, of the node's own value, and of the scores that the mask is added to.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    shared_heads: bool = False
    q_form: str = "BHTC"
    k_form: str = "BHSC"
    v_form: str = "BHSC"
    form: str = "BHTV"
    mask_form: str = "BHTS"


def anchor_of(node: fx.Node) -> Anchor:
    """The attention that `node` (a fused op, or the product of softmax and v) ends; Reject where it is another thing."""
    return _fused_anchor(node) if is_call(node, SDPA) else _eager_anchor(node)


_BEHIND_SOFTMAX = (
    aten._to_copy.default, aten.clone.default, aten.expand.default, aten.view.default, aten.slice.Tensor,
)  # fmt: skip


def softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax whose result `node` multiplies, through casts, copies and cuts."""
    source: Any = node.args[0]
    while is_call(source, *_BEHIND_SOFTMAX):
        source = source.args[0]
    return source if is_call(source, aten.softmax.int, aten._softmax.default) else None


def _fused_anchor(node: fx.Node) -> Anchor:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise Reject("is_causal without a mask is not the causal mask of a decode step", node, 0)
    scale = node.kwargs.get("scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    return Anchor(node, q, k, v, mask, scale, bool(node.kwargs.get("enable_gqa")))


def _eager_anchor(node: fx.Node) -> Anchor:
    """matmul(softmax(scale * matmul(q, k^T) + mask), v), the form of attn_implementation="eager"."""
    softmax = softmax_of(node)
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
            raise Reject(unknown_in_scores(step), step, 1)
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
    return Anchor(node, step.args[0], key.args[0], node.args[1], mask, scale)


def cache_parts(update: fx.Node, what: str, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(new, past) of a cache update cat([past, new], dim=2)."""
    if not is_cache_update(update):
        raise Reject(f"the {what} (`{update.name}`) is not cached", node, 5)
    parts, dim = update.args[0], update.args[1] if len(update.args) > 1 else 0
    if len(parts) != 2 or dim not in (2, -2) or parts[0].meta.get("input", [""])[0] != "past":
        raise Reject(f"{what}: the cache is not extended as cat([past, new], dim=2)", update, 5)
    return parts[1], parts[0]
