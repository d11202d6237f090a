"""Which ops of a graph a picture keeps, which lie on an edge, and which small ops stand together as one."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, fx

from helix_compile.ir.collectives import COLLECTIVE_OF, WAIT
from helix_compile.ir.elements import is_cache_update, is_layout_op
from helix_compile.ir.graph import aten, input_ref, is_call, is_param
from helix_compile.ir.ops import MOVES, UNPACKS

_CACHES = ("past", "cache")
_KEY_OPS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.einsum.default,
        aten.scaled_dot_product_attention.default,
        aten._grouped_mm.default,
        aten.embedding.default,
    }
)
# arguments that an op reads the shape and dtype of, never a value
_SHAPE_ONLY: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(UNPACKS, (1, 2)),
    aten.new_empty.default: (0,),
    aten.empty_like.default: (0,),
    aten.zeros_like.default: (0,),
}


@dataclass(frozen=True)
class Folded:
    """Kept nodes in graph order, and for each folded one the kept node that its value comes from."""

    kept: tuple[fx.Node, ...]
    roots: dict[fx.Node, fx.Node]

    def root(self, node: fx.Node) -> fx.Node:
        """The kept node whose value `node` is a view of; a kept node itself."""
        return self.roots.get(node, node)

    def path(self, node: fx.Node) -> list[fx.Node]:
        """Folded ops from the root to `node`, in order."""
        found: list[fx.Node] = []
        while node in self.roots:
            found.append(node)
            node = next(n for n in _read(node) if self.root(n) is self.roots[node])
        return found[::-1]

    def arguments(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """(kept node, value that arrives) for each value that `node` reads."""
        pairs = [(self.root(a), a) for a in _read(node)]
        return [(r, a) for r, a in pairs if is_value(r)]


def fold(graph: fx.Graph) -> Folded:
    """Fold waits and every op that only moves the elements of one kept value."""
    roots: dict[fx.Node, fx.Node] = {}
    kept = []
    for node in graph.nodes:
        if node.op == "output":
            kept.append(node)
            continue
        if not is_value(node):
            continue
        if is_call(node, WAIT) or (_only_moves(node) and not is_cache_update(node)):
            sources = {roots.get(n, n) for n in _read(node) if is_value(n)}
            if len(sources) == 1:
                roots[node] = sources.pop()
                continue
        if _is_cast_for_matmul(node):
            roots[node] = roots.get(node.args[0], node.args[0])
            continue
        kept.append(node)
    return Folded(tuple(kept), roots)


def _only_moves(node: fx.Node) -> bool:
    """is_layout_op, for graphs too whose values are not known (the outer graph of a reloaded module)."""
    known = not is_call(node, aten._to_copy.default) or (
        "val" in node.meta and all("val" in n.meta for n in node.all_input_nodes)
    )
    # memory that nothing has written is no view of what it takes its shape from
    if not known or node.target in _SHAPE_ONLY:
        return False
    return is_layout_op(node) or is_call(node, aten.contiguous.default)


def _is_cast_for_matmul(node: fx.Node) -> bool:
    """A cast that only a matmul reads says no more than the dtype on the edge; a cast inside a norm is part of it."""
    return is_call(node, aten._to_copy.default) and not any(is_small(u) for u in node.users)


def is_value(node: fx.Node) -> bool:
    """True for a node whose value is a tensor or several; sizes and guards are none."""
    if node.op == "call_module":
        return True
    value = node.meta.get("val")
    if value is None and node.op == "call_function":
        return bool(node.users)  # an outer graph's own ops carry no value; a guard has no users
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value))


def is_collective(node: fx.Node) -> bool:
    """True for an op that moves bytes between ranks: torch's collectives, and our moves before lowering."""
    return is_call(node, *MOVES, *COLLECTIVE_OF)


def is_helix_op(node: fx.Node) -> bool:
    """True for an op of our vocabulary, or a provider's, that computes."""
    return node.op == "call_function" and str(node.target).startswith("helix") and not is_collective(node)


def is_small(node: fx.Node) -> bool:
    """True for an op that a reader wants to see only as part of something: no matmul, attention, cache or exchange."""
    if node.op != "call_function" or is_collective(node) or is_helix_op(node):
        return False
    return not (node.target in _KEY_OPS or is_cache_update(node) or str(node.target).startswith("transformers."))


def module_paths(graph: fx.Graph) -> dict[fx.Node, str]:
    """Path inside the layer of the module that each node belongs to; "" is the layer itself.

    A node that a pass made has no module: it takes its first producer's, else its first user's.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    paths = {n: p for n in calls if (p := _stated_module(n)) is not None}
    for node in calls:
        known = [paths[n] for n in node.all_input_nodes if n in paths]
        if node not in paths and known:
            paths[node] = cluster_of(known[0])
    for node in reversed(graph.nodes):
        known = [paths[u] for u in node.users if u in paths and is_value(u)]
        belongs = node.op == "call_function" or input_ref(node).kind in _CACHES
        if node not in paths and known and belongs:
            paths[node] = cluster_of(known[0])
    # the activation function inside an MLP is a module of its own with one op: it stands with its parent's
    values = [n for n in graph.nodes if n in paths and is_value(n)]
    alone = Counter(paths[n] for n in values)
    outer = {p.rpartition(".")[0] for p in alone}
    for node in values:
        if alone[paths[node]] == 1 and is_small(node) and paths[node] not in outer:
            paths[node] = paths[node].rpartition(".")[0] or paths[node]
    return paths


def cluster_of(path: str) -> str:
    """The submodule of a layer that a module path lies in."""
    return path.split(".")[0]


def group_small_ops(folded: Folded, modules: dict[fx.Node, str]) -> list[list[fx.Node]]:
    """Kept nodes in topological order, small ops of one module joined to runs; the result has no cycle."""
    graph = nx.DiGraph()
    graph.add_nodes_from(folded.kept)
    members = {n: [n] for n in folded.kept}
    head = {n: n for n in folded.kept}
    for node in folded.kept:
        sources = [root for root, _ in folded.arguments(node)]
        graph.add_edges_from((head[s], node) for s in sources if head[s] is not node)
        if not is_small(node) or not modules.get(node):
            continue
        for source in dict.fromkeys(head[s] for s in sources):
            mine = head[node]
            joinable = is_small(source) and modules.get(source) == modules[node]
            if joinable and source is not mine and not _other_path(graph, source, mine):
                nx.contracted_nodes(graph, source, mine, self_loops=False, copy=False)
                members[source] += members.pop(mine)
                head.update(dict.fromkeys(members[source], source))
    order_of = {n: i for i, n in enumerate(folded.kept)}
    order = nx.lexicographical_topological_sort(graph, key=lambda n: order_of[n])
    return [sorted(members[n], key=order_of.__getitem__) for n in order]


def _other_path(graph: nx.DiGraph, source: fx.Node, target: fx.Node) -> bool:
    """True if `source` reaches `target` through a third node: joining both would close a cycle."""
    between = [n for n in graph.successors(source) if n is not target]
    return any(nx.has_path(graph, n, target) for n in between)


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes whose values `node` reads, in the order of its arguments."""
    skipped = _SHAPE_ONLY.get(node.target, ()) if node.op == "call_function" else ()
    if node.target is operator.getitem:
        skipped = (1,)
    read: list[fx.Node] = []
    for i, argument in enumerate(node.args):
        if i not in skipped:
            fx.map_arg(argument, read.append)
    fx.map_arg(node.kwargs, read.append)
    if skipped and not any(is_value(n) for n in read):
        # memory that nothing has written yet: its only tie to the graph is the shape it copies
        fx.map_arg([node.args[i] for i in skipped if i < len(node.args)], read.append)
    yield from dict.fromkeys(read)


def _stated_module(node: fx.Node) -> str | None:
    """Module path by the capture's own record, else by the parameter that the node reads, else None."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        return str(stack[-1][0]).partition(".")[2]
    for source in node.all_input_nodes:
        if is_param(source) and ".w_u" not in input_ref(source).name:
            return str(input_ref(source).name).rpartition(".")[0]
    return None
