"""Which kernels a plan selects on an architecture, without a device: the cases that the offline compiler takes.

model on meta -> capture, match, plan -> lowered graph for an arch -> for each kernel node the CompileCases of its site
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.compile import PlannedModel, rewrite_model
from helix_compile.errors import LoweringUnavailable
from helix_compile.ir.graph import helix_op, inputs_of
from helix_compile.ir.sizes import size_at
from helix_compile.ir.stage import body_of
from helix_compile.kernels.registry import CompileCase, Site, kernel_of
from helix_compile.kernels.target import KernelTarget
from helix_compile.passes.lower.select_kernels import KERNEL, PROVIDER, capacity_of, site_of
from helix_compile.passes.pipeline import LOWERED
from helix_compile.plan.helix_plan import HelixPlan

ATTENTION = "mla_decode"


@dataclass(frozen=True)
class Selection:
    """What computes a plan's ops on one architecture.

    Attributes:
        cases: to compile, each once.
        references: (body, op, reason) of each op whose torch reference runs.
    """

    cases: tuple[CompileCase, ...]
    references: tuple[tuple[str, str, str], ...]


def selected_cases(model: PlannedModel, target: KernelTarget) -> Selection:
    """The cases of every kernel in the graph that is lowered for `target`, for a decode step of a full batch (T = 1).

    What compilation depends on decides: two nodes with the same case give one.
    """
    cases: list[CompileCase] = []
    references: list[tuple[str, str, str]] = []
    for body, node in _selected_nodes(model, target):
        provider, reason = node.meta[KERNEL]
        if provider != PROVIDER:
            references.append((body, str(node.target), reason))
            continue
        site = _concrete_site(node, model.plan)
        kernel = kernel_of(site.op)
        assert kernel is not None, f"{node.target} is selected, and not registered"
        cases += [c for c in kernel.cases(site, target) if c not in cases]
    return Selection(tuple(cases), tuple(references))


def attention_site(model: PlannedModel, target: KernelTarget) -> Site:
    """The first mla_decode of the graph that is lowered for `target`, in a decode step of a full batch (T = 1).

    Raises:
        LoweringUnavailable: no node of the graph is one.
    """
    for _, node in _selected_nodes(model, target):
        if helix_op(node) == ATTENTION:
            return _concrete_site(node, model.plan)
    raise LoweringUnavailable(f"{ATTENTION}: no layer of the model is lowered to it; --tune measures {ATTENTION} alone")


def _selected_nodes(model: PlannedModel, target: KernelTarget) -> Iterator[tuple[str, fx.Node]]:
    """(body, node) of every op that a kernel or a reference was selected for."""
    lowered = rewrite_model(model, target)[LOWERED.stage]
    for body in model.plan.bodies:
        yield from ((body.name, n) for n in body_of(lowered, body.name).graph.nodes if KERNEL in n.meta)


def _concrete_site(node: fx.Node, plan: HelixPlan) -> Site:
    site = site_of(node, capacity_of(plan))
    # symbols of the body -> sizes of a decode step: hidden is [B, T, D]
    hidden = inputs_of(node.graph, "hidden")[0].meta["val"]
    known = zip(hidden.shape, (plan.options.max_batch_size, 1), strict=False)
    sizes = {size.node.expr: value for size, value in known if isinstance(size, torch.SymInt)}
    keywords = {name: concrete(a, sizes) for name, a in site.keywords.items()}
    return Site(site.op, tuple(concrete(a, sizes) for a in site.args), site.capacity, keywords)


def concrete(value: Any, sizes: dict[Any, int]) -> Any:
    """An example value with numbers for its symbols; a tensor becomes one on meta with the same strides.

    A launch compiles in what it knows of its integers (1, multiples of 16), so the offline compiler needs integers too.
    """
    if isinstance(value, Tensor):
        shape, stride = ([size_at(s, sizes) for s in of] for of in (value.shape, value.stride()))
        offset = size_at(value.storage_offset(), sizes)
        reach = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        base = torch.empty(max(reach, 1), dtype=value.dtype, device="meta")
        return base.as_strided(shape, stride, offset)
    if isinstance(value, torch.SymInt):
        return size_at(value, sizes)
    if isinstance(value, (list, tuple)):
        return type(value)(concrete(v, sizes) for v in value)
    return value
