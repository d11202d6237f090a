"""Attention and its exchange a part of the batch at a time: while one part is exchanged, the next attends (HOP-B, paper 2.1.3).

    attend(0), exchange(0) | attend(1), exchange(1) | merge(0) | merge(1) | o = cat([o_0, o_1])

A move starts where it stands and is waited for where its result is first read (passes/lower/collectives.py). Where a site exchanges
twice (ag_rs), a part's second exchange starts behind the next part's first one. What the layer computes before attention and behind
the merge has all rows, as without overlap. A product with W_UV before the exchange has them too (place_rows): the bits of its rows
may hang on how many there are.

Every node of a part says so: meta["part"] = [site, part, parts].
"""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.errors import PassError
from helix_compile.ir.graph import PART, aten, erase_unused, helix_op, input_ref, is_call, named, placeholders
from helix_compile.ir.ops import MOVES, helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.ir.sizes import has_rows_of
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import LayerMatch

_ATTENTION = ("mla_decode", "gqa_decode", "mla_decode_slots")


def overlap_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Every site of a body that the plan has in parts."""
    planned = context.plan.body(match.body).attentions
    done = 0
    for attended in [n for n in gm.graph.nodes if helix_op(n) in _ATTENTION]:
        site = _site_of(attended)
        if planned[site].parts > 1:
            _in_parts(gm.graph, attended, site, planned[site].parts)
            done += 1
    erase_unused(gm.graph, keep=placeholders(gm.graph))
    propagate_shapes(gm.graph)
    return done


def _site_of(attended: fx.Node) -> int:
    """Of an attention op, by the cache that it reads."""
    cache = attended.args[1] if helix_op(attended) == "gqa_decode" else attended.args[2]
    while isinstance(cache, fx.Node) and cache.op == "call_function":  # a part of a row, or its bytes
        cache = cache.args[0]
    return input_ref(cache).site


def _region(attended: fx.Node) -> list[fx.Node]:
    """From attention to the output of the heads that a rank owns, in the order of the graph."""
    found, end = {attended: None}, None
    for node in attended.graph.nodes:
        if any(source in found for source in node.all_input_nodes) and (end is None or is_call(node, *_SINKS)):
            found[node] = None
            end = node if _is_whole(node) else end
    if end is None or end is not next(reversed(found)):
        raise PassError(
            f"`{attended.name}`: what it attends to is never whole, the last of it is `{[*found][-1].name}`"
        )
    return list(found)


_SINKS = (helix.total_lse.default, helix.apply_sinks.default)  # on top of what is merged


def _is_whole(node: fx.Node) -> bool:
    """Merged, or summed over the ranks."""
    scattered = is_call(node, helix.reshard.default) and node.args[2] == "kvp:S(2)"
    sinks = is_call(node, helix.apply_sinks.default) and is_call(node.args[0], helix.merge_lse.default)
    return scattered or sinks or is_call(node, helix.merge_lse.default)


def _in_parts(graph: fx.Graph, attended: fx.Node, site: int, parts: int) -> None:
    region = _region(attended)
    steps: list[list[fx.Node]] = [[]]
    for node in region:
        steps[-1].append(node)
        if is_call(node, *MOVES):
            steps.append([])
    end = region[-1]
    copies = [_PartOf(graph, attended, site, part, parts) for part in range(parts)]
    with graph.inserting_before(end):
        for time in range(parts + len(steps) - 1):
            for late, step in enumerate(steps):
                if 0 <= time - late < parts:
                    copies[time - late].add(step)
        with made_from(graph, end):
            whole = named(graph, f"{end.name}_joined", aten.cat.default, [copy.of[end] for copy in copies])
    end.replace_all_uses_with(whole)
    for node in reversed(region):
        graph.erase_node(node)


class _PartOf:
    """Copies of a region's nodes for one part. `of`: node -> its copy."""

    def __init__(self, graph: fx.Graph, attended: fx.Node, site: int, part: int, parts: int):
        self._graph, self._meta = graph, [site, part, parts]
        self._all = attended.args[0]  # the queries of all rows
        self.of: dict[fx.Node, fx.Node] = {}

    def add(self, nodes: list[fx.Node]) -> None:
        """Copy them, at the graph's insertion point."""
        for node in nodes:
            with made_from(self._graph, node):
                self.of[node] = self._raised(node) if is_call(node, aten.einsum.default) else self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        args, keywords = fx.map_arg((node.args, dict(node.kwargs)), self._rows)
        return self._named(node.name, node.target, *args, **keywords)

    def _rows(self, node: fx.Node) -> fx.Node:
        """The rows of this part of what lies outside of the region; caches and weights have none."""
        if node not in self.of and has_rows_of(node.meta["val"], self._all.meta["val"]):
            with made_from(self._graph, node):
                self.of[node] = self._named(node.name, helix.rows_of_part.default, node, *self._meta[1:])
        return self.of.get(node, node)

    def _raised(self, product: fx.Node) -> fx.Node:
        """A product of as many rows as all parts have."""
        equation, (partial_o, w_uv) = product.args
        rows = self._named(
            f"{partial_o.name}_rows", helix.place_rows.default, self.of[partial_o], self._all, *self._meta[1:]
        )
        whole = self._named(f"{product.name}_rows", aten.einsum.default, equation, [rows, w_uv])
        return self._named(product.name, helix.rows_of_part.default, whole, *self._meta[1:])

    def _named(self, name: str, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        node = named(self._graph, f"{name}_part{self._meta[1]}", target, *args, **keywords)
        node.meta[PART] = list(self._meta)
        return node
