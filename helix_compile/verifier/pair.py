"""Two compiled modules of one model: the same steps, compared with each other; the layouts of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from helix_compile.errors import HelixError
from helix_compile.module import HelixModule
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.passes.pipeline import STAGES
from helix_compile.placement import normal_form, parse_layout
from helix_compile.verifier.check import Check, Progress
from helix_compile.verifier.numeric import (
    Outcome,
    Pool,
    Scenario,
    batches,
    run_scenario,
    scenarios,
    stage_params,
)
from helix_compile.verifier.routing import Choices, topk_hook
from helix_compile.verifier.scratch import Scratch
from helix_compile.verifier.static_graph import TypedGraph, type_graph

# largest deviation over the largest logit; in 16 bits both sides round, each by about 1e-2
PAIR_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class _ModuleReference:
    """Another compiled module in the place of the original."""

    scratch: Scratch

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None) -> Tensor:
        hook = topk_hook(choices, with_scores=True) if choices is not None else None
        return self.scratch.step(ids, mask, hook)[0].double()


def check_pair(compiled: HelixModule, other: HelixModule, seed: int, say: Progress) -> Check:
    """Two modules of one model on the same steps; layouts of both."""
    for what in ("vocab_size", "cache_widths", "latent_widths"):
        mine, theirs = getattr(compiled.facts, what), getattr(other.facts, what)
        if mine != theirs:
            raise HelixError(
                f"verify: two modules of different models: {what} is {mine} and {theirs}"
            )
    if compiled.plan.dtype != other.plan.dtype:
        raise HelixError(
            f"verify: two modules in {compiled.plan.dtype} and {other.plan.dtype}; compile both in one dtype"
        )
    check = Check([compiled.plan.dtype])
    check.coverage.ranks = len(compiled.ranks)
    for name, module in (("first module", compiled), ("second module", other)):
        say(f"static: layouts of the {name}")
        typed = check.guarded(name, partial(_typed, module))
        if typed is not None:
            check.findings += [replace(f, where=f"{name}, {f.where}") for f in typed.findings]
            check.coverage.nodes_typed += typed.nodes
    runs, notes = scenarios(compiled, sum(t.numel() for t in compiled.ranks[0].params.values()))
    check.notes += notes
    check.coverage.stages.append(STAGES[-1])
    check.coverage.limit = PAIR_LIMIT[getattr(torch, compiled.plan.dtype)]
    room = other.plan.options
    for scenario in runs:
        if scenario.capacity > room.max_seq_len or len(scenario.lengths) > room.max_batch_size:
            check.notes.append(f"{scenario.name} left out: the second module has room for less")
            continue
        say(f"numeric: {scenario.name}")
        outcome = check.guarded(
            scenario.name, partial(_run, compiled, other, scenario, seed, check)
        )
        if outcome is not None:
            check.findings += outcome.findings
            check.notes += outcome.notes
            check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
    return check


def _typed(module: HelixModule) -> TypedGraph:
    """Without the original, how parameters lie is taken from the plan."""
    plan, layouts = module.plan, {}
    for call in [n for n in module.graph.graph.nodes if n.op == "call_module"]:
        body = module.graph.get_submodule(str(call.target))
        assert isinstance(body, fx.GraphModule)
        for node, argument in zip(placeholders(body.graph), call.args, strict=False):
            shard = (
                plan.body(str(call.target)).shard(node.meta["input"][1]) if is_param(node) else None
            )
            if shard is not None and isinstance(argument, fx.Node):
                layouts[argument.meta["input"][1]] = normal_form(
                    parse_layout(shard.layout), plan.layout
                )
    return type_graph(module.graph, dict(module.ranks[0].params), layouts, plan.layout)


def _run(
    compiled: HelixModule, other: HelixModule, scenario: Scenario, seed: int, check: Check
) -> Outcome:
    scratches = [
        Scratch(
            module, module.graph, stage_params(module, module.graph, STAGES[-1]), len(scenario.lengths),
            scenario.capacity, seed + number,
        )
        for number, module in enumerate((compiled, other))
    ]  # fmt: skip
    return run_scenario(
        scratches[0], _ModuleReference(scratches[1]), None,
        batches(scenario, compiled.facts.vocab_size, seed), scenario.name, check.coverage, Pool(),
        check.coverage.limit,
    )  # fmt: skip
