"""The attention ops of a body by site: one of each, or one for each part of a batch that attends a part at a time."""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.ir.graph import helix_op

DECODES = ("mla_decode", "gqa_decode", "mla_decode_slots")


def decodes_by_site(graph: fx.Graph) -> list[list[fx.Node]]:
    """Those of each cached attention of a body, in the order of the graph: what reads one cache is one site."""
    sites: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if helix_op(node) in DECODES:
            cache: Any = node.args[1] if helix_op(node) == "gqa_decode" else node.args[2]
            while isinstance(cache, fx.Node) and cache.op == "call_function" and cache.all_input_nodes:
                cache = cache.all_input_nodes[0]  # a part of its rows' channels, or these as bytes
            sites.setdefault(cache, []).append(node)
    return list(sites.values())
