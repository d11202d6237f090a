"""Latent attention in unusual styles matches, or is refused with the reason that applies; near-misses are refused."""

from __future__ import annotations

import pytest
import torch

from helix_compile import MatchError, verify
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import toy_model


@pytest.mark.parametrize("style", ["cat", "heads_last", "fused_a", "eager", "no_rope"])
def test_a_style_that_matches_computes_the_same(style: str) -> None:
    model = toy_model(style)
    run = run_family(model, compiled_family(model, 4))
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"cp": 1}, {"cp": 2, "tpa": 2}, {"cp": 4, "q_proj": "gather", "merge": "ag_rs", "v_up": "before"}],
    ids=str,
)
def test_without_rope_under_every_option(options: dict) -> None:
    model = toy_model("no_rope")
    compiled = compiled_family(model, **options)
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
    assert verify(compiled, model).ok


@pytest.mark.parametrize(
    "style", ["cat", *(pytest.param(s, marks=pytest.mark.slow) for s in ("heads_last", "fused_a", "eager"))]
)
@pytest.mark.parametrize(
    ("miss", "reason"),
    [
        ("rope_per_head", "the rope part differs per head"),
        ("v_elsewhere", "the input of the linear that makes V is not what the layer caches|no part of K derives"),
        ("scaled_keys", "the score chain holds"),
        ("two_sinks", r"score chain holds `aten\.cat\.default` \(sinks"),
    ],
)
def test_a_near_miss_is_refused(style: str, miss: str, reason: str) -> None:
    with pytest.raises(MatchError, match=reason) as caught:
        compiled_family(toy_model(style, miss), 2)
    assert "layer 0" in str(caught.value) and "at node" in str(caught.value)
