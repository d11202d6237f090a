"""The numeric half of verify(): a module, the original in fp64 beside it, each kind of layer and every stage."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from helix_compile.capture.captured import CapturedGraph, source_of
from helix_compile.capture.leaves import bind_leaves
from helix_compile.ir.graph import input_ref, placeholders
from helix_compile.ir.stage import uncut
from helix_compile.layout.placement import normal_form, parse_layout
from helix_compile.module import HelixModule
from helix_compile.passes.pipeline import STAGES, lowered_copy
from helix_compile.plan.matches import HandedSelection, LayerMatch
from helix_compile.runtime.rank import originals
from helix_compile.verifier.bisect.replay import bisect_step
from helix_compile.verifier.layer_check import LayerOutcome, cases, check_layer, layers_to_check, pooled_finding
from helix_compile.verifier.numeric.cache_format import CacheFormat
from helix_compile.verifier.numeric.held_entries import HeldEntries
from helix_compile.verifier.numeric.layer_run import CapturedReference
from helix_compile.verifier.numeric.reference import EagerReference, apply_edits, edited, wide_copy
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.sharpen import sharpening
from helix_compile.verifier.numeric.steps import (
    RATIO,
    Batch,
    Outcome,
    Pool,
    Scenario,
    batches,
    limit_of,
    run_scenario,
    scenarios,
    stage_params,
)
from helix_compile.verifier.report import Check, Finding, Progress, numeric_finding
from helix_compile.verifier.static.graph import TypedGraph, type_graph

DRAWS_16_BIT = 8  # seeds that the 1.25x rule is pooled over


# the captured graph against the model, both in fp64: equal to rounding (measured 1e-15) but for float32 models, where a
# cast to float32 on purpose can't be told from the model's own dtype and stays narrow (measured up to 2e-6)
CAPTURE_GAP, CAPTURE_GAP_FLOAT32 = 1e-10, 1e-5


class Subject:
    """The module under test, and the original in fp64 with weights that sharpen attention."""

    def __init__(
        self,
        compiled: HelixModule,
        model: nn.Module,
        captured: CapturedGraph,
        matches: dict[str, LayerMatch],
        typed: TypedGraph,
        seed: int,
        say: Progress,
        check: Check,
    ):
        self.compiled, self.typed, self.seed = compiled, typed, seed
        self.say, self.check = say, check
        self.dtype: torch.dtype = getattr(torch, compiled.plan.dtype)
        self.plain = wide_copy(model)
        weights = {**originals(self.plain), **captured.constants}
        self.reference = CapturedReference(_of(captured, self.plain), matches, weights)
        self.edits = sharpening(self.reference, seed)
        apply_edits(weights, self.edits)
        check.coverage.conditioned = bool(self.edits)
        self.own_model, self.own = None, None
        if limit_of(compiled.plan) is None:  # in 16 bits the original's own rounding is the yardstick
            self.own_model = copy.deepcopy(model)
            own_weights = {**originals(self.own_model), **captured.constants}
            apply_edits(own_weights, self.edits)
            self.own = CapturedReference(_of(captured, self.own_model), matches, own_weights, wide=False)

    @property
    def sources(self) -> dict[int, int]:
        """Layer -> the layer that chooses the keys that it attends to, where an earlier one does."""
        captured, found = self.reference.captured, {}
        for call in captured.graph.graph.nodes:
            match = self.reference.matches.get(str(call.target)) if call.op == "call_module" else None
            if match is None:
                continue
            handed = {a.selection.indices for a in match.attentions if isinstance(a.selection, HandedSelection)}
            for node, argument in zip(placeholders(captured.bodies[match.body].graph), call.args, strict=True):
                source = source_of(argument) if node.name in handed else None
                if source is not None:
                    found[call.meta["layer"]] = source[0].meta["layer"]
        return found

    def eager(self, model: nn.Module, scratch: Scratch) -> EagerReference:
        """A copy of the original with an empty cache, beside the ranks that take the same steps on `scratch`."""
        captured = self.reference.captured
        sites = {layer.index: layer.caches[0] for layer in captured.layers if layer.caches}
        held = HeldEntries(scratch, sites) if scratch.format.rounds else None
        return EagerReference(model, [leaf.name for leaf in captured.leaves], held)

    def params(self, graph: fx.GraphModule, stage: str) -> list[dict[str, Tensor]]:
        """Each rank's parameters with the edits made on copies of its own tensors: a wrong shard stays wrong."""
        held = stage_params(self.compiled, graph, stage)
        return [edited(params, self.edits) for params in held]


def _of(captured: CapturedGraph, model: nn.Module) -> CapturedGraph:
    """The capture with `model`'s own modules as its leaves."""
    return replace(captured, graph=bind_leaves(captured.graph, model), model=model)


def check_layers(subject: Subject) -> None:
    """First and last layer of each body on needle keys."""
    compiled, reference, check = subject.compiled, subject.reference, subject.check
    params = subject.params(compiled.graph, STAGES[-1])
    draws = DRAWS_16_BIT if subject.own is not None else 1
    failed: set[str] = set()
    for layer in layers_to_check(reference):
        body = str(reference.call(layer).target)
        if body in failed:
            continue  # the first layer of this body has told what is wrong
        layouts = subject.typed.layouts.get(body, {})
        outcome = LayerOutcome()
        for number, case in enumerate(cases(compiled, reference.matches[body])):
            subject.say(f"numeric: layer {layer}, context {max(case.lengths)}")
            # in 16 bits the short context is drawn several times: the rule is on the pool
            for draw in range(draws if number == 0 else 1):
                seed = subject.seed + draw
                room = max(case.lengths) + case.T
                scratch = Scratch(compiled, compiled.graph, params, len(case.lengths), room, seed)
                if not outcome.findings:
                    check_layer(scratch, reference, subject.own, layer, case, layouts, check.coverage, outcome, seed)
        where = f"layer {layer} ({body})"
        found = outcome.findings or pooled_finding(outcome, where, draws)
        failed |= {body} if found else set()
        check.findings += found
        check.notes += outcome.notes


def check_steps(subject: Subject) -> None:
    """Every stage over a ragged prompt and steps, the last also to a full cache."""
    compiled, check = subject.compiled, subject.check
    limit = limit_of(compiled.plan)
    check.coverage.limit = limit if limit is not None else RATIO
    runs, notes = scenarios(compiled, sum(p.numel() for p in subject.plain.parameters()))
    check.notes += notes
    if compiled.ranks[0].leaves and any(r.idle for r in runs):
        runs = [replace(r, idle=False) for r in runs]
        check.notes.append(
            "no sequence sits out a step: the original's own layers with a state take padding behind a prompt as tokens"
        )
    stages = [n for n in uncut(compiled.stages) if n != STAGES[0] and (n == STAGES[-1] or compiled.facts.originals)]
    if len(stages) < len(STAGES) - 1:
        check.notes.append(f"a reloaded module holds the weights of {STAGES[-1]!r} only: the other stages were not run")
    for stage in stages:
        check.coverage.stages.append(stage)
        for scenario in runs if stage == STAGES[-1] else runs[:1]:
            subject.say(f"numeric: stage {stage}, {scenario.name}")
            found = check.guarded(f"stage {stage}", partial(_stage, subject, stage, scenario))
            if found is None or found:
                # the first stage that deviates is the one to look at: what follows from it is not said again
                known = sorted((f for f in check.findings if f.family), key=lambda f: f.check != "static")
                guess = known[0].family if known else 0
                check.findings += [replace(f, family=guess or f.family) for f in found or []]
                return


def _stage(subject: Subject, stage: str, scenario: Scenario) -> list[Finding]:
    compiled, check = subject.compiled, subject.check
    last = stage == STAGES[-1]
    where = f"stage {stage}, {scenario.name}"
    graph = compiled.graph if last else lowered_copy(compiled.stages[stage])
    params = subject.params(graph, stage)
    pool, rows = Pool(), len(scenario.lengths)
    draws = DRAWS_16_BIT if subject.own is not None and last and scenario.name == "ragged" else 1
    for draw in range(draws):
        seed = subject.seed + draw
        steps = batches(scenario, compiled.facts.vocab_size, seed, compiled.plan.longest_step)[: None if last else 3]
        scratch = Scratch(compiled, graph, params, rows, scenario.capacity, seed)
        own = subject.eager(subject.own_model, scratch) if subject.own_model is not None else None
        eager, sources = subject.eager(subject.plain, scratch), subject.sources
        outcome = run_scenario(scratch, eager, own, steps, where, check.coverage, pool, sources=sources)
        check.notes += outcome.notes
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
        if outcome.findings:
            return _located(subject, stage, graph, params, scenario, steps, seed, outcome)
    if subject.own is not None and last:
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, pool.ratio)
        if pool.ratio > RATIO:
            return [numeric_finding("HX401", where, pool.text(draws), f"at most {RATIO} times")]
    return []


def _located(
    subject: Subject,
    stage: str,
    graph: fx.GraphModule,
    params: list[dict[str, Tensor]],
    scenario: Scenario,
    steps: list[Batch],
    seed: int,
    outcome: Outcome,
) -> list[Finding]:
    """The findings of a step with the layer and node where the deviation starts."""
    assert outcome.failing_step is not None
    if CacheFormat.of(subject.compiled).rounds:
        return outcome.findings  # the captured graph, which tells nodes apart, caches entries as they are
    typed = subject.typed if stage == STAGES[-1] else _typed_stage(subject.compiled, graph, params)
    scratch = Scratch(subject.compiled, graph, params, len(scenario.lengths), scenario.capacity, seed)
    try:
        located, layer, gap = bisect_step(
            scratch,
            subject.eager(subject.plain, scratch),
            subject.reference,
            typed,
            steps,
            outcome.failing_step,
            subject.sources,
        )
    except Exception:
        return outcome.findings
    if gap > (CAPTURE_GAP_FLOAT32 if subject.dtype is torch.float32 else CAPTURE_GAP):
        got = f"its logits are off by {gap:.2e} of the largest, both in float64"
        finding = numeric_finding("HX407", f"stage captured, {scenario.name}", got, "the model's logits")
        return [finding, *outcome.findings]
    if located is None:
        return outcome.findings
    place = "outer graph" if layer is None else f"layer {layer}"
    return [located.named(replace(f, where=f"{f.where}, {place}")) for f in outcome.findings]


def _typed_stage(compiled: HelixModule, graph: fx.GraphModule, params: list[dict[str, Tensor]]) -> TypedGraph:
    """Layouts of an earlier stage: only what it has cut lies in parts."""
    cut = {input_ref(n).name for n in placeholders(graph.graph) if n.meta.get("sharded")}
    layouts = {
        name: normal_form(parse_layout(shard.layout), compiled.plan.layout)
        for name, (_, shard) in compiled.facts.shards.items()
        if name in cut
    }
    return type_graph(graph, params[0], layouts, compiled.plan.layout)
