"""A graph that was lowered for one layout, costed for every other of the same structure: cuts change sizes, never nodes.

    dim of a value that is cut      n  ->  n / width(its layout) * width(another one)        width: heads, KV heads or rows of a rank

What a dim counts follows from the parameter that made it; which axis cuts it stands in the node's layout. The cost of a node
is what costs.py says of it, as `inspect` does: here it is asked with other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor.placement_types import Shard

from helix_compile.ir.collectives import ALL_GATHER, COLLECTIVE_OF, WAIT, is_collective
from helix_compile.ir.graph import helix_op, input_ref, is_param, placeholders
from helix_compile.ir.sizes import size_at_step
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import head_padding
from helix_compile.plan.helix_plan import OuterPlan
from helix_compile.plan.matches import LayerMatch
from helix_compile.predict.costs import NodeCost, NodeSizes, Workload, is_matmul, node_cost, reach_of, tensors_of
from helix_compile.predict.overlap import part_of_node
from helix_compile.predict.terms import ALL, ATTENTION, CHUNK, MATMUL, OTHER, TOP, WINDOW, Term, merged


@dataclass(frozen=True)
class Counted:
    """What a cut dim has so many of on a rank: "q" heads, "kv" heads, or "rows", `total` in all."""

    kind: str
    total: int
    kv_heads: int = 0

    def width(self, axis: str, layout: HelixLayout) -> int:
        """On every rank, padding included."""
        if self.kind == "q":
            return head_padding(self.total, self.kv_heads, layout).places // layout.size(axis)
        return -(-self.total // layout.size(axis))


Cut = tuple[
    int, Counted, str, int
]  # a dim that is cut: what it counts, over which axis, how many of them in the reference
Symbol = tuple[Counted | str, str]  # (what is counted, axis), or ("ranks", axis)


def counted_in(match: LayerMatch) -> dict[str, dict[str, Counted]]:
    """Parameter of a body -> axis -> what its cut dim counts; axis "" stands for any."""
    found: dict[str, dict[str, Counted]] = {}
    for a in match.attentions:
        K = a.cache.heads
        queries, keys = {"": Counted("q", a.num_heads, K)}, {"": Counted("kv", K)}
        found |= {part.name: keys if side == "kv" else queries for side, part in a.cuts}
        found[a.o_weight] = queries
        if a.sinks:
            found[a.sinks.name] = queries
        if a.gate and a.gate.linear:
            found |= {rows.name: queries for rows in a.gate.linear.params}
    for f in match.dense_ffns:
        rows = {"": Counted("rows", f.width)}
        names = (f.gate_weight, f.up_weight, f.down_weight, f.gate_bias, f.up_bias)
        found |= {name: rows for name in names if name}
    for m in match.moes:
        experts, width = Counted("rows", m.num_experts), Counted("rows", m.width)
        found |= {name: {"ep": experts, "tpf": width, "world": width} for name in (m.gate_up, m.down)}
    return found


def counted_outside(plan: OuterPlan) -> dict[str, dict[str, Counted]]:
    """The same of the graph around the bodies."""
    return {shard.name: {"": Counted("rows", shard.cuts[0].total)} for shard in plan.param_shards}


class ReferenceGraph:
    """A lowered graph and the layout it was lowered for; `terms(layout)` is what its nodes cost under another.

    Args:
        graph: of a body, or the one around the bodies.
        layout: that it was lowered for.
        counted: see counted_in().
        kv_heads: site -> KV heads that are cached.
        formats: another format of weights changes its own; embedding and head keep theirs.
        numbers: (expression, batch) -> what it is there; of all graphs of a model, which add to it.
    """

    def __init__(
        self,
        graph: fx.Graph,
        layout: HelixLayout,
        counted: dict[str, dict[str, Counted]],
        kv_heads: dict[int, int],
        numbers: dict[Hashable, int],
        formats: bool = True,
    ):
        self.graph, self.layout, self._formats, self._numbers = graph, layout, formats, numbers
        self._sizes: dict[Hashable, tuple[list[int], tuple[Cut, ...]]] = {}
        self._widths: dict[Hashable, int] = {}
        self._counted: dict[fx.Node, dict[str, Counted]] = {}
        for node in graph.nodes:
            ref = input_ref(node)
            if is_param(node):
                own = counted.get(ref.name)
            elif ref.kind == "cache":
                own = {"": Counted("kv", kv_heads[ref.site])} if kv_heads.get(ref.site) else None
            else:  # a weight says what its product counts, else what comes in first
                known = [self._counted[n] for n in node.all_input_nodes if n in self._counted]
                weights = [self._counted[n] for n in node.all_input_nodes if n in self._counted and is_param(n)]
                own = next(iter((*weights, *known)), None)
            if own:
                self._counted[node] = own
        self._chunks = _chunks(graph)
        self.parts = max((p[2] for n in graph.nodes if (p := part_of_node(n))), default=1)
        self._groups: list[tuple[tuple[Symbol, ...], list[fx.Node]]] | None = None
        self._known: dict[Hashable, tuple[Term, ...]] = {}

    def counted(self, node: fx.Node, axis: str) -> Counted:
        """What a dim of a node that is cut over `axis` counts."""
        own = self._counted[node]
        return own.get(axis) or own.get("") or next(iter(own.values()))

    def terms(self, layout: HelixLayout) -> Iterator[tuple[Term, ...]]:
        """Of groups of nodes, each of which depends on the same of a layout."""
        if self._groups is None:
            self._groups = self._grouped()
        sizes = ScaledSizes(self, layout)
        for number, (symbols, nodes) in enumerate(self._groups):
            key = (number, *(self.value_of(s, layout) for s in symbols))
            if key not in self._known:
                terms = (t for n in nodes if (t := self.term(n, sizes)) is not None and not t.is_idle)
                self._known[key] = merged(terms)
            yield self._known[key]

    def value_of(self, symbol: Symbol, layout: HelixLayout) -> int:
        """What a layout makes of a symbol."""
        counted, axis = symbol
        if isinstance(counted, str):
            return layout.size(axis)
        if (known := (counted, axis, layout)) not in self._widths:
            self._widths[known] = counted.width(axis, layout)
        return self._widths[known]

    def term(self, node: fx.Node, sizes: ScaledSizes) -> Term | None:
        """What a node costs under a layout, None for nothing."""
        if (own := part_of_node(node)) and own[1]:
            return None  # the first part stands for all
        sizes.reach, sizes.routed, sizes.attended = (ALL, 0), None, False
        unit = sizes.layout.kvp * self.parts  # of so many tokens no share of a rank or a part is rounded
        at = [sizes.probe(node, batch, 0) for batch in (unit, 2 * unit)]
        at.append(sizes.probe(node, unit, 1) if sizes.attended else at[0])
        term = _term(node, at, unit, sizes)
        if term is not None and term.weights and not any(self._params.get(n, False) for n in node.all_input_nodes):
            term = replace(term, weights=0.0, moved=(term.moved[0] + term.weights, *term.moved[1:]))
        if term is not None and node in self._chunks:
            term = replace(term, chunk=self._chunks[node], whole=_has_all_rows(node))
        return term

    def base_shape(self, node: fx.Node, place: int, batch: int) -> tuple[list[int], tuple[Cut, ...]]:
        """Of a tensor that a node makes in the reference, at `batch` tokens; and which dims are cut."""
        if (key := (node, place, batch)) not in self._sizes:
            layout = node.meta.get("layout") or {}
            placed = (layout[place] if place < len(layout) else {}) if isinstance(layout, tuple) else layout
            shape = [self._number(s, batch) for s in tensors_of(node)[place].shape]
            cuts = []
            for axis, placement in placed.items():
                if isinstance(placement, Shard):
                    counted = self.counted(node, axis)
                    before = counted.width(axis, self.layout)
                    assert shape[placement.dim] % before == 0, (
                        f"{node.name}: {shape} cut over {axis} is no multiple of {before}"
                    )
                    cuts.append((placement.dim, counted, axis, before))
            self._sizes[key] = shape, tuple(cuts)
        return self._sizes[key]

    def _number(self, size: int | torch.SymInt, batch: int) -> int:
        if isinstance(size, int):
            return size
        if (key := (size.node.expr, batch)) not in self._numbers:
            self._numbers[key] = size_at_step(size, batch, 1, 0)
        return self._numbers[key]

    def params_bytes(self, layout: HelixLayout) -> tuple[int, int]:
        """Bytes of the parameters that a format of weights changes, and of all others."""
        sizes = ScaledSizes(self, layout)
        weights, others = ([n for n, formatted in self._params.items() if formatted == w] for w in (True, False))
        return sum(map(sizes.nbytes, weights)), sum(map(sizes.nbytes, others))

    @cached_property
    def _params(self) -> dict[fx.Node, bool]:
        """Those that are used here, and whether a format of weights changes them."""
        used = (n for n in placeholders(self.graph) if is_param(n) and any(u.op != "call_module" for u in n.users))
        return {n: self._formats and is_weight(n) for n in used}

    def _grouped(self) -> list[tuple[tuple[Symbol, ...], list[fx.Node]]]:
        groups: dict[frozenset[Symbol], list[fx.Node]] = {}
        for node in self.graph.nodes:
            sizes = ScaledSizes(self, self.layout)
            if self.term(node, sizes) is not None:
                groups.setdefault(frozenset(sizes.asked), []).append(node)
        return [(tuple(sorted(symbols, key=repr)), nodes) for symbols, nodes in groups.items()]


def _chunks(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """Nodes of the first part of each site that is in parts -> (site, collectives of that part before it)."""
    found: dict[fx.Node, tuple[int, int]] = {}
    started: dict[int, int] = {}
    for node in graph.nodes:
        own = part_of_node(node)
        if own is not None and own[1] == 0:
            found[node] = own[0], started.setdefault(own[0], 0)
            started[own[0]] += is_collective(node)
    return found


def _has_all_rows(node: fx.Node) -> bool:
    """Does a node of a part compute with the rows of all? W_UV before the exchange does, so that its bits are those of the whole batch."""
    return "place_rows" in (helix_op(node), *(helix_op(n) for n in node.all_input_nodes))


def is_weight(param: fx.Node) -> bool:
    """A parameter that a format of weights changes: matmuls and experts read it as it is."""
    users = [u for u in param.users if is_matmul(u) or helix_op(u) == "moe_experts"]
    return bool(users) and len(users) == len(param.users) and param.meta["val"].dim() > 1


class ScaledSizes(NodeSizes):
    """Sizes of a reference graph's values under another layout; notes what of the layout was asked for."""

    def __init__(self, reference: ReferenceGraph, layout: HelixLayout):
        super().__init__(Workload(1, 1, 0), layout, 1)
        self.reference = reference
        self.asked: set[Symbol] = set()
        self.reach: tuple[str, int] = (ALL, 0)
        self.routed: tuple[int, int] | None = None
        self.attended = False  # did the node ask how much of the context it sees?
        self._local = 0

    def probe(self, node: fx.Node, batch: int, local: int) -> NodeCost:
        """Cost at `batch` tokens, one a sequence, where each sees `local` cached ones on this rank."""
        self.workload, self._local = Workload(batch, 1, 0), local
        return node_cost(node, self)

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        self.asked.add(("ranks", axis))
        return self.layout.size(axis)

    def hit(self, top_k: int, experts: int, tokens: int) -> float:
        """All of them: how many some token chose is put in later."""
        self.routed = (top_k, experts)
        return 1.0

    def local_context(self, decode: fx.Node) -> float:
        """What is probed; how far it reaches is noted."""
        window, chunk, ring = reach_of(decode)
        assert not ring, "caches of the last tokens are not planned"
        self.attended = True
        self.reach = (WINDOW, window) if window else (CHUNK, chunk) if chunk else (ALL, 0)
        return self._local

    def chosen_context(self, decode: fx.Node, top_k: int) -> float:
        """The same of what an indexer chose."""
        self.attended = True
        self.reach = (TOP, top_k)
        return self._local

    def shapes(self, node: fx.Node) -> list[list[int]]:
        """As the reference has them, cut dims by the other layout, dims of peers by its cp."""
        if helix_op(node) == "pack_heads":  # rows of peers; what goes in, as it is
            total = sum(math.prod(s) * v.dtype.itemsize for n in node.args[:2] for s, v in self._of(n))
            return [[total // node.meta["val"].dtype.itemsize]]
        if node.target is WAIT:
            return self.shapes(node.args[0])
        if is_collective(node) and COLLECTIVE_OF[node.target].name in _AS_THEY_COME:
            shape = list(self.of(node.args[0]))
            if COLLECTIVE_OF[node.target] is ALL_GATHER:
                shape[0] *= self.size(str(node.args[-1]))
            return [shape]
        return [self._shape(node, i) for i in range(len(tensors_of(node)))]

    def _of(self, node: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        return zip(self.shapes(node), tensors_of(node), strict=True)

    def _shape(self, node: fx.Node, place: int) -> list[int]:
        base, cuts = self.reference.base_shape(node, place, self.workload.batch)
        shape = list(base)
        for dim, counted, axis, before in cuts:
            self.asked.add((counted, axis))
            shape[dim] = shape[dim] // before * self.reference.value_of((counted, axis), self.layout)
        source = node.args[0] if node.op == "call_function" and node.args else None
        if "unpack_heads" in (helix_op(node), helix_op(source)):
            shape[0] = self.size("kvp")
        return shape


_AS_THEY_COME = ("all_to_all_single", "all_reduce", "all_gather_into_tensor")


def _term(node: fx.Node, at: list[NodeCost], unit: int, sizes: ScaledSizes) -> Term | None:
    one, two, seen = at
    if not (two.flops or two.hbm_bytes or two.is_collective or seen.hbm_bytes):
        return None
    if one.is_collective:
        op, peers = COLLECTIVE_OF[node.target].name, sizes.size(str(node.args[-1]))
        return Term(node.name, op, wire=two.wire_bytes / (2 * unit), peers=peers)

    def slopes(*values: float) -> tuple[float, float, float]:
        first, second, longer = values
        slope = (second - first) / unit
        return first - slope * unit, slope, (longer - first) / unit

    rest = [c.hbm_bytes - c.weight_bytes - c.cache_bytes for c in at]
    attends = bool(seen.cache_bytes) or sizes.reach[0] != ALL or seen.flops != one.flops
    kind = ATTENTION if attends else MATMUL if one.weight_bytes else OTHER
    return Term(
        node.name,
        kind,
        slopes(*(c.flops for c in at)),
        slopes(*rest),
        weights=one.weight_bytes,
        cached=(seen.cache_bytes - one.cache_bytes) / unit,
        routed=sizes.routed,
        reach=sizes.reach,
    )
