"""What each node of a lowered graph costs on one rank: flops, bytes of memory, bytes on the wire. Predicted, not measured.

Every node reads its inputs and writes its output once; nothing is fused, hardware's caches count nothing. How long that takes an
accelerator says (accelerators.py): of a compute node max(flops / peak, bytes / bandwidth), of a collective latency + bytes / link.
`inspect` and the planner ask both alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import HelixError, LayoutError
from helix_compile.ir.collectives import COLLECTIVE_OF, WAIT, is_collective
from helix_compile.ir.elements import is_layout_op
from helix_compile.ir.graph import all_rows, aten, helix_op, input_ref, is_param
from helix_compile.ir.ops import MOVES
from helix_compile.ir.sizes import size_at_step
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.ledger import local_length
from helix_compile.plan.matches import reach_of_input
from helix_compile.predict.accelerators import Accelerator

_COPIES = frozenset(
    {
        aten.cat.default,
        aten.clone.default,
        aten.stack.default,
        aten.repeat.default,
        aten.copy.default,
        aten.slice_scatter.default,
        aten.contiguous.default,
    }
)
_MATMULS = frozenset(
    {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default, aten._grouped_mm.default}
)


@dataclass(frozen=True)
class Workload:
    """One step: `batch` sequences of `tokens` new tokens each, behind `context` cached ones."""

    batch: int
    tokens: int
    context: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1 or self.context < 0:
            raise LayoutError(f"workload: batch and tokens >= 1, context >= 0 expected, got {self}")


@dataclass(frozen=True)
class NodeCost:
    """Predicted cost of one node on one rank; `wire_bytes` leave the rank.

    `weight_bytes` and `cache_bytes` are those of `hbm_bytes` that a matmul reads of its weights and attention of what is cached:
    what another format of either changes. A collective has torch's name and so many `peers`; other nodes a `peak` of matmuls.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    wire_bytes: float = 0.0
    collective: str = ""
    peers: int = 1
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    peak: str = "bf16"

    @property
    def is_collective(self) -> bool:
        """Does it move between ranks?"""
        return bool(self.collective)

    @property
    def is_launched(self) -> bool:
        """Does it take time at all?"""
        return bool(self.flops or self.hbm_bytes or self.collective)

    def seconds(self, machine: Accelerator) -> float:
        """On an accelerator, its launch included."""
        if not self.is_launched:
            return 0.0
        if self.collective:
            return 1e-6 * (machine.launch_us + machine.collective_us(self.collective, self.peers, self.wire_bytes))
        return 1e-6 * (machine.launch_us + machine.compute_us(self.flops, self.hbm_bytes, self.peak))


def predict_costs(
    graph: fx.Graph, workload: Workload, layout: HelixLayout, tokens_per_block: int, rank: int = 0
) -> dict[str, NodeCost]:
    """Cost of every node of a lowered body, or of the graph around them, on `rank`, by name; calls of bodies cost nothing here.

    Raises:
        HelixError: a move is left: its bytes are those of the collective that lowering makes of it.
    """
    sizes = NodeSizes(workload, layout, tokens_per_block, rank)
    return {node.name: node_cost(node, sizes) for node in graph.nodes}


class NodeSizes:
    """Sizes of the values of a graph at a workload: symbols stand for B, T and S by the hints they were captured with."""

    def __init__(self, workload: Workload, layout: HelixLayout, tokens_per_block: int, rank: int = 0):
        self.workload, self.layout, self.tokens_per_block, self.rank = workload, layout, tokens_per_block, rank

    def shapes(self, node: fx.Node) -> list[list[int]]:
        """Of each tensor that the node makes."""
        return [[self.number(s) for s in value.shape] for value in tensors_of(node)]

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.layout.size(axis)

    def hit(self, top_k: int, experts: int, tokens: int) -> float:
        """Share of the experts that some token chose, where tokens spread evenly."""
        return 1.0 - (1.0 - top_k / experts) ** tokens

    def local_context(self, decode: fx.Node) -> float:
        """Cached tokens of a sequence on this rank that some new token sees, the new ones included."""
        window, chunk, ring = reach_of(decode)
        oldest, context = 0, self.workload.context
        if window or chunk:
            oldest = max(0, context + 1 - window) if window else context // chunk * chunk
            if ring:
                return context + self.workload.tokens - oldest
        return self._held(context + self.workload.tokens) - self._held(oldest)

    def chosen_context(self, decode: fx.Node, top_k: int) -> float:
        """Of these the ones that an indexer chose: an even share of the best `top_k` of all ranks."""
        return min(self.local_context(decode), -(-top_k // self.size("kvp")))

    def of(self, node: Any) -> list[int]:
        """Shape of a node that makes one tensor."""
        return self.shapes(node)[0]

    def numel(self, node: Any) -> int:
        """Elements of it."""
        return math.prod(self.of(node))

    def nbytes(self, node: Any) -> int:
        """Bytes of all that the node makes."""
        tensors = tensors_of(node)
        return (
            sum(math.prod(s) * v.dtype.itemsize for s, v in zip(self.shapes(node), tensors, strict=True))
            if tensors
            else 0
        )

    def number(self, size: int | torch.SymInt) -> int:
        """A size at the workload."""
        return size_at_step(size, self.workload.batch, self.workload.tokens, self.workload.context)

    def _held(self, length: int) -> int:
        kvp_rank = self.layout.index("kvp", self.rank)
        return int(local_length(length, kvp_rank, self.layout.kvp, self.tokens_per_block))


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The fake tensors that a node makes."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]


def reach_of(decode: fx.Node) -> tuple[int, int, bool]:
    """(window, chunk, whether every rank holds the last tokens by itself) of an attention; 0: it sees all."""
    first = all_rows(decode.kwargs.get("first"))
    if first is None:
        return 0, 0, False
    ref = input_ref(first)
    return *reach_of_input(ref.name), ref.ring


def node_cost(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """What one node of a lowered graph costs: the one place that says it."""
    if node.op != "call_function" or node.target is WAIT:
        return NodeCost()
    if node.target in MOVES:
        raise HelixError(f"node `{node.name}` ({node.target}) is a move; predict the costs of the lowered graph")
    if is_collective(node):
        return _collective(node, sizes)
    op = helix_op(node)
    if op == "mla_decode":
        return _mla_decode(node, sizes)
    if op == "gqa_decode":
        return _gqa_decode(node, sizes)
    if op == "mla_decode_slots":
        return _mla_decode_slots(node, sizes)
    if op == "index_scores":
        return _index_scores(node, sizes)
    if op in ("topk_candidates", "select_slots"):  # one look at the scores of this rank's tokens
        (B, T, _), scores = sizes.of(node.args[0]), node.args[0].meta["val"].dtype.itemsize
        seen = B * T * sizes.local_context(node)
        return NodeCost(seen, seen * scores + sizes.nbytes(node))
    if op == "shard_index":  # a few numbers, once a step; a compiled graph says no value of it
        return NodeCost()
    if op == "cache_append":
        return NodeCost(hbm_bytes=2 * sum(sizes.nbytes(n) for n in node.args[4:6]))
    if op == "embed_rows" or node.target is aten.embedding.default:  # rows of tokens, not the table
        return NodeCost(hbm_bytes=2 * sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.args[:2] if _is_ids(n)))
    if op == "moe_experts":
        return _moe_experts(node, sizes)
    if not isinstance(_first(node.meta.get("val")), Tensor):
        return NodeCost()
    if (is_layout_op(node) and node.target not in _COPIES) or op == "rows_of_part":
        return NodeCost()
    moved = sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.all_input_nodes)
    weights = [n for n in node.all_input_nodes if is_param(n) and n.meta["val"].dim() > 1] if is_matmul(node) else []
    return NodeCost(_flops(node, sizes), moved, weight_bytes=sum(map(sizes.nbytes, weights)))


def is_matmul(node: fx.Node) -> bool:
    """Does its work as products of matrices?"""
    return node.target in _MATMULS or node.target is aten.einsum.default or "grouped_mm" in str(node.target)


def _is_ids(node: Any) -> bool:
    return not node.meta["val"].dtype.is_floating_point


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _flops(node: fx.Node, sizes: NodeSizes) -> float:
    if node.target in _COPIES:
        return 0.0
    if node.target in _MATMULS or "grouped_mm" in str(node.target):
        return 2.0 * sizes.numel(node) * sizes.of(node.args[0])[-1]
    if node.target is aten.einsum.default:
        letters: dict[str, int] = {}
        terms = str(node.args[0]).split("->")[0].split(",")
        for term, operand in zip(terms, node.args[1], strict=True):
            letters.update(zip(term, sizes.of(operand), strict=True))
        return 2.0 * math.prod(letters.values())
    if node.target is aten.scaled_dot_product_attention.default:
        (B, H, T, Dk), (*_, S, V) = sizes.of(node.args[0]), sizes.of(node.args[2])
        return 2.0 * B * H * T * S * (Dk + V)
    value = node.meta["val"]
    return float(sizes.numel(node)) if isinstance(value, Tensor) else 0.0


def _mla_decode(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """Every new token against this rank's part of the context: scores over R + r channels, values over R."""
    B, T, H, R = sizes.of(node.args[0])
    local, width = sizes.local_context(node), R + sizes.of(node.args[1])[-1]
    moved = sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.args[:2])
    read = B * local * _row_bytes(node.args[2], sizes)
    return NodeCost(2.0 * B * T * H * local * (width + R), moved + read, cache_bytes=read, peak=_peak_of(node.args[2]))


def _mla_decode_slots(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """The same over what an indexer chose: each new token has keys of its own."""
    B, T, H, R = sizes.of(node.args[0])
    seen, width = sizes.chosen_context(node, sizes.of(node.args[5])[-1]), R + sizes.of(node.args[1])[-1]
    moved = sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.args[:2])
    read = B * T * seen * _row_bytes(node.args[2], sizes)
    return NodeCost(2.0 * B * T * H * seen * (width + R), moved + read, cache_bytes=read, peak=_peak_of(node.args[2]))


def _peak_of(cache: Any) -> str:
    """Attention to a cache of one byte a value reaches the FP8 peak."""
    return "fp8" if cache.meta["val"].dtype.itemsize == 1 else "bf16"


def _row_bytes(cache: Any, sizes: NodeSizes) -> int:
    """Of one token in a cache [pages, page, width], or in the part of its rows that is attended to."""
    return sizes.of(cache)[-1] * int(cache.meta["val"].dtype.itemsize)


def _index_scores(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """Each index head of a new token against this rank's index keys; a score for each of them is written."""
    B, T, J, width = sizes.of(node.args[0])
    local, written = sizes.local_context(node), node.meta["val"].dtype.itemsize
    moved = sum(sizes.nbytes(n) for n in node.args[:2]) + B * T * local * written
    return NodeCost(2.0 * B * T * J * local * (width + 1), moved + B * local * _row_bytes(node.args[2], sizes))


def _gqa_decode(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """Every new token against this rank's part of the context: K and V of a KV head are read once for its group."""
    (B, T, H, Dk), (*_, K, Dv) = sizes.of(node.args[0]), sizes.of(node.args[2])
    local, item = sizes.local_context(node), node.args[2].meta["val"].dtype.itemsize
    moved = sizes.nbytes(node) + sizes.nbytes(node.args[0])
    read = B * local * K * (Dk + Dv) * item
    return NodeCost(2.0 * B * T * H * local * (Dk + Dv), moved + read, cache_bytes=read, peak=_peak_of(node.args[2]))


def _moe_experts(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    """Tokens spread evenly over the experts; the weights of those that some token chose are read."""
    x, ids, gate_up, down = (node.args[i] for i in (0, 1, 3, 4))
    tokens, top_k = sizes.of(ids)
    experts, _, width, D = sizes.of(gate_up)
    ep = sizes.size("ep")
    flops = 6.0 * tokens * top_k / ep * width * D
    weights = sizes.hit(top_k, experts * ep, tokens) * (sizes.nbytes(gate_up) + sizes.nbytes(down))
    return NodeCost(flops, weights + sizes.nbytes(x) + sizes.nbytes(node), weight_bytes=weights)


def _collective(node: fx.Node, sizes: NodeSizes) -> NodeCost:
    peers = sizes.size(str(node.args[-1]))
    sent = COLLECTIVE_OF[node.target].egress(peers, sizes.nbytes(node.args[0]))
    return NodeCost(wire_bytes=float(sent), collective=COLLECTIVE_OF[node.target].name, peers=peers)
