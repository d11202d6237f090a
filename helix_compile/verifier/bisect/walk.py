"""Where a deviation starts: the first value of the ranks that differs from the original's value of the same name.

The passes keep the names of nodes that they do not replace, so a value of the lowered graph has a twin in the captured
one. Shards are joined and partial sums summed by their inferred layout. Nodes between the last values that agree and the
first that does not are the suspects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import helix_op, input_ref
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.matches import LayerMatch, permuted
from helix_compile.verifier.contract import head_places
from helix_compile.verifier.numeric.layer_run import attention_output, fitted, replicas
from helix_compile.verifier.report import Finding

# a value may be this far from its fp64 twin (rel-RMSE) before it counts as wrong, noise of earlier ops included
NOISE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}

Compare = Callable[[fx.Node], tuple[float, int] | None]  # how far a node's value is off, and on which rank


@dataclass(frozen=True)
class Located:
    """The first value that deviates, the rank that has it, and the nodes that may be at fault."""

    node: str
    rank: int
    off: float
    suspects: tuple[str, ...]
    family: int

    def named(self, finding: Finding) -> Finding:
        """The finding with the place added; the family is a guess where the check had none of its own."""
        rank = f", rank {self.rank}" if "rank" not in finding.where else ""
        at = f"; first value that deviates: `{self.node}`{rank} (rel-RMSE {self.off:.1e})"
        if self.suspects:
            at += f", computed by {', '.join(self.suspects)}"
        family = finding.family or self.family
        return replace(finding, where=finding.where + at, family=family)


def first_deviation(
    nodes: Iterable[fx.Node],
    values: list[dict[str, Any]],
    twins: dict[str, Tensor],
    layouts: dict[str, Any],
    degrees: HelixLayout,
    dtype: torch.dtype,
    mask: Tensor,
    match: LayerMatch | None = None,
    joined: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Located | None:
    """Walk a graph in order.

    Args:
        nodes: of a body, or a part of the outer graph.
        values: per rank, node name -> value.
        twins: node name -> what it should be.
        layouts: node name -> inferred layout; nodes without one are not compared.
        mask: [B, T] of the step's tokens; values at padding are not compared.
        match: of the body, if it is one: where zero heads lie among the ranks' own.
        joined: node name -> (value of all ranks together, what it should be), where no layout says how they join.
    """
    sites, known = match.attentions if match is not None else (), joined or {}
    places = {tuple(head_places(a.num_heads, a.cache.heads, degrees)) for a in sites}
    compare = partial(
        _off,
        values=values,
        twins=twins,
        layouts=layouts,
        degrees=degrees,
        mask=mask,
        padded=[p for p in places if None in p],
    )
    return walk(nodes, lambda n: (rel_rmse(*known[n.name], mask), 0) if n.name in known else compare(n), dtype)


def outer_part(graph: fx.Graph, *, before_layers: bool) -> list[fx.Node]:
    """Nodes of the outer graph in front of the layers or behind them; what only layers read is left out."""
    nodes = list(graph.nodes)
    calls = [i for i, n in enumerate(nodes) if n.op == "call_module"]
    part = nodes[: calls[0]] if before_layers else nodes[calls[-1] + 1 :]
    return [n for n in part if n.op != "placeholder" or any(u.op != "call_module" for u in n.users)]


def walk(nodes: Iterable[fx.Node], compare: Compare, dtype: torch.dtype) -> Located | None:
    """The first node in order whose value is off by more than noise; compare() gives None where there is no twin."""
    good: set[fx.Node] = set()
    for node in nodes:
        compared = compare(node)
        if compared is None:
            if node.op in ("placeholder", "get_attr"):
                good.add(node)  # no twin: page table, cache, a rank's part of a weight
            continue
        off, rank = compared
        if off <= NOISE[dtype]:
            good.add(node)
            continue
        suspects = _between(node, good)
        return Located(node.name, rank, off, tuple(f"`{n.name}`" for n in suspects), _family(suspects, off))
    return None


def outer_twins(expected: dict[str, Any]) -> dict[str, Tensor]:
    """Node name -> what it should be, of the original's values in fp64."""
    return {n: v.double() for n, v in expected.items() if isinstance(v, Tensor) and v.is_floating_point()}


def body_twins(graph: fx.Graph, match: LayerMatch, expected: dict[str, Any]) -> dict[str, Tensor]:
    """The same of a body. What the passes added has no twin, but for the merged heads."""
    twins = outer_twins(expected)
    by_name = {n.name: n for n in graph.nodes}
    for attention in match.attentions:
        o_proj, anchor = by_name.get(attention.o_proj), expected.get(attention.anchor)
        if o_proj is not None and isinstance(anchor, Tensor):
            heads = permuted(anchor, attention.form, "BTHV").double()
            twins[attention_output(o_proj, attention).name] = heads.reshape(*heads.shape[:2], -1)
    # the bias of a row-parallel linear is added behind the sum: under the linear's name is another value then
    biased = [a.o_proj for a in match.attentions if a.o_bias]
    biased += [f.down for f in match.dense_ffns if f.down_bias]
    return {name: value for name, value in twins.items() if name not in biased}


def _off(
    node: fx.Node,
    values: list[dict[str, Any]],
    twins: dict[str, Tensor],
    layouts: dict[str, Any],
    degrees: HelixLayout,
    mask: Tensor,
    padded: list[tuple[int | None, ...]],
) -> tuple[float, int] | None:
    twin, layout = twins.get(node.name), layouts.get(node.name)
    parts = [v.get(node.name) for v in values]
    if twin is None or layout is None or isinstance(layout, tuple):
        return None
    if not all(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
        return None
    try:
        whole = replicas(parts, layout, degrees)  # type: ignore[arg-type] # all tensors
    except RuntimeError:  # parts that can't be joined: the static check has said so
        return None
    found = []
    for number, value in enumerate(whole):
        value = value.double()
        same = value.shape == twin.shape
        read = (value,) if same else (fitted(value, twin), *_of_heads(value, padded), value)
        fits = [fit.reshape(twin.shape) for fit in read if fit is not None and fit.numel() == twin.numel()]
        if not fits:
            return None
        # widths that are padded look like heads that are: the reading that is right is the one that fits
        off = min(rel_rmse(fit, twin, mask) for fit in fits)
        found.append((off, number if not layout else 0))
    return worst(found)


def _of_heads(value: Tensor, padded: list[tuple[int | None, ...]]) -> Iterator[Tensor]:
    """The value without its zero heads, for each dim that may hold heads."""
    for places in padded:
        kept = torch.tensor([place for place, head in enumerate(places) if head is not None])
        for dim, size in enumerate(value.shape):
            if size and size % len(places) == 0:
                by_head = value.unflatten(dim, (len(places), -1))
                yield by_head.index_select(dim, kept).flatten(dim, dim + 1)


def worst(found: list[tuple[float, int]]) -> tuple[float, int] | None:
    """The largest (deviation, rank), the first of equal ones."""
    return max(found, key=lambda x: x[0], default=None)


def rel_rmse(value: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """RMS of the difference over that of `wanted`, padding aside; inf where either holds NaN."""
    value, wanted = _unpadded(value, mask).double(), _unpadded(wanted, mask).double()
    norm = float(wanted[wanted.isfinite()].square().sum())
    # equal infinities (masked scores) are equal; a NaN is not
    error = float(torch.where(value == wanted, 0.0, value - wanted).square().sum())
    off = error / norm if norm else error
    return off**0.5 if off == off else float("inf")


def _unpadded(value: Tensor, mask: Tensor) -> Tensor:
    """Rows of real tokens, where the value has a row a token ([B, T, ...], [B * T, ...] or [B, heads, T, ...])."""
    kept = mask.bool()
    if bool(kept.all()):
        return value
    B, T = kept.shape
    if value.shape[:2] == (B, T):
        return value[kept]
    if value.dim() > 1 and value.shape[0] == B * T:
        return value[kept.flatten()]
    if value.dim() == 4 and (value.shape[0], value.shape[2]) == (B, T):
        return value.transpose(1, 2)[kept]
    return value


def _between(node: fx.Node, good: set[fx.Node]) -> list[fx.Node]:
    """The node and those before it, back to values that agree; in order of the graph."""
    found = ancestors([node], until=good)
    return [n for n in node.graph.nodes if n in found][-8:]


_FAMILY = {
    "mla_decode": 4,
    "gqa_decode": 4,
    "apply_sinks": 6,
    "mla_decode_slots": 4,
    "select_slots": 4,
    "merge_lse": 6,
    "rescale_by_lse": 6,
    "unpack_heads": 1,
    "moe_experts": 2,
}


def _family(suspects: list[fx.Node], off: float) -> int:
    """The likeliest family by what was computed between agreement and deviation."""
    if suspects[-1].op == "placeholder":
        return {"param": 2, "tensor": 8}.get(input_ref(suspects[-1]).kind, 0)
    if off == float("inf"):
        return 5
    names = [helix_op(n) for n in suspects]
    for name, family in _FAMILY.items():
        if name in names:
            return 6 if "_decode" in name and "merge_lse" in names else family
    texts = " ".join(str(n.target) for n in suspects)
    if "all_reduce" in texts or "all_gather" in texts or "reduce_scatter" in texts:
        return 10
    if "linear" in texts or "einsum" in texts:
        return 2
    return 8 if "cos" in texts or "position" in texts else 0
