"""Two compiled modules of one model: the same steps, compared with each other; the layouts of both.

The weights of either get the same edits that make faults matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from helix_compile.capture.captured import CapturedGraph, CapturedLayer
from helix_compile.capture.shared import with_shared
from helix_compile.errors import HelixError
from helix_compile.ir.graph import input_ref, is_param, placeholders
from helix_compile.ir.stage import body_of
from helix_compile.layout.placement import normal_form, parse_layout
from helix_compile.module import HelixModule
from helix_compile.passes.match.layers import match_layers
from helix_compile.passes.pipeline import STAGES
from helix_compile.verifier.bisect.replay import Side, bisect_pair
from helix_compile.verifier.numeric import choice_check
from helix_compile.verifier.numeric.indexers import SiteChoice
from helix_compile.verifier.numeric.layer_run import CapturedReference
from helix_compile.verifier.numeric.reference import edited
from helix_compile.verifier.numeric.routing import Choices, topk_hook
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.sharpen import Edits, sharpening
from helix_compile.verifier.numeric.steps import (
    Batch,
    Outcome,
    Pool,
    Scenario,
    batches,
    both,
    check_ranks,
    run_scenario,
    scenarios,
    stage_params,
)
from helix_compile.verifier.report import Check, Finding, Progress, fault, numeric_finding
from helix_compile.verifier.static.graph import TypedGraph, malformed, type_graph

# largest deviation over the largest logit; in 16 bits both sides round, each by about 1e-2
PAIR_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
FIRST, SECOND = "first module", "second module"


class _SecondFails(Exception):
    """The second module can't be compared with: its findings say why."""


@dataclass
class _ModuleReference:
    """The second module in the place of the original; what is wrong with itself goes to `findings`."""

    follows: ClassVar[bool] = False  # it chooses keys itself
    scratch: Scratch
    where: str
    findings: list[Finding] = field(default_factory=list)
    selections: list[SiteChoice] = field(default_factory=list)
    number: int = -1

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None, told: Sequence[Tensor] = ()) -> Tensor:
        self.number += 1
        recorder = choice_check.ChoiceRecorder(self.scratch.graph, len(self.scratch.params))
        hook = both(recorder, topk_hook(Choices() if choices is None else choices, with_scores=True))
        before = tuple(self.scratch.lengths)
        where, kept = f"{SECOND}, {self.where}", mask.bool()
        try:
            logits = self.scratch.step(ids, mask, hook)
        except Exception as error:  # whatever breaks in a module under test is a finding
            self.findings.append(fault(error, f"{where}, step {self.number}"))
            raise _SecondFails from error
        self._choose(recorder, before, mask, f"{where}, step {self.number}")
        self.findings += check_ranks(logits, kept, where, self.number, self.scratch.params)
        if not torch.isfinite(logits[0][kept]).all():
            at = f"{where}, step {self.number}"
            self.findings.append(numeric_finding("HX406", at, "NaN or inf logits", "finite logits", 5))
        if self.findings:
            raise _SecondFails
        return logits[0].double()

    def _choose(self, recorder: choice_check.ChoiceRecorder, before: tuple[int, ...], mask: Tensor, where: str) -> None:
        """Which keys its own ranks chose."""
        plan = self.scratch.compiled.plan
        queries = choice_check.Queries(before, mask, plan.layout, plan.options.tokens_per_block)
        results = choice_check.step_choices(recorder.sites, recorder.layers, queries, plan, {})
        self.findings += choice_check.step_findings(results, queries, {}, where)
        self.selections = [
            # without scores nothing is a near tie
            SiteChoice(c.keys.double() if c.scores is None else c.scores, c.keys)
            for site, c in results
            if site.nodes.chooses
        ]


@dataclass
class _Pair:
    """The two modules, the edits that condition both, and their layouts as far as they could be inferred."""

    modules: tuple[HelixModule, HelixModule]
    edits: Edits
    typed: list[TypedGraph | None] = field(default_factory=list)

    def scratches(self, scenario: Scenario, seeds: tuple[int, int]) -> list[Scratch]:
        """Fresh caches for both; the edits are made on copies of what each rank holds: a wrong shard stays wrong."""
        return [
            Scratch(
                module,
                module.graph,
                [edited(p, self.edits) for p in stage_params(module, module.graph, STAGES[-1])],
                len(scenario.lengths),
                scenario.capacity,
                seed,
            )
            for module, seed in zip(self.modules, seeds, strict=True)
        ]


def check_pair(compiled: HelixModule, other: HelixModule, seed: int, say: Progress) -> Check:
    """Two modules of one model on the same steps; layouts of both."""
    _check_comparable(compiled, other)
    check = Check([compiled.plan.dtype])
    check.coverage.ranks = len(compiled.ranks)
    pair = _Pair((compiled, other), {})
    broken = False
    for name, module in ((FIRST, compiled), (SECOND, other)):
        say(f"static: layouts of the {name}")
        unrunnable = malformed(module.graph)
        typed = None if unrunnable else check.guarded(name, partial(_typed, module))
        found = unrunnable or (typed.findings if typed is not None else [])
        check.findings += [replace(f, where=f"{name}, {f.where}") for f in found]
        check.coverage.nodes_typed += typed.nodes if typed is not None else 0
        pair.typed.append(typed)
        broken |= bool(unrunnable)
    if broken:
        return check
    _condition(pair, seed, check, say)
    runs, notes = scenarios(compiled, sum(t.numel() for t in compiled.ranks[0].params.values()))
    check.notes += notes
    check.coverage.stages.append(STAGES[-1])
    check.coverage.limit = PAIR_LIMIT[getattr(torch, compiled.plan.dtype)]
    room = other.plan.options
    for scenario in runs:
        if scenario.capacity > room.max_seq_len or len(scenario.lengths) > room.max_batch_size:
            check.notes.append(f"{scenario.name} left out: the {SECOND} has room for less")
            continue
        say(f"numeric: {scenario.name}")
        outcome = check.guarded(scenario.name, partial(_run, pair, scenario, seed, check))
        if outcome is not None:
            check.findings += outcome.findings
            check.notes += outcome.notes
            check.coverage.largest_deviation = max(check.coverage.largest_deviation, outcome.worst)
        if outcome is None or outcome.findings:
            break  # the first that deviates is the one to look at
    return check


def _check_comparable(compiled: HelixModule, other: HelixModule) -> None:
    for what in ("vocab_size", "cache_widths", "latent_widths"):
        mine, theirs = getattr(compiled.facts, what), getattr(other.facts, what)
        if mine != theirs:
            raise HelixError(f"verify: two modules of different models: {what} is {mine} and {theirs}")
    formats = [(m.plan.options.cache_dtype, m.plan.options.cache_scale) for m in (compiled, other)]
    if formats[0] != formats[1]:
        raise HelixError(
            f"verify: two modules whose caches round otherwise: (cache_dtype, cache_scale) is {formats[0]} and {formats[1]}; compile "
            "both with the same, or compare each with the original"
        )
    if compiled.plan.dtype != other.plan.dtype:
        raise HelixError(
            f"verify: two modules in {compiled.plan.dtype} and {other.plan.dtype}; compile both in one dtype"
        )
    if other.device.type == "meta":
        raise HelixError(f"verify: the {SECOND} is on the meta device: it has no weights to compare with")


def _condition(pair: _Pair, seed: int, check: Check, say: Progress) -> None:
    say("numeric: weights that make faults matter")
    before = len(check.findings)
    edits = check.guarded("conditioning", lambda: shared_edits(pair.modules, seed))
    pair.edits = edits or {}
    check.coverage.conditioned = bool(edits)
    if edits is None and len(check.findings) == before:
        check.notes.append(
            "weights are as they are: neither module has the original's, which conditioning is measured on (both were "
            "reloaded). A fault that changes little may hide; compare with a module that was compiled here"
        )


def _typed(module: HelixModule) -> TypedGraph:
    """Without the original, how parameters lie is taken from the plan."""
    plan, layouts = module.plan, {}
    for call in [n for n in module.graph.graph.nodes if n.op == "call_module"]:
        body = body_of(module.graph, call.target)
        for node, argument in zip(placeholders(body.graph), call.args, strict=False):
            shard = plan.body(str(call.target)).shard(input_ref(node).name) if is_param(node) else None
            if shard is not None and isinstance(argument, fx.Node):
                layouts[input_ref(argument).name] = normal_form(parse_layout(shard.layout), plan.layout)
    return type_graph(module.graph, dict(module.ranks[0].params), layouts, plan.layout)


def _run(pair: _Pair, scenario: Scenario, seed: int, check: Check) -> Outcome:
    most = min(module.plan.longest_step for module in pair.modules)
    steps = batches(scenario, pair.modules[0].facts.vocab_size, seed, most)
    mine, theirs = pair.scratches(scenario, (seed, seed + 1))  # pages lie otherwise
    second = _ModuleReference(theirs, scenario.name)
    outcome = Outcome(failing_step=None)
    try:
        outcome = run_scenario(mine, second, None, steps, scenario.name, check.coverage, Pool(), check.coverage.limit)
    except _SecondFails:
        outcome.failing_step = second.number
    outcome.findings = [_spoken(f) for f in outcome.findings] + second.findings
    if outcome.findings and outcome.failing_step is not None:
        outcome.findings = _located(pair, scenario, seed, steps, outcome)
    return outcome


def _spoken(finding: Finding) -> Finding:
    """A finding of run_scenario() in words for two modules: there is no original here."""
    if finding.code == "HX401":
        got = finding.got.replace("logits off", "the first module's logits are off")
        got += " of the second module's"
        return replace(finding, code="HX409", got=got)
    if finding.code == "HX408" or (finding.code == "HX410" and "original" in finding.expected):
        got = f"{FIRST}: {finding.got}"
        return replace(finding, got=got, expected="the second module's choice")
    return replace(finding, where=f"{FIRST}, {finding.where}")


def _located(pair: _Pair, scenario: Scenario, seed: int, steps: list[Batch], outcome: Outcome) -> list[Finding]:
    """The findings with the layer and node where the two start to differ."""
    assert outcome.failing_step is not None
    first, second = map(Side, pair.scratches(scenario, (seed, seed)), pair.typed)
    try:
        found = bisect_pair(first, second, steps, outcome.failing_step)
    except Exception:  # a module that can't be replayed has its finding already
        return outcome.findings
    if found is None:
        return outcome.findings
    located, place = found
    return [located.named(replace(f, where=f"{f.where}, {place}")) for f in outcome.findings]


# spread of scores in 16 bits, where both sides round and nothing tells how much of it is the model's own: two legal
# plans of a four-layer model were 0.04 of the largest logit apart at 2, and 0.11 at the 6 that a single module gets
PAIR_SPREAD = 2.0


def shared_edits(modules: tuple[HelixModule, HelixModule], seed: int) -> Edits | None:
    """Edits by full parameter name, measured on the original weights of the first module that has them.

    None: neither has them (both were reloaded).
    """
    source = next((m for m in modules if m.facts.originals and "captured" in m.stages), None)
    if source is None:
        return None
    captured = captured_of(source)
    whole = {n: _wide(t) for n, t in source.facts.originals.items()}
    matches = match_layers(captured, source.plan.options.max_seq_len, source.plan.options.unmatched == "keep")
    spread = PAIR_SPREAD if captured.dtype.itemsize == 2 else None
    return sharpening(CapturedReference(captured, matches, whole), seed, spread)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float64) if tensor.is_floating_point() else tensor.cpu()


def captured_of(compiled: HelixModule) -> CapturedGraph:
    """The captured graph that a module was made from, put together again from its first stage."""
    graph = compiled.stages["captured"]
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    return CapturedGraph(
        graph=graph,
        layers=with_shared(graph, [_layer(graph, call) for call in calls]),
        dtype=getattr(torch, compiled.plan.dtype),
        max_positions=None,
        vocab_size=compiled.facts.vocab_size,
        model_name=compiled.plan.model,
        model=None,
    )


def _layer(graph: fx.GraphModule, call: fx.Node) -> CapturedLayer:
    """A layer's prefix and caches, read from what its call is given."""
    body = body_of(graph, call.target)
    prefix, sites = "", []
    for node, argument in zip(placeholders(body.graph), call.args, strict=True):
        kind, name = input_ref(argument)  # a layer's number is none
        if is_param(node):
            prefix = name.removesuffix(input_ref(node).name)
        elif kind == "past":
            sites.append(int(name.rpartition("_")[2]))
    return CapturedLayer(call.meta["layer"], prefix, str(call.target), tuple(dict.fromkeys(sites)))
