"""What each node of a lowered graph costs on one rank: flops, bytes of memory, bytes on the wire. Predicted, not measured.

A roofline: a compute node takes max(flops / peak, bytes / bandwidth), a collective its latency + bytes / link. Every
node reads its inputs and writes its output once; nothing is fused, caches and launch times count nothing. So the
figures rank nodes and show what overlap could hide; they are not the time of a step.
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
from helix_compile.ir.graph import aten, helix_op, input_ref
from helix_compile.ir.ops import MOVES
from helix_compile.ir.sizes import size_at_step
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.ledger import local_length
from helix_compile.plan.matches import reach_of_input

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
class Machine:
    """One accelerator and its link, peak values.

    Attributes:
        flops_per_s: dense matmul peak of the dtype in the name.
        hbm_bytes_per_s: memory bandwidth.
        link_bytes_per_s: bandwidth to the other ranks, one direction.
        collective_latency_s: what a collective takes for any size.
    """

    name: str
    flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    collective_latency_s: float


# helix-algorithm, section 14; the latency is NCCL's all-to-all of 4 ranks below 4 KB
GB200 = Machine("GB200, BF16 peak", 2500e12, 8.0e12, 900e9, 10.7e-6)


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
    """Predicted cost of one node on one rank; `wire_bytes` leave the rank."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    wire_bytes: float = 0.0
    is_collective: bool = False

    def seconds(self, machine: Machine) -> float:
        """By the machine's peaks."""
        if self.is_collective:
            return machine.collective_latency_s + self.wire_bytes / machine.link_bytes_per_s
        return max(self.flops / machine.flops_per_s, self.hbm_bytes / machine.hbm_bytes_per_s)


def predict_costs(
    graph: fx.Graph, workload: Workload, layout: HelixLayout, tokens_per_block: int, rank: int = 0
) -> dict[str, NodeCost]:
    """Cost of every node of a lowered body, or of the graph around them, on `rank`, by name; calls of bodies cost nothing here.

    Raises:
        HelixError: a move is left: its bytes are those of the collective that lowering makes of it.
    """
    sizes = _Sizes(workload, layout, tokens_per_block, rank)
    return {node.name: _cost(node, sizes) for node in graph.nodes}


@dataclass(frozen=True)
class _Sizes:
    """Sizes of values at a workload: symbols stand for B, T and S by the hints they were captured with."""

    workload: Workload
    layout: HelixLayout
    tokens_per_block: int
    rank: int

    def of(self, node: Any) -> list[int]:
        return [self.number(s) for s in node.meta["val"].shape]

    def numel(self, node: Any) -> int:
        return math.prod(self.of(node))

    def nbytes(self, node: Any) -> int:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return sum(math.prod(map(self.number, v.shape)) * v.dtype.itemsize for v in value)
        return self.numel(node) * value.dtype.itemsize if isinstance(value, Tensor) else 0

    def number(self, size: int | torch.SymInt) -> int:
        return size_at_step(size, self.workload.batch, self.workload.tokens, self.workload.context)

    def local_context(self, decode: fx.Node) -> int:
        """Cached tokens of a sequence on this rank that some new token sees, the new ones included."""
        oldest, context = 0, self.workload.context
        if (first := decode.kwargs.get("first")) is not None:
            window, chunk = reach_of_input(input_ref(first).name)
            oldest = max(0, context + 1 - window) if window else context // chunk * chunk
            if input_ref(first).ring:
                return context + self.workload.tokens - oldest
        return self._held(context + self.workload.tokens) - self._held(oldest)

    def _held(self, length: int) -> int:
        kvp_rank = self.layout.index("kvp", self.rank)
        return int(local_length(length, kvp_rank, self.layout.kvp, self.tokens_per_block))


def _cost(node: fx.Node, sizes: _Sizes) -> NodeCost:
    if node.op != "call_function" or node.target is WAIT:
        return NodeCost()
    if node.target in MOVES:
        raise HelixError(f"node `{node.name}` ({node.target}) is a move; predict the costs of the lowered graph")
    if is_collective(node):
        return _collective(node, sizes)
    if helix_op(node) == "mla_decode":
        return _mla_decode(node, sizes)
    if helix_op(node) == "gqa_decode":
        return _gqa_decode(node, sizes)
    if helix_op(node) == "cache_append":
        return NodeCost(hbm_bytes=2 * sum(sizes.nbytes(n) for n in node.args[4:6]))
    if helix_op(node) == "embed_rows" or node.target is aten.embedding.default:  # rows of tokens, not the table
        return NodeCost(hbm_bytes=2 * sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.args[:2] if _is_ids(n)))
    if helix_op(node) == "moe_experts":
        return _moe_experts(node, sizes)
    if not isinstance(_first(node.meta.get("val")), Tensor):
        return NodeCost()
    if is_layout_op(node) and node.target not in _COPIES:
        return NodeCost()
    moved = sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.all_input_nodes)
    return NodeCost(_flops(node, sizes), moved)


def _is_ids(node: Any) -> bool:
    return not node.meta["val"].dtype.is_floating_point


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _flops(node: fx.Node, sizes: _Sizes) -> float:
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


def _mla_decode(node: fx.Node, sizes: _Sizes) -> NodeCost:
    """Every new token against this rank's part of the context: scores over R + r channels, values over R."""
    B, T, H, R = sizes.of(node.args[0])
    width, item = sizes.of(node.args[2])[-1], node.args[2].meta["val"].dtype.itemsize
    local = sizes.local_context(node)
    moved = sizes.nbytes(node) + sum(sizes.nbytes(n) for n in node.args[:2])
    return NodeCost(2.0 * B * T * H * local * (width + R), moved + B * local * width * item)


def _gqa_decode(node: fx.Node, sizes: _Sizes) -> NodeCost:
    """Every new token against this rank's part of the context: K and V of a KV head are read once for its group."""
    (B, T, H, Dk), (*_, K, Dv) = sizes.of(node.args[0]), sizes.of(node.args[2])
    local, item = sizes.local_context(node), node.args[2].meta["val"].dtype.itemsize
    moved = sizes.nbytes(node) + sizes.nbytes(node.args[0])
    return NodeCost(2.0 * B * T * H * local * (Dk + Dv), moved + B * local * K * (Dk + Dv) * item)


def _moe_experts(node: fx.Node, sizes: _Sizes) -> NodeCost:
    """Tokens spread evenly over the experts; the weights of those that some token chose are read."""
    x, ids, gate_up, down = (node.args[i] for i in (0, 1, 3, 4))
    tokens, top_k = sizes.of(ids)
    experts, _, width, D = sizes.of(gate_up)
    total = experts * sizes.layout.ep
    hit = 1.0 - (1.0 - top_k / total) ** tokens
    flops = 6.0 * tokens * top_k / sizes.layout.ep * width * D
    weights = hit * (sizes.nbytes(gate_up) + sizes.nbytes(down))
    return NodeCost(flops, weights + sizes.nbytes(x) + sizes.nbytes(node))


def _collective(node: fx.Node, sizes: _Sizes) -> NodeCost:
    peers = sizes.layout.size(node.args[-1])
    sent = COLLECTIVE_OF[node.target].egress(peers, sizes.nbytes(node.args[0]))
    return NodeCost(wire_bytes=float(sent), is_collective=True)
