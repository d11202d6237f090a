"""helix_passes(): the only place that states the order of the passes, and why it is this one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import PAGE_SIZE
from helix_compile.ir.graph import erase_unused, input_ref, node_named, placeholders
from helix_compile.ir.shapes import fake_mode_of
from helix_compile.ir.stage import bodies_of, copy_module
from helix_compile.kernels.registry import Capacity
from helix_compile.kernels.target import KernelTarget
from helix_compile.passes.lower.collectives import lower_pass, no_moves_left
from helix_compile.passes.lower.fuse_kernels import fuse_kernels
from helix_compile.passes.lower.select_kernels import select_kernels
from helix_compile.passes.rewrite.attention import shard_attention_pass
from helix_compile.passes.rewrite.ffn import shard_ffn_pass
from helix_compile.passes.rewrite.outer import rewire_outer_pass, update_calls_pass
from helix_compile.passes.rewrite.reshard import reshard_pass
from helix_compile.passes.runner import Check, GraphPass, PassResult
from helix_compile.passes.typing.check_layouts import check_layouts
from helix_compile.plan.cache_row import cache_shape, pages_per_sequence
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import LayerMatch

STAGES = ("captured", "attention", "reshard", "ffn", "lowered")


def helix_passes(
    captured: CapturedGraph, matches: dict[str, LayerMatch], plan: HelixPlan, target: KernelTarget | None = None
) -> list[GraphPass]:
    """Every pass in order, bound to its matches and plan. Without a target compute ops keep their references."""
    layout, names = plan.layout, list(matches)
    examples = {n: _examples(captured.bodies[n].graph, matches[n], plan) for n in names}
    common: dict[str, dict[str, Any]] = {
        n: {"match": matches[n], "plan": plan.body(n), "layout": layout} for n in names
    }
    sites = {n: len(matches[n].attentions) for n in names}
    outer = partial(
        rewire_outer_pass,
        before={n: [input_ref(p) for p in placeholders(b.graph)] for n, b in captured.bodies.items()},
        prefixes={layer.index: layer.prefix for layer in captured.layers},
        caches={layer.index: layer.caches for layer in captured.layers},
        plan=plan,
    )
    lower = partial(_lower, target=target, capacity=capacity_of(plan))
    typed = {n: partial(check_layouts, plan=plan.body(n), degrees=layout) for n in names}
    return [
        GraphPass(
            "attention",
            {
                n: (
                    partial(
                        shard_attention_pass,
                        **common[n],
                        step_inputs={k: examples[n][k] for k in ("slots", "visible", "page_table")},
                        caches=examples[n]["caches"],
                    ),
                    sites[n],
                )
                for n in names
            },
            outer,
            typed,
        ),
        # after attention: its gather of heads becomes o_proj columns + one all_reduce
        GraphPass(
            "reshard", {n: (partial(reshard_pass, **common[n]), sites[n]) for n in names}, update_calls_pass, typed
        ),
        # after reshard: both leave partial sums behind a row-parallel linear, by the same rule
        GraphPass(
            "ffn",
            {
                n: (
                    partial(shard_ffn_pass, **common[n], ep_rank=examples[n]["ep_rank"]),
                    len(matches[n].dense_ffns) + len(matches[n].moes),
                )
                for n in names
            },
            update_calls_pass,
            typed,
        ),
        # last: until here graphs speak of moves, so that golden graphs and diffs stay readable
        GraphPass(
            "lowered",
            {n: (lower, len(plan.body(n).collectives)) for n in names},
            ensures={n: partial(_is_lowered, typed=typed[n]) for n in names},
        ),
    ]


def capacity_of(plan: HelixPlan) -> Capacity:
    """Sizes that a graph leaves open and its kernels' grids are made for."""
    slots = pages_per_sequence(plan.options, plan.layout.kvp) * PAGE_SIZE
    return Capacity(plan.options.max_batch_size, slots)


def _lower(gm: fx.GraphModule, *, target: KernelTarget | None, capacity: Capacity) -> PassResult:
    """Moves first: only then does an exchange stand where a kernel may write into its buffer."""
    result = lower_pass(gm)
    if target is not None:
        import helix_compile.kernels.catalog  # noqa: F401  needs Triton, and is slow the first time

        select_kernels(gm.graph, target, capacity)
        # after selection: what is fused are kernels of the same provider
        fuse_kernels(gm.graph, target, capacity)
        erase_unused(gm.graph, keep=placeholders(gm.graph))
    return result


def _is_lowered(gm: fx.GraphModule, *, typed: Check) -> None:
    no_moves_left(gm)
    typed(gm)


def lowered_copy(stage: fx.GraphModule) -> fx.GraphModule:
    """A runnable copy of an earlier stage: its moves lowered, nothing else changed."""
    copy = copy_module(stage)
    for body in bodies_of(copy).values():
        lower_pass(body)
        body.recompile()
    return copy


def _examples(graph: fx.Graph, match: LayerMatch, plan: HelixPlan) -> dict[str, Any]:
    """Values that stand for the step's inputs and caches while shapes are propagated."""
    hidden = placeholders(graph)[0].meta["val"]
    B, T = hidden.shape[:2]
    pages = pages_per_sequence(plan.options, plan.layout.kvp)
    with fake_mode_of(graph):
        empty = partial(torch.empty, device=hidden.device)
        caches = [
            empty(cache_shape(a.cache, plan.options, plan.layout), dtype=node_named(graph, a.new[0]).meta["val"].dtype)
            for a in match.attentions
        ]
        return {
            "slots": empty((B, T), dtype=torch.int64),
            "visible": empty((B, T), dtype=torch.int32),
            "page_table": empty((B, pages), dtype=torch.int64),
            "ep_rank": empty((), dtype=torch.int64),
            "caches": caches,
        }
