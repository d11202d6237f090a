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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.capture.paths import NOT_COMPARED
from helix_compile.capture.source import converted_copy
from helix_compile.compile import helix_compile, match_model
from helix_compile.errors import HelixError
from helix_compile.ir.graph import input_ref, inputs_of
from helix_compile.module import HelixModule
from helix_compile.plan.matches import LayerMatch
from helix_compile.runtime.rank import follow_edits, originals, shard_of_name
from helix_compile.verifier.numeric.cache_check import check_import
from helix_compile.verifier.numeric.segments_check import check_segments
from helix_compile.verifier.pair import check_pair
from helix_compile.verifier.report import Check, Finding, Progress, VerificationReport, grouped
from helix_compile.verifier.static import choice as static_choice
from helix_compile.verifier.static import plan as static_plan
from helix_compile.verifier.static import ranks as static_ranks
from helix_compile.verifier.static import shared as static_shared
from helix_compile.verifier.static.graph import TypedGraph, every_layer_is_called, malformed, type_graph
from helix_compile.verifier.static.params import check_params
from helix_compile.verifier.subject import Subject, check_layers, check_steps


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
        RuntimeFault: the model that was compiled runs other code since (a hook, a patched function).
        HelixError: what is asked can't be done (wrong types, another dtype than float64, real ranks). A fault of the module under
            test is never raised: it is a finding.
    """
    _check_arguments(compiled, model, dtype)
    if compiled.facts.watch is not None:
        compiled.facts.watch.check_code(model)
        follow_edits(compiled.plan, compiled.graph, compiled.ranks, compiled.facts)
    started = time.perf_counter()
    say = progress or (lambda text: None)
    if isinstance(model, HelixModule):
        check: Check = check_pair(compiled, model, seed, say)
    else:
        model = _on_cpu(model)
        check = _single(compiled, model, seed, say)
        if dtype is torch.float64 and compiled.plan.dtype != "float64":
            say("the same plan in float64")
            check.merge(_recompiled(compiled, model, seed, say))
    return VerificationReport(
        findings=grouped(check.findings),
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


def _check_arguments(compiled: Any, model: Any, dtype: Any) -> None:
    if not isinstance(compiled, HelixModule):
        raise HelixError(f"verify: the first argument must be a HelixModule, got {type(compiled).__name__}")
    if not isinstance(model, (nn.Module, HelixModule)):
        raise HelixError(
            f"verify: the second argument must be the original model or another HelixModule, got {type(model).__name__}"
        )
    if dtype not in (None, torch.float64):
        raise HelixError(
            f"verify: dtype may be None (the module's own, {compiled.plan.dtype}) or torch.float64, got {dtype!r}"
        )
    held, ranks = len(compiled.ranks), compiled.plan.layout.world_size
    if held < ranks:
        raise HelixError(
            f"verify: this process holds {held} of {ranks} ranks, and the checks read the weights and caches of all; "
            'verify in one process: helix_compile(model, ..., world="virtual"), or save() here and '
            'HelixModule.load(folder, world="virtual") there'
        )
    if compiled.device.type == "meta":
        raise HelixError("verify: the module is on the meta device: it has no weights to check")


def _single(compiled: HelixModule, model: nn.Module, seed: int, say: Progress) -> Check:
    check = Check([compiled.plan.dtype])
    own_dtype = getattr(torch, compiled.plan.dtype)
    check.coverage.ranks = len(compiled.ranks)
    check.findings += malformed(compiled.graph)
    if check.findings:
        check.notes.append("nothing else was checked: a graph that is not well formed has no meaning")
        return check
    say("static: parameters, layouts, collectives")
    same = model if model.dtype == own_dtype else converted_copy(model, own_dtype)
    options = compiled.plan.options
    captured, matches = match_model(capture(same, unmatched=options.unmatched), options)
    for note in captured.notes:
        if note.startswith(NOT_COMPARED):
            check.findings.append(Finding("HX504", "capture", note.removeprefix(NOT_COMPARED), "the same at all sizes"))
    typed = check.guarded("static", partial(_static, compiled, same, captured, matches, check))
    typed = typed or TypedGraph(compiled.graph)
    say("numeric: a deep copy of the original in float64")
    subject = Subject(compiled, same, captured, matches, typed, seed, say, check)
    check.guarded("layers", partial(check_layers, subject))
    check.guarded("steps", partial(check_steps, subject))
    if compiled.plan.options.compiles_segments or compiled.plan.options.builds_engines:
        say("numeric: compiled segments against their graphs")
        check.guarded("segments", partial(check_segments, compiled, seed, check))
    return check


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy where it is on a card: the reference is computed on the CPU, in fp64."""
    if all(t.device.type == "cpu" for t in model.parameters()):
        return model
    return copy.deepcopy(model).to("cpu")


def _static(
    compiled: HelixModule, model: nn.Module, captured: CapturedGraph, matches: dict[str, LayerMatch], check: Check
) -> TypedGraph:
    plan, graph, layers = compiled.plan, compiled.graph, captured.layers
    held = [rank.params for rank in compiled.ranks]
    known = {**originals(model), **captured.constants}
    whole = {n: t.to(compiled.device) for n, t in known.items()}
    names = [input_ref(n).name for n in inputs_of(graph.graph, "param")]
    shards = shard_of_name(plan, [(layer.prefix, layer.body) for layer in layers])
    heads = {x.prefix + a.output_weight for x in layers for a in plan.body(x.body).attentions}
    params = check_params(names, held, whole, shards, plan.layout, frozenset(heads))
    shapes = {n: t for n, t in held[0].items() if isinstance(t, Tensor)}
    typed = type_graph(graph, shapes, params.layouts, plan.layout)
    found = [*static_plan.check_plan(plan, matches, len(held), layers), *params.findings, *typed.findings]
    found += every_layer_is_called(graph, captured.all_layers)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: static_plan.check_collectives(graph, plan, matches),
        lambda: static_plan.check_vocabulary(graph, plan, captured),
        lambda: static_plan.check_overlap(graph, plan, matches),
        lambda: static_plan.check_work(typed.module, plan, matches, whole, captured),
        lambda: static_ranks.check_ledger(graph, plan),
        lambda: static_ranks.check_scales(compiled.ranks, plan, len(compiled.facts.caches)),
        lambda: static_ranks.check_reach(graph, plan, matches),
        lambda: static_ranks.check_mesh(compiled.world.mesh.groups, plan.layout),
        lambda: static_ranks.check_rank_order(graph, plan, matches, compiled.world, compiled.device),
        lambda: static_shared.check_caches(graph, captured),
        lambda: static_choice.check_choices(graph, plan, matches, compiled.world, compiled.device),
    ]
    if not compiled.ranks[0].leaves:  # with leaf layers a prefix can't be imported, and is refused
        checks.append(lambda: check_import(compiled))
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


def _recompiled(compiled: HelixModule, model: nn.Module, seed: int, say: Progress) -> Check:
    """The same decisions in fp64, from the original's weights: what rounding hides shows at 1e-10."""
    plan = compiled.plan
    options = plan.options
    if options.builds_engines:
        options = replace(options, lower="reference")  # engines know no float64
    if options.cp > 1:
        options = replace(options, v_up=plan.bodies[0].attentions[0].v_up)  # "auto" depends on the dtype
    return _single(helix_compile(model, options=options, dtype=torch.float64, world="virtual"), model, seed, say)
