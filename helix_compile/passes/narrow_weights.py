"""What to say of a linear whose weight is no parameter: of a quantised one, which stored tensor it is made from."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.passes.cones import ancestors
from helix_compile.passes.fx_edit import is_param

_DEQUANTISE = (
    "dequantise the model first (transformers: model.dequantize()), or pass the checkpoint's folder, of which "
    "DeepSeek's FP8 blocks are dequantised as they are read"
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
