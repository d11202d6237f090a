"""Typing rules of what lowering makes: collectives, and the packing around them.

Between a collective and its wait_tensor a value is Pending; only wait_tensor takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import fx
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.layout import HelixLayout
from helix_compile.ops import helix
from helix_compile.passes.typing_rules import Result, Rule, Violation
from helix_compile.placement import Layout, Mark, PartialSoftmax, format_layout

_c10d = torch.ops._c10d_functional
WAIT = _c10d.wait_tensor.default
PENDING = "pending"  # not a mesh axis: marks the layout that a value will have after its wait


class Pending(Mark):
    """Started and not yet waited for."""


class Packed(Mark):
    """Rows of a packed exchange buffer that belong to this rank's heads."""


def _start(layout: Layout) -> Layout:
    return {**layout, PENDING: Pending()}


def _all_reduce(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (op, axis) = of(node.args[0]), node.args[1:3]
    if op != "sum" or x != {axis: Partial("sum")}:
        raise Violation(f"all_reduce({op}) over {axis} of {format_layout(x)}", "collective")
    return _start({})


def _all_gather(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (size, axis) = of(node.args[0]), node.args[1:3]
    if size != degrees.size(axis):
        raise Violation(
            f"all_gather of {size} parts over {axis}, which has {degrees.size(axis)}", "collective"
        )
    if x.get("world") is not None and axis == "kvp":
        # heads over N become heads over tpa: the peers that now stand on dim 0 are the major part of what tpa cuts
        shard = x["world"]
        rest: Layout = {"tpa": Shard(0)}
    else:
        shard, rest = x.get(axis), {a: p for a, p in x.items() if a != axis}  # type: ignore[assignment]
    if not isinstance(shard, (Shard, PartialSoftmax)):
        raise Violation(f"all_gather over {axis} of {format_layout(x)}", "collective")
    return _start(rest)


def _reduce_scatter(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, (op, size, axis) = of(node.args[0]), node.args[1:4]
    key = (
        "world" if degrees.size(axis) == degrees.world_size else axis
    )  # the normal form of an axis with all ranks
    if op != "sum" or size != degrees.size(axis) or x.get(key) != Partial("sum"):
        raise Violation(
            f"reduce_scatter({op}, {size}) over {axis} of {format_layout(x)}", "collective"
        )
    return _start({**x, key: Shard(0)})


def _all_to_all(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, axis = of(node.args[0]), node.args[3]
    if x.get(axis) != PartialSoftmax() or len(node.args[1]) != degrees.size(axis):
        raise Violation(
            f"all_to_all over {axis} of {format_layout(x)} in {len(node.args[1])} parts",
            "collective",
        )
    return _start({"world": Packed()})


def _wait(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x = of(node.args[0])
    if PENDING not in x:
        raise Violation("wait_tensor on a value that no collective is computing", "pending")
    return {a: p for a, p in x.items() if a != PENDING}


def _pack(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    partial_o, lse = (of(a) for a in node.args[:2])
    if partial_o != lse or lse.get("kvp") != PartialSoftmax() or node.args[2] != degrees.kvp:
        raise Violation(
            f"pack of {format_layout(partial_o)} and {format_layout(lse)} for {node.args[2]} peers"
        )
    return {"kvp": PartialSoftmax()}


def _unpack(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    if of(node.args[0]) != {"world": Packed()}:
        raise Violation(f"unpack of {format_layout(of(node.args[0]))}")
    return ({"world": Shard(3)}, {"world": Shard(3)})


LOWERED_RULES: dict[Any, Rule] = {
    _c10d.all_reduce.default: _all_reduce,
    _c10d.all_gather_into_tensor.default: _all_gather,
    _c10d.reduce_scatter_tensor.default: _reduce_scatter,
    _c10d.all_to_all_single.default: _all_to_all,
    _c10d.wait_tensor.default: _wait,
    helix.pack_heads.default: _pack,
    helix.unpack_heads.default: _unpack,
}
