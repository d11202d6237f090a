"""Compiled segments against their own graphs: what Inductor made of a segment computes what the segment says.

The lowered graph itself is judged node by node; here each call of a segment is run twice on the same tensors, by its code and
node by node, so the first call that differs is the fault, and what follows from it is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.graph import helix_op, input_ref, placeholders
from helix_compile.ir.stage import SEGMENTS
from helix_compile.module import HelixModule
from helix_compile.runtime.segments import SegmentCompiler
from helix_compile.verifier.numeric.scratch import Scratch, running
from helix_compile.verifier.numeric.steps import batches, scenarios
from helix_compile.verifier.report import Check, Finding, numeric_finding
from helix_compile.worlds.program import Program, SegmentCall

# of the largest value: sums in another order; in 16 bits a value that lies between two may be rounded to the other one
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# of the logits, where these differences have gone through all layers
LOGITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
STEPS = 3


class _Deviates(RuntimeFault):
    """A segment's code differs from its graph; the finding is told at the end of the step."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


def check_segments(compiled: HelixModule, seed: int, check: Check) -> None:
    """HX411 for the first call of a segment whose code computes something else than its graph."""
    if SEGMENTS not in compiled.stages:
        return
    stage = compiled.stages[SEGMENTS]
    check.coverage.stages.append(SEGMENTS)
    parameters = sum(t.numel() for rank in compiled.ranks for t in rank.params.values())
    for scenario in scenarios(compiled, max(1, parameters))[0][:1]:
        where = f"stage {SEGMENTS}, {scenario.name}"
        params = [dict(rank.params) for rank in compiled.ranks]  # the very ones: code holds for their strides
        rows = len(scenario.lengths)
        twice, once = (
            Scratch(compiled, g, params, rows, compiled.plan.options.max_seq_len, seed) for g in (stage, compiled.graph)
        )
        compare = _Compare(compiled.segment_compiler, compiled.plan.dtype, where)
        made = batches(scenario, compiled.facts.vocab_size, seed, compiled.plan.longest_step)
        for number, batch in enumerate(made[:STEPS]):
            try:
                logits = _step(twice, batch.ids, batch.mask, compare)
            except _Deviates as deviates:
                check.findings.append(deviates.finding)
                return
            expected = once.step(batch.ids, batch.mask)[0]
            kept = batch.mask.bool()
            off = _deviation(logits[kept], expected[kept]) if kept.any() else 0.0
            # where every call gives its graph's bits, so does the step
            if off > (LOGITS[expected.dtype] if compare.worst else 0.0):
                got = f"logits off by {off:.2e} of the largest, though each segment is right: the step calls them in another way"
                check.findings.append(numeric_finding("HX411", f"{where}, step {number}", got, "the lowered graph's"))
                return
        alike = "bit for bit" if compare.worst == 0 else f"to {compare.worst:.1e} of the largest value"
        check.notes.append(f"compiled segments: {compare.calls} calls equal their graphs {alike}")


def _step(scratch: Scratch, ids: Tensor, mask: Tensor, compare: _Compare) -> Tensor:
    """Logits of rank 0 by the programs that a step runs, on the verifier's caches."""
    compiled = scratch.compiled
    known = scratch.known(ids.to(torch.int64), mask)
    step = {name: tensor.to(compiled.device) for name, tensor in known.items()}
    with running(compiled):
        programs = [
            Program(rank, scratch.graph, _bound(scratch, rank), compare.code) for rank in range(len(scratch.params))
        ]
        logits: Tensor = compiled.world.run_programs(programs, step)[0]
    scratch.lengths = [n + int(new) for n, new in zip(scratch.lengths, mask.sum(dim=1), strict=True)]
    return logits.cpu()


def _bound(scratch: Scratch, rank: int) -> dict[fx.Node, Any]:
    device = scratch.compiled.device
    of_step = scratch.known(torch.zeros(scratch.rows, 1), torch.zeros(scratch.rows, 1))
    values = scratch.inputs_of(rank, dict.fromkeys(of_step))
    pairs = zip(placeholders(scratch.graph.graph), values, strict=True)
    found = {node: value for node, value in pairs if input_ref(node).name not in of_step}
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in found.items()}


class _Compare:
    """Makes of each segment a call that runs its code and its graph."""

    def __init__(self, compiler: SegmentCompiler, dtype: str, where: str):
        self.compiler = compiler
        self.limit, self.where = LIMITS[getattr(torch, dtype)], where
        self.worst, self.calls = 0.0, 0

    def code(self, call: SegmentCall) -> Callable[..., Any]:
        """What a program calls for a segment."""
        compiled = self.compiler.code(call)
        caches = [i for i, p in enumerate(placeholders(call.segment.graph)) if input_ref(p).kind == "cache"]

        def both(*tensors: Tensor) -> Sequence[Any]:
            apart = [t.clone() if i in caches else t for i, t in enumerate(tensors)]
            expected = call.segment(*apart)
            got = compiled(*tensors)
            names = [n.name for n in _returned(call.segment)]
            written = [(placeholders(call.segment.graph)[i].name, tensors[i], apart[i]) for i in caches]
            # candidates are the bits of scores, which sums in another order move; what is chosen shows in the logits
            scored = any(helix_op(n) == "index_scores" for n in call.segment.graph.nodes)
            for name, mine, theirs in [*zip(names, got, expected, strict=True), *written]:
                if mine.dtype.is_floating_point or not scored:
                    self._compare(call, name, mine, theirs)
            self.calls += 1
            return got

        return both

    def _compare(self, call: SegmentCall, name: str, got: Tensor, expected: Tensor) -> None:
        off = _deviation(got, expected)
        self.worst = max(self.worst, off)
        if off > self.limit:
            said = f"`{name}` of the compiled code is off by {off:.2e} of the largest value; the graph, run node by node on the same tensors, is what is expected"
            raise _Deviates(
                numeric_finding("HX411", f"{self.where}, {call.where}, {name}", said, f"at most {self.limit:.0e}")
            )


def _returned(segment: fx.GraphModule) -> Sequence[fx.Node]:
    nodes: Sequence[fx.Node] = next(n for n in segment.graph.nodes if n.op == "output").args[0]
    return nodes


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; what is not finite must be so in both."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return torch.inf
    if got.dtype is torch.float8_e4m3fn:  # torch asks none of them what is finite
        got, expected = got.float(), expected.float()
    if not got.dtype.is_floating_point:
        return 0.0 if torch.equal(got, expected) else torch.inf
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return torch.inf
    if not finite.any():
        return 0.0
    difference = (got[finite].double() - expected[finite].double()).abs().max()
    return float(difference / expected[finite].double().abs().max().clamp(min=torch.finfo(torch.float32).tiny))
