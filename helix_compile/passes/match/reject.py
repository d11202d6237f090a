"""How a matcher says that a candidate is no site; of a quantised weight, which stored tensor it is made from."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import aten, is_call, is_param, source_line
from helix_compile.plan.matches import MatchFailure

_DEQUANTISE = (
    "dequantise the model first (transformers: model.dequantize()), or pass the checkpoint's folder, whose quantised "
    "weights are dequantised as they are read"
)


def computed_weight(linear: fx.Node, weight: object) -> str:
    """The reason, with the way out where the weight is dequantised in the layer's forward."""
    if not isinstance(weight, fx.Node):
        return f"the weight of `{linear.name}` is `{weight}`, not a parameter"
    for node in sorted(ancestors([weight], until=()), key=lambda n: n.name):
        if is_param(node) and is_quantised(node):
            dtype = str(node.meta["val"].dtype).removeprefix("torch.")
            return (
                f"`{linear.name}` is a quantised linear: its weight `{weight.name}` is made in the forward from "
                f"{node.meta['input'][1]} ({dtype}), which can't be cut by heads; {_DEQUANTISE}"
            )
    return f"the weight of `{linear.name}` is computed (`{weight}`), not a parameter"


def is_quantised(param: fx.Node) -> bool:
    """A parameter of a byte or less an element: an integer or FP8 weight that the forward makes wide."""
    dtype = param.meta["val"].dtype
    return dtype.itemsize == 1 and dtype is not torch.bool


class Reject(Exception):
    """Unwinds one candidate; becomes a MatchFailure."""

    def __init__(self, reason: str, node: fx.Node, depth: int):
        super().__init__(reason)
        self.failure = MatchFailure(reason, node.name, source_line(node), depth)


def unknown_in_scores(step: fx.Node) -> str:
    """Why an op between the scores and their softmax is no part of attention in normal form."""
    if is_call(step, *_MASKING):
        return (
            f"the scores are masked by `{step.target}`, expected a mask that is added to them: 0 where a key is visible, a "
            "large negative number where it is not (nearest that works: scores + mask, or scaled_dot_product_attention)"
        )
    return f"the score chain holds `{step.target}` (sinks, a cap or a bias?)"


_MASKING = (
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)
