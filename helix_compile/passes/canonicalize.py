"""One shape of graph for the matchers: no asserts, B and T read from one place, no dead code."""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_CHECKS = frozenset(
    {
        _aten._assert_tensor_metadata.default,
        _aten._assert_scalar.default,
        _aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.msg,
    }
)


def canonicalize(graph: fx.Graph, anchor: fx.Node) -> None:
    """Edit `graph` in place: strip checks, read B and T from `anchor` [B, T, ...] only, drop dead code.

    torch.export takes B from the mask, T from the positions or S from the past, whatever it saw first. Those
    inputs go away in the rewrite, so every size that equals B or T is re-pointed to `anchor` (same symbol).
    """
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
    batch, tokens = anchor.meta["val"].shape[:2]
    last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
    sizes = []
    with graph.inserting_after(last_input):
        for dim, size in ((1, tokens), (0, batch)):
            node = graph.call_function(_aten.sym_size.int, (anchor, dim))
            node.meta["val"] = size
            sizes.append(node)
    for node in list(graph.nodes):
        if node.target is _aten.sym_size.int and node not in sizes:
            for size in sizes:
                if node.meta["val"].node.expr == size.meta["val"].node.expr:
                    node.replace_all_uses_with(size)
    graph.eliminate_dead_code()
    graph.lint()
