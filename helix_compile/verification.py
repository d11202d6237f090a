"""verify(compiled, model): is the rewritten module the original model? Three ways, none of which trusts the passes.

    static    layouts of the finished graph inferred again from what the ranks hold; parameters against the original
              weights; collectives, work, ownership, rank order
    numeric   every stage over many steps against a deep fp64 copy of the original; each kind of layer on needle keys
    bisect    a deviation is followed to the first value that differs

Nothing is written: the steps run on scratch caches, the weights that sharpen attention are copies.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture import CapturedGraph, capture
from helix_compile.compile import helix_compile
from helix_compile.errors import HelixError
from helix_compile.matches import LayerMatch
from helix_compile.model_source import converted_copy
from helix_compile.module import HelixModule
from helix_compile.params import originals
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.passes.match_layers import match_layers
from helix_compile.passes.pipeline import STAGES, lowered_copy
from helix_compile.placement import normal_form, parse_layout
from helix_compile.verifier import static_plan
from helix_compile.verifier.conditioning import sharpening
from helix_compile.verifier.import_check import check_import
from helix_compile.verifier.layer_check import (
    LayerOutcome,
    cases,
    check_layer,
    layers_to_check,
    pooled_finding,
)
from helix_compile.verifier.layer_run import CapturedReference
from helix_compile.verifier.numeric import (
    LIMIT,
    RATIO,
    Batch,
    Outcome,
    Pool,
    Scenario,
    batches,
    fault,
    run_scenario,
    scenarios,
    stage_params,
)
from helix_compile.verifier.reference import EagerReference, apply_edits, wide_copy
from helix_compile.verifier.report import Coverage, Finding, VerificationReport, unique
from helix_compile.verifier.routing import Choices, topk_hook
from helix_compile.verifier.scratch import Scratch
from helix_compile.verifier.static_graph import TypedGraph, type_graph
from helix_compile.verifier.static_params import check_params
from helix_compile.verifier.step_bisect import bisect_step

Progress = Callable[[str], None]
DRAWS_16_BIT = 8  # seeds that the 1.25x rule is pooled over
# two modules of one model: largest deviation over the largest logit; in 16 bits both round, each by about 1e-2
PAIR_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


def verify(
    compiled: HelixModule,
    model: nn.Module | HelixModule,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerificationReport:
    """Check that `compiled` computes what `model` computes.

    Args:
        compiled: as it is now: edited graphs and parameters are what is checked.
        model: the unmodified original, or another HelixModule of the same model to compare with.
        dtype: torch.float64 compiles the same plan in fp64 too and holds it to 1e-10.
        seed: of tokens, hidden states and needles.
        progress: called with the name of each check when it starts.

    Returns:
        VerificationReport: `.ok`, `.findings`, `.coverage`; print it.

    Raises:
        HelixError: what is asked can't be done (wrong types, another dtype than float64). A fault of the module under
            test is never raised: it is a finding.
    """
    _check_arguments(compiled, model, dtype)
    started = time.perf_counter()
    say = progress or (lambda text: None)
    if isinstance(model, HelixModule):
        check: _Check = _pair(compiled, model, seed, say)
    else:
        check = _single(compiled, model, seed, say)
        if dtype is torch.float64 and compiled.plan.dtype != "float64":
            say("the same plan in float64")
            check.merge(_recompiled(compiled, model, seed, say))
    return VerificationReport(
        findings=unique(check.findings),
        notes=tuple(dict.fromkeys(check.notes)),
        coverage=check.coverage,
        model=compiled.plan.model,
        dtype=" and ".join(check.dtypes),
        seconds=time.perf_counter() - started,
    )


def assert_equivalent(
    compiled: HelixModule, model: nn.Module | HelixModule, **options: Any
) -> None:
    """For your own tests: AssertionError with the whole report unless verify(compiled, model, **options) is ok."""
    report = verify(compiled, model, **options)
    assert report.ok, f"\n{report}"


@dataclass
class _Check:
    """What accumulates while verifying."""

    dtypes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def merge(self, other: _Check) -> None:
        self.dtypes += other.dtypes
        self.findings += [replace(f, where=f"{other.dtypes[0]}: {f.where}") for f in other.findings]
        self.notes += [f"in {other.dtypes[0]}: {n}" for n in other.notes]
        for name in ("steps", "tokens", "needles", "empty_shards", "unequal_shards"):
            total = getattr(self.coverage, name) + getattr(other.coverage, name)
            setattr(self.coverage, name, total)


def _check_arguments(compiled: Any, model: Any, dtype: Any) -> None:
    if not isinstance(compiled, HelixModule):
        raise HelixError(
            f"verify: the first argument must be a HelixModule, got {type(compiled).__name__}"
        )
    if not isinstance(model, (nn.Module, HelixModule)):
        raise HelixError(
            f"verify: the second argument must be the original model or another HelixModule, got "
            f"{type(model).__name__}"
        )
    if dtype not in (None, torch.float64):
        raise HelixError(
            f"verify: dtype may be None (the module's own, {compiled.plan.dtype}) or torch.float64, got {dtype!r}"
        )
    if compiled.device.type == "meta":
        raise HelixError("verify: the module is on the meta device: it has no weights to check")


def _single(compiled: HelixModule, model: nn.Module, seed: int, say: Progress) -> _Check:
    check = _Check([compiled.plan.dtype])
    own_dtype = getattr(torch, compiled.plan.dtype)
    check.coverage.ranks = len(compiled.ranks)
    say("static: parameters, layouts, collectives")
    same = model if model.dtype == own_dtype else converted_copy(model, own_dtype)
    captured = capture(same, owner=model)
    matches = match_layers(captured, compiled.plan.options.max_seq_len)
    typed = _guarded(check, "static", partial(_static, compiled, same, matches, check))
    typed = typed or TypedGraph(compiled.graph)
    say("numeric: a deep copy of the original in float64")
    subject = _Subject(compiled, same, captured, matches, typed, seed, say, check)
    _guarded(check, "layers", partial(_layers, subject))
    _guarded(check, "steps", partial(_steps, subject))
    return check


def _static(
    compiled: HelixModule, model: nn.Module, matches: dict[str, LayerMatch], check: _Check
) -> TypedGraph:
    plan, graph = compiled.plan, compiled.graph
    held = [rank.params for rank in compiled.ranks]
    whole = {n: t.to(compiled.device) for n, t in originals(model).items()}
    names = [n.meta["input"][1] for n in placeholders(graph.graph) if is_param(n)]
    params = check_params(names, held, whole, compiled.facts.shards, plan.layout)
    typed = type_graph(graph, dict(held[0]), params.layouts, plan.layout)
    found = [*static_plan.check_plan(plan, matches, len(held)), *params.findings, *typed.findings]
    checks: list[Callable[[], list[Finding]]] = [
        lambda: static_plan.check_collectives(graph, plan, matches),
        lambda: static_plan.check_work(typed.module, plan, matches, whole),
        lambda: static_plan.check_ledger(graph, plan),
        lambda: static_plan.check_mesh(compiled.world.mesh.groups, plan.layout),
        lambda: static_plan.check_rank_order(graph, plan, matches, compiled.world),
        lambda: check_import(compiled),
    ]
    for run in checks:
        try:
            found += run()
        except (
            Exception
        ) as error:  # a plan or graph so broken that a check can't read it is a finding
            got = f"{type(error).__name__}: {error}"
            found.append(Finding("HX302", "static check", got, "a plan and graph that can be read"))
    check.findings += found
    check.coverage.nodes_typed = typed.nodes
    check.coverage.parameters = len(names)
    return typed


class _Subject:
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
        check: _Check,
    ):
        self.compiled, self.typed, self.seed, self.say, self.check = (
            compiled,
            typed,
            seed,
            say,
            check,
        )
        self.dtype: torch.dtype = getattr(torch, compiled.plan.dtype)
        self.plain = wide_copy(model, {})
        weights = dict(originals(self.plain))
        self.reference = CapturedReference(captured, matches, weights)
        self.edits = sharpening(self.reference, seed)
        apply_edits(weights, self.edits)
        self.own_model, self.own = None, None
        if LIMIT.get(self.dtype) is None:  # in 16 bits the original's own rounding is the yardstick
            self.own_model = copy.deepcopy(model)
            own_weights = dict(originals(self.own_model))
            apply_edits(own_weights, self.edits)
            self.own = CapturedReference(captured, matches, own_weights, wide=False)

    def params(self, graph: fx.GraphModule, stage: str) -> list[dict[str, Tensor]]:
        """Each rank's parameters with the edits made on copies of its own tensors: a wrong shard stays wrong."""
        return [
            {
                n: self.edits[n](t.clone()).to(t.dtype) if n in self.edits else t
                for n, t in p.items()
            }
            for p in stage_params(self.compiled, graph, stage)
        ]


def _layers(subject: _Subject) -> None:
    """First and last layer of each body on needle keys."""
    compiled, reference, check = subject.compiled, subject.reference, subject.check
    params = subject.params(compiled.graph, STAGES[-1])
    draws = DRAWS_16_BIT if subject.own is not None else 1
    for layer in layers_to_check(reference):
        body = str(reference.call(layer).target)
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
                    check_layer(
                        scratch,
                        reference,
                        subject.own,
                        layer,
                        case,
                        layouts,
                        check.coverage,
                        outcome,
                        seed,
                    )
        where = f"layer {layer} ({body})"
        check.findings += outcome.findings or pooled_finding(outcome, where, draws)
        check.notes += outcome.notes


def _steps(subject: _Subject) -> None:
    """Every stage over a ragged prompt and steps, the last also to a full cache."""
    compiled, check = subject.compiled, subject.check
    limit = LIMIT.get(subject.dtype)
    check.coverage.limit = limit if limit is not None else RATIO
    runs, notes = scenarios(compiled, sum(p.numel() for p in subject.plain.parameters()))
    check.notes += notes
    stages = [
        n
        for n in STAGES[1:]
        if n in compiled.stages and (n == STAGES[-1] or compiled.facts.originals)
    ]
    if len(stages) < len(STAGES) - 1:
        check.notes.append(
            f"a reloaded module holds the weights of {STAGES[-1]!r} only: the other stages were not run"
        )
    for stage in stages:
        check.coverage.stages.append(stage)
        for scenario in runs if stage == STAGES[-1] else runs[:1]:
            subject.say(f"numeric: stage {stage}, {scenario.name}")
            found = _guarded(check, f"stage {stage}", partial(_stage, subject, stage, scenario))
            if found is None or found:
                # the first stage that deviates is the one to look at: what follows from it is not said again
                check.findings += found or []
                return


def _stage(subject: _Subject, stage: str, scenario: Scenario) -> list[Finding]:
    compiled, check = subject.compiled, subject.check
    last = stage == STAGES[-1]
    where = f"stage {stage}, {scenario.name}"
    graph = compiled.graph if last else lowered_copy(compiled.stages[stage])
    params = subject.params(graph, stage)
    pool, rows = Pool(), len(scenario.lengths)
    draws = DRAWS_16_BIT if subject.own is not None and last and scenario.name == "ragged" else 1
    for draw in range(draws):
        seed = subject.seed + draw
        steps = batches(scenario, compiled.facts.vocab_size, seed)[: None if last else 3]
        scratch = Scratch(compiled, graph, params, rows, scenario.capacity, seed)
        own = EagerReference(subject.own_model) if subject.own is not None else None
        outcome = run_scenario(
            scratch, EagerReference(subject.plain), own, steps, where, check.coverage, pool
        )
        check.notes += outcome.notes
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
        if outcome.findings:
            return _located(subject, stage, graph, params, scenario, steps, seed, outcome)
    if subject.own is not None and last:
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, pool.ratio)
        if pool.ratio > RATIO:
            got = f"rel-RMSE {pool.rel_rmse:.2e}, {pool.ratio:.2f} times the original's own, over {draws} draws"
            return [Finding("HX401", where, got, f"at most {RATIO} times", 0, "numeric")]
    return []


def _located(
    subject: _Subject,
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
    typed = subject.typed if stage == STAGES[-1] else _typed_stage(subject.compiled, graph, params)
    scratch = Scratch(
        subject.compiled, graph, params, len(scenario.lengths), scenario.capacity, seed
    )
    try:
        located, layer = bisect_step(
            scratch,
            EagerReference(subject.plain),
            subject.reference,
            typed,
            steps,
            outcome.failing_step,
        )
    except Exception:
        return outcome.findings
    if located is None:
        return outcome.findings
    place = "outer graph" if layer is None else f"layer {layer}"
    return [located.named(replace(f, where=f"{f.where}, {place}")) for f in outcome.findings]


def _typed_stage(
    compiled: HelixModule, graph: fx.GraphModule, params: list[dict[str, Tensor]]
) -> TypedGraph:
    """Layouts of an earlier stage: only what it has cut lies in parts."""
    cut = {n.meta["input"][1] for n in placeholders(graph.graph) if n.meta.get("sharded")}
    layouts = {
        name: normal_form(parse_layout(shard.layout), compiled.plan.layout)
        for name, (_, shard) in compiled.facts.shards.items()
        if name in cut
    }
    return type_graph(graph, params[0], layouts, compiled.plan.layout)


def _recompiled(compiled: HelixModule, model: nn.Module, seed: int, say: Progress) -> _Check:
    """The same decisions in fp64, from the original's weights: what rounding hides shows at 1e-10."""
    plan = compiled.plan
    asked = {f.name: getattr(plan.options, f.name) for f in fields(plan.options)}
    if asked["cp"] > 1:
        asked["v_up"] = plan.bodies[0].attentions[0].v_up  # "auto" depends on the dtype
    return _single(
        helix_compile(model, dtype=torch.float64, world="virtual", **asked), model, seed, say
    )


@dataclass
class _ModuleReference:
    """Another compiled module in the place of the original."""

    scratch: Scratch

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None) -> Tensor:
        hook = topk_hook(choices, with_scores=True) if choices is not None else None
        return self.scratch.step(ids, mask, hook)[0].double()


def _pair(compiled: HelixModule, other: HelixModule, seed: int, say: Progress) -> _Check:
    """Two modules of one model on the same steps; layouts of both."""
    for what in ("vocab_size", "cache_widths"):
        mine, theirs = getattr(compiled.facts, what), getattr(other.facts, what)
        if mine != theirs:
            raise HelixError(
                f"verify: two modules of different models: {what} is {mine} and {theirs}"
            )
    if compiled.plan.dtype != other.plan.dtype:
        raise HelixError(
            f"verify: two modules in {compiled.plan.dtype} and {other.plan.dtype}; compile both in one dtype"
        )
    check = _Check([compiled.plan.dtype])
    check.coverage.ranks = len(compiled.ranks)
    dtype = getattr(torch, compiled.plan.dtype)
    for name, module in (("first", compiled), ("second", other)):
        say(f"static: layouts of the {name} module")
        layouts = {
            n: normal_form(parse_layout(s.layout), module.plan.layout)
            for n, (_, s) in module.facts.shards.items()
        }
        typed = _guarded(
            check,
            f"{name} module",
            partial(
                type_graph, module.graph, dict(module.ranks[0].params), layouts, module.plan.layout
            ),
        )
        if typed is not None:
            check.findings += [
                replace(f, where=f"{name} module, {f.where}") for f in typed.findings
            ]
            check.coverage.nodes_typed += typed.nodes
    longest = min(compiled.plan.options.max_seq_len, other.plan.options.max_seq_len)
    size = sum(t.numel() for t in compiled.ranks[0].params.values())
    runs, notes = scenarios(compiled, size)
    check.notes += notes
    check.coverage.stages.append(STAGES[-1])
    check.coverage.limit = PAIR_LIMIT[dtype]
    for scenario in runs:
        rows = min(len(scenario.lengths), other.plan.options.max_batch_size)
        if scenario.capacity > longest or rows < len(scenario.lengths):
            check.notes.append(f"{scenario.name} left out: the second module has room for less")
            continue
        say(f"numeric: {scenario.name}")
        scratch = Scratch(
            compiled,
            compiled.graph,
            stage_params(compiled, compiled.graph, STAGES[-1]),
            rows,
            scenario.capacity,
            seed,
        )
        second = Scratch(
            other,
            other.graph,
            stage_params(other, other.graph, STAGES[-1]),
            rows,
            scenario.capacity,
            seed + 1,
        )
        outcome = _guarded(
            check,
            scenario.name,
            partial(
                run_scenario,
                scratch,
                _ModuleReference(second),
                None,
                batches(scenario, compiled.facts.vocab_size, seed),
                scenario.name,
                check.coverage,
                Pool(),
                PAIR_LIMIT[dtype],
            ),
        )
        if outcome is not None:
            check.findings += outcome.findings
            check.notes += outcome.notes
            check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
    return check


def _guarded(check: _Check, where: str, run: Callable[[], Any]) -> Any:
    """run(), or None and a finding: whatever the module under test makes a check do, verify() does not raise."""
    try:
        return run()
    except Exception as error:
        check.findings.append(fault(error, where))
        return None
