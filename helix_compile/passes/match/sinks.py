"""Sinks: a logit a head that takes part in the softmax and has no value, in both ways that models write it.

    softmax(cat([scores, sinks], -1))[..., :-1] @ v                        cat_sinks, found in anchor.py
    (softmax(scores) @ v) * sigmoid(logsumexp(scores) - sinks)             scaled_by_sinks, behind attention

Both are o * sigmoid(lse - sinks), which is how ranks apply them once the parts are merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.elements import is_layout_op, trace_elements
from helix_compile.ir.graph import aten, input_ref, is_call, is_param
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import HeadRows

_CASTS = (aten._to_copy.default, aten.type_as.default)


def cat_sinks(value: fx.Node, form: str) -> HeadRows:
    """The parameter of what stands beside scores [form], one column for the keys' dim.

    Raises:
        Reject: it is not one number of a parameter [H] a head, unscaled.
    """
    shape = shape_of(value)
    if len(shape) != 4 or shape[form.index("S")] != 1:
        raise Reject(
            f"{shape[form.index('S')] if len(shape) == 4 else shape} columns stand beside the scores", value, 1
        )
    return _of_heads(value, form.index("H"))


def scaled_by_sinks(attention: fx.Node, scores: fx.Node | None, form: str) -> tuple[fx.Node, HeadRows | None]:
    """(what o_proj reads on the way from, the sinks): behind o * sigmoid(logsumexp(scores) - sinks) where that is computed."""
    users = list(attention.users)
    if scores is None or len(users) != 1 or not is_call(users[0], aten.mul.Tensor):
        return attention, None
    product = users[0]
    scale = next((a for a in product.args if a is not attention), None)
    gate = _without_casts(scale)
    if not is_call(gate, aten.sigmoid.default):
        return attention, None
    difference = _without_casts(gate.args[0])
    if not is_call(difference, aten.sub.Tensor) or difference.kwargs:
        return attention, None
    lse, sinks = difference.args
    lse = _without_casts(lse)
    if not is_call(lse, aten.logsumexp.default) or lse.args[0] is not scores or not isinstance(sinks, fx.Node):
        return attention, None
    at = form.index("H")
    if shape_of(scale) != _with_one(shape_of(attention), form.index("V")):
        raise Reject(f"a scale by sinks of shape {shape_of(scale)} on attention {shape_of(attention)}", product, 6)
    # lse [B, H, T] has lost the keys' dim; so has what is taken off it
    lost = lse.args[1][0] % len(shape_of(scores))
    return product, _of_heads(sinks, at - (lost < at))


def is_maximum_of(value: Any, scores: Any) -> bool:
    """True for max(scores, -1, keepdim): softmax does not feel that it is taken off."""
    if is_call(value, aten.amax.default):
        source, dims, keep = (*value.args, [], False)[:3]
        return source is scores and [d % 4 for d in dims] == [3] and bool(keep)
    largest = (
        value.args[0] if isinstance(value, fx.Node) and value.op == "call_function" and len(value.args) == 2 else None
    )
    if largest is None or not is_call(largest, aten.max.dim) or value.args[1] != 0:
        return False
    source, dim, keep = (*largest.args, False)[:3]
    return source is scores and dim % 4 == 3 and bool(keep)


def _with_one(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], 1, *shape[dim + 1 :])


def _without_casts(value: Any) -> Any:
    while is_call(value, *_CASTS, aten.unsqueeze.default):
        value = value.args[0]
    return value


def _of_heads(value: fx.Node, head_dim: int) -> HeadRows:
    """The parameter [H] whose element h is all of `value` at h of its dim `head_dim`."""
    param, at = _elements(value)
    heads = shape_of(value)[head_dim]
    if param is None or tuple(param.meta["val"].shape) != (param.meta["val"].numel(),):
        raise Reject(
            f"sinks must be a parameter of one number a head, they are `{value.name}` ({value.target})", value, 1
        )
    wanted = torch.arange(heads).view([-1 if d == head_dim else 1 for d in range(at.dim())])
    if param.meta["val"].numel() != heads or not bool((at == wanted).all()):
        raise Reject(f"sinks: `{input_ref(param).name}` is not one number a head in their order", value, 1)
    return HeadRows(input_ref(param).name, heads, 1, is_bias=True)


def _elements(value: fx.Node) -> tuple[fx.Node | None, Tensor]:
    """(parameter, number in it of each element) of a value that only moves, repeats and casts one; (None, ..) else."""
    node, at = value, torch.arange(torch.Size(shape_of(value)).numel()).view(shape_of(value))
    while not is_param(node):
        if is_call(node, *_CASTS) and not is_layout_op(node):
            node = node.args[0]
            continue
        source = trace_elements(node)
        used = source.used()
        if len(used) != 1 or used[0] is node or source.undefined():
            return None, at
        at = source.ids.flatten()[at] - source.sources[used[0]]
        node = used[0]
    return node, at
