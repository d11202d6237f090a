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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture import CapturedGraph, capture
from helix_compile.errors import HelixError
from helix_compile.matches import LayerMatch
from helix_compile.model_source import converted_copy
from helix_compile.module import HelixModule
from helix_compile.params import originals
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.passes.match_layers import match_layers
from helix_compile.passes.pipeline import STAGES, lowered_copy
from helix_compile.verifier import static_plan
from helix_compile.verifier.conditioning import sharpening
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
from helix_compile.verifier.scratch import Scratch
from helix_compile.verifier.static_graph import TypedGraph, type_graph
from helix_compile.verifier.static_params import check_params

Progress = Callable[[str], None]
DRAWS_16_BIT = 8  # seeds that the 1.25x rule is pooled over


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


def assert_equivalent(compiled: HelixModule, model: nn.Module | HelixModule, **options: Any) -> None:
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
        self.findings += [_in(f, other.dtypes[0]) for f in other.findings]
        self.notes += [f"in {other.dtypes[0]}: {n}" for n in other.notes]
        for name in ("steps", "tokens", "needles", "empty_shards", "unequal_shards"):
            total = getattr(self.coverage, name) + getattr(other.coverage, name)
            setattr(self.coverage, name, total)


def _in(finding: Finding, dtype: str) -> Finding:
    from dataclasses import replace  # noqa: PLC0415

    return replace(finding, where=f"{dtype}: {finding.where}")


def _check_arguments(compiled: Any, model: Any, dtype: Any) -> None:
    if not isinstance(compiled, HelixModule):
        raise HelixError(f"verify: the first argument must be a HelixModule, got {type(compiled).__name__}")
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
    typed = _static(compiled, same, matches, check)
    _numeric(compiled, same, captured, matches, typed, seed, say, check)
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
    ]
    for run in checks:
        try:
            found += run()
        except Exception as error:  # a plan or graph so broken that a check can't read it is a finding
            got = f"{type(error).__name__}: {error}"
            found.append(Finding("HX302", "static check", got, "a plan and graph that can be read"))
    check.findings += found
    check.coverage.nodes_typed = typed.nodes
    check.coverage.parameters = len(names)
    return typed


def _numeric(
    compiled: HelixModule,
    model: nn.Module,
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    typed: TypedGraph,
    seed: int,
    say: Progress,
    check: _Check,
) -> None:
    dtype = getattr(torch, compiled.plan.dtype)
    say("numeric: a deep copy of the original in float64")
    plain = wide_copy(model, {})
    weights = dict(originals(plain))
    reference = CapturedReference(captured, matches, weights)
    edits = sharpening(reference, seed)
    apply_edits(weights, edits)
    own_model = None
    if LIMIT.get(dtype) is None:
        own_model = copy.deepcopy(model)
        apply_edits(dict(originals(own_model)), edits)
    _layers(compiled, reference, own_model, edits, typed, seed, say, check)
    _steps(compiled, plain, own_model, edits, seed, say, check)


def _edited(params: list[dict[str, Tensor]], edits: Any) -> list[dict[str, Tensor]]:
    """Each rank's parameters with the edits made on copies of its own tensors: a wrong shard stays wrong."""
    return [
        {n: (edits[n](t.clone()).to(t.dtype) if n in edits else t) for n, t in p.items()} for p in params
    ]


def _layers(
    compiled: HelixModule,
    reference: CapturedReference,
    own_model: nn.Module | None,
    edits: Any,
    typed: TypedGraph,
    seed: int,
    say: Progress,
    check: _Check,
) -> None:
    params = _edited(stage_params(compiled, compiled.graph, STAGES[-1]), edits)
    own = None
    if own_model is not None:
        own = CapturedReference(reference.captured, reference.matches, dict(originals(own_model)), wide=False)
    draws = DRAWS_16_BIT if own is not None else 1
    for layer in layers_to_check(reference):
        body = str(reference.call(layer).target)
        outcome = LayerOutcome()
        for number, case in enumerate(cases(compiled, reference.matches[body])):
            say(f"numeric: layer {layer}, context {max(case.lengths)}")
            # in 16 bits the short context is drawn several times: the rule is on the pool
            for draw in range(draws if number == 0 else 1):
                room = max(case.lengths) + case.T
                scratch = Scratch(compiled, compiled.graph, params, len(case.lengths), room, seed)
                check_layer(
                    scratch, reference, own, layer, case, typed.layouts.get(body, {}), check.coverage,
                    outcome, seed + draw,
                )  # fmt: skip
                if outcome.findings:
                    break
            if outcome.findings:
                break
        check.findings += outcome.findings or pooled_finding(outcome, f"layer {layer} ({body})", draws)
        check.notes += outcome.notes


def _steps(
    compiled: HelixModule,
    plain: Any,
    own_model: Any,
    edits: Any,
    seed: int,
    say: Progress,
    check: _Check,
) -> None:
    dtype = getattr(torch, compiled.plan.dtype)
    limit = LIMIT.get(dtype)
    check.coverage.limit = limit if limit is not None else RATIO
    runs, notes = scenarios(compiled, sum(p.numel() for p in plain.parameters()))
    check.notes += notes
    stages = [n for n in STAGES[1:] if n in compiled.stages and (n == STAGES[-1] or compiled.facts.originals)]
    if len(stages) < len(STAGES) - 1:
        check.notes.append(f"a reloaded module holds the weights of {STAGES[-1]!r} only: the other stages were not run")
    failing = []
    for stage in stages:
        check.coverage.stages.append(stage)
        last = stage == STAGES[-1]
        for scenario in runs if last else runs[:1]:
            say(f"numeric: stage {stage}, {scenario.name}")
            found = _stage(compiled, stage, scenario, plain, own_model, edits, seed, check)
            failing += [(stage, f) for f in found]
            if found:
                break
    # the first stage that deviates is the one to look at; what follows from it is not said again
    check.findings += [f for s, f in failing if s == failing[0][0]]


def _stage(
    compiled: HelixModule,
    stage: str,
    scenario: Scenario,
    plain: Any,
    own_model: Any,
    edits: Any,
    seed: int,
    check: _Check,
) -> list[Finding]:
    last = stage == STAGES[-1]
    where = f"stage {stage}, {scenario.name}"
    try:
        graph = compiled.graph if last else lowered_copy(compiled.stages[stage])
        params = _edited(stage_params(compiled, graph, stage), edits)
    except Exception as error:  # an earlier stage that was edited may not lower any more
        return [fault(error, where)]
    pool, outcome = Pool(), None
    draws = DRAWS_16_BIT if own_model is not None and last and scenario.name == "ragged" else 1
    for draw in range(draws):
        scratch = Scratch(compiled, graph, params, len(scenario.lengths), scenario.capacity, seed + draw)
        steps = batches(scenario, compiled.facts.vocab_size, seed + draw)
        if not last:
            steps = steps[:3]
        own = EagerReference(own_model) if own_model is not None else None
        outcome = run_scenario(
            scratch, EagerReference(plain), own, steps, where, check.coverage, pool
        )
        check.notes += outcome.notes
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
        if outcome.findings:
            return outcome.findings
    if own_model is not None and last:
        check.coverage.largest_deviation = max(check.coverage.largest_deviation, pool.ratio)
        if pool.ratio > RATIO:
            got = f"rel-RMSE {pool.rel_rmse:.2e}, {pool.ratio:.2f} times the original's own, over {draws} draws"
            return [Finding("HX401", where, got, f"at most {RATIO} times", 0, "numeric")]
    return []


def _recompiled(compiled: HelixModule, model: nn.Module, seed: int, say: Progress) -> _Check:
    raise NotImplementedError


def _pair(compiled: HelixModule, other: HelixModule, seed: int, say: Progress) -> _Check:
    raise NotImplementedError


def graph_of(stage: fx.GraphModule) -> fx.Graph:
    return stage.graph
