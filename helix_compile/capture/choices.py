"""What is known of chosen indices: a top-k over E scores gives ids in [0, E), so clamps and masks of other ids do nothing.

transformers up to 5.22 guards its experts against ids of experts that live on other devices. In a capture there are none,
and the guards are seen through here, by their ranges, so that matchers get the form without them.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from helix_compile.ir.graph import aten, is_call

_KEEPS_VALUES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.clone.default,
    aten.index.Tensor,
    aten.slice.Tensor,
    aten.transpose.int,
)
_NEVER = {aten.ge.Scalar: lambda bound, limit: limit >= bound, aten.gt.Scalar: lambda bound, limit: limit >= bound - 1}


def drop_idle_guards(graph: fx.Graph) -> None:
    """Take out clamps of ids to their own range, and fills under a mask that is never true; in place."""
    bounds: dict[fx.Node, int] = {}  # values lie in [0, bound)
    never: set[fx.Node] = set()  # all false
    for node in list(graph.nodes):
        if is_call(node, operator.getitem) and is_call(node.args[0], aten.topk.default) and node.args[1] == 1:
            scores, _, *rest = node.args[0].args
            size = scores.meta["val"].shape[rest[0] if rest else -1]
            if isinstance(size, int):
                bounds[node] = size
        elif is_call(node, operator.getitem) and is_call(node.args[0], aten.sort.default) and node.args[1] == 0:
            _carry(bounds, node, node.args[0].args[0])
        elif is_call(node, *_KEEPS_VALUES):
            _carry(bounds, node, node.args[0])
            if node.args[0] in never:
                never.add(node)
        elif is_call(node, *_NEVER):
            bound = bounds.get(node.args[0])
            if bound is not None and _NEVER[node.target](bound, node.args[1]):
                never.add(node)
        elif is_call(node, aten.clamp.default) and node.args[0] in bounds:
            low, high = (*node.args[1:], None, None)[:2]
            bound = bounds[node.args[0]]
            low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
            if (low is None or low <= 0) and (high is None or high >= bound - 1):
                node.replace_all_uses_with(node.args[0])
        elif is_call(node, aten.masked_fill.Scalar) and node.args[1] in never:
            node.replace_all_uses_with(node.args[0])


def _carry(bounds: dict[fx.Node, int], node: fx.Node, source: Any) -> None:
    if source in bounds:
        bounds[node] = bounds[source]
