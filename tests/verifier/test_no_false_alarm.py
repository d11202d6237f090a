"""verify() says nothing against any legal plan. Here on two models; drawn models are in the slow tier."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.plans import ModelCase, PlanCase, plans

FIXED = st.sampled_from([ModelCase(), ModelCase(heads=8, q_lora=None, dense=0, shared=2, yarn=True)])


@pytest.mark.slow
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
@given(plans(FIXED))
def test_silent_on_legal_plans(case: PlanCase) -> None:
    case.check()


def test_a_case_prints_the_line_that_runs_it() -> None:
    case = PlanCase(ModelCase(), (("cp", 2),), (1,), (1,), False, 0)
    assert eval(repr(case), {"PlanCase": PlanCase, "ModelCase": ModelCase}) == case
