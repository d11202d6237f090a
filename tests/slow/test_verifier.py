"""The verifier on what CI can't hold: drawn models, every mutant in bfloat16, contexts beyond 64K."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from helix_compile import helix_compile, verify
from helix_compile.capture.model import capture
from helix_compile.passes.match.layers import match_layers
from helix_compile.verifier.layer_check import LayerCase, LayerOutcome, check_layer
from helix_compile.verifier.mutants.mutant import CATALOGUE, Mutant
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.report import Check
from helix_compile.verifier.static.graph import TypedGraph
from helix_compile.verifier.subject import Subject
from tests.support.models import tiny_model
from tests.support.plans import ModelCase, PlanCase, plans

pytestmark = pytest.mark.slow


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
@given(plans())
def test_silent_on_legal_plans_of_drawn_models(case: PlanCase) -> None:
    case.check()


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda m: m.name)
def test_caught_in_bfloat16(mutant: Mutant) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    compiled = helix_compile(model, **mutant.options)
    mutant.apply(compiled)
    assert not verify(compiled, model).ok


BEYOND_64K = 66_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fault",
    [
        None,
        "the new token is missing everywhere",
        "plain mean of the parts",
        "base-2 weights from natural-log statistics",
    ],
)
def test_contexts_beyond_64k(dtype: torch.dtype, fault: str | None) -> None:
    """One layer, 8 heads: a clean module passes, and faults that random keys hide at this length are found."""
    case_model = ModelCase(heads=8, dense=1, moe=0, latent=32, rope=8, nope=16, value=16)
    model = case_model.build().to(dtype)
    compiled = helix_compile(model, cp=4, max_seq_len=BEYOND_64K + 8, max_batch_size=1)
    for mutant in CATALOGUE:
        if mutant.name == fault:
            mutant.apply(compiled)
    captured = capture(model)
    check = Check([compiled.plan.dtype])
    subject = Subject(
        compiled, model, captured, match_layers(captured, 1024), TypedGraph(compiled.graph), 0, print, check
    )
    outcome = LayerOutcome()
    params = subject.params(compiled.graph, "lowered")
    scratch = Scratch(compiled, compiled.graph, params, 1, BEYOND_64K + 2)
    case = LayerCase((BEYOND_64K,), 2)
    check_layer(scratch, subject.reference, subject.own, 0, case, {}, check.coverage, outcome, 0)
    assert check.coverage.longest_context > 65_536 and check.coverage.needles
    assert bool(outcome.findings) == (fault is not None), outcome.findings
