"""Compute ops -> the kernels of a target, chosen from the registry by op, architecture, dtype and shape.

What has no kernel keeps its torch reference, and says why: meta["kernel"] = [provider, reason].
"""

from __future__ import annotations

from typing import Any

from torch import fx

import helix_compile.kernels.cpp.mla_decode  # noqa: F401  registers torch.ops.helix_cpp
from helix_compile.config.options import PAGE_SIZE
from helix_compile.ir.graph import is_call
from helix_compile.ir.ops import MOVES, PARTS, UNPACKS, helix
from helix_compile.kernels.registry import Capacity, Site, select_kernel
from helix_compile.kernels.target import KernelTarget
from helix_compile.passes.lower.collectives import lower_pass
from helix_compile.passes.runner import PassContext
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import LayerMatch
from helix_compile.plan.ring import pages_of

KERNEL, PROVIDER = "kernel", "helix_triton"


def lower_to_cpp_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Expand every move of a body, and give it the C++ that there is."""
    assert context.target is not None
    started = lower_pass(gm, match, context)
    select_kernels(gm.graph, context.target, capacity_of(context.plan))
    return started


def capacity_of(plan: HelixPlan) -> Capacity:
    """Sizes that a graph leaves open and its kernels' grids are made for."""
    pages = pages_per_sequence(plan.options, plan.layout.kvp)
    slots = (max(pages, pages_of(plan.options.max_seq_len)) if plan.rings else pages) * PAGE_SIZE
    return Capacity(plan.options.max_batch_size, slots)


def select_kernels(graph: fx.Graph, target: KernelTarget, capacity: Capacity) -> None:
    """Give every helix:: compute op of `graph` the provider's op, or the reason why it stays as it is."""
    for node in graph.nodes:
        if is_compute_op(node):
            choose(node, target, capacity)


def is_compute_op(node: fx.Node) -> bool:
    """A helix:: op that computes, or packs; what unpacks reads where the collective left it, so it has no kernel, nor has what takes rows."""
    return (
        node.op == "call_function"
        and str(node.target).startswith("helix.")
        and node.target not in (*MOVES, *UNPACKS, *PARTS)
    )


def choose(node: fx.Node, target: KernelTarget, capacity: Capacity) -> bool:
    """Retarget one helix:: op; False where its reference stays.

    What attends to a part of a batch is told of all: the bits of a kernel hang on how many splits it makes.
    """
    choice = select_kernel(site_of(node, capacity), target)
    provider = "reference"
    if choice.kernel is not None:
        node.target = choice.kernel.target
        provider = choice.kernel.target.namespace
        takes_batch = any(a.name == "batch" for a in node.target._schema.arguments)
        if takes_batch and is_call(node.args[0], helix.rows_of_part.default):
            node.kwargs = {**node.kwargs, "batch": node.args[0].args[0]}
    node.meta[KERNEL] = [provider, choice.reason]
    return choice.kernel is not None


def site_of(node: fx.Node, capacity: Capacity) -> Site:
    """What selection sees of a node."""
    args, keywords = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    name = str(node.target).split(".", 1)[1]
    return Site(name.removesuffix(".default"), args, capacity, keywords)


def is_kernel(node: Any, op: str) -> bool:
    """True for a call of the helix_triton:: op of this name ("mla_decode", "pack_heads.splits")."""
    name = op if "." in op else f"{op}.default"
    return isinstance(node, fx.Node) and is_call(node, node.target) and str(node.target) == f"{PROVIDER}.{name}"
