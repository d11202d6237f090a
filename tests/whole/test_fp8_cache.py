"""A cache in FP8 computes what the unmodified model computes from entries that are rounded in the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.errors import PlanError
from tests.support.driver import worst_deviation
from tests.support.fp8 import CacheRounding, Rounding, poison, rounded_reference, to_nearest, toward_zero, without_clamp
from tests.support.models import tiny_model
from tests.support.numerics import LIMIT

RAGGED = [6, 11, 9]
STEPS = (1, 2, 5, 1)
SCALES = (0.004, 0.03)  # one a layer of "short"; at the first 448 * scale = 1.8: many entries lie beyond


def deviation(model: Any, plan: dict[str, Any], rounding: CacheRounding, steps: tuple[int, ...] = STEPS) -> float:
    compiled = helix_compile(model, max_seq_len=256, **plan)
    poison(compiled)  # what nobody has written is NaN
    return worst_deviation(model, compiled, RAGGED, steps, rounded_reference(model, rounding))


slow = pytest.mark.slow
E4M3: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": SCALES}


@pytest.mark.parametrize(
    "plan",
    [
        {"cp": 1},
        {"cp": 3, "tokens_per_block": 2},
        pytest.param({"cp": 2, "tpa": 2, "tokens_per_block": 3, "q_proj": "gather", "v_up": "before"}, marks=slow),
        pytest.param({"cp": 4, "tokens_per_block": 1, "merge": "ag_rs"}, marks=slow),
    ],
    ids=str,
)
def test_mla_in_fp8_e4m3(plan: dict[str, Any]) -> None:
    assert deviation(tiny_model("short"), {**plan, **E4M3}, CacheRounding(SCALES)) <= LIMIT[torch.float64]


def test_the_default_scale_is_1() -> None:
    plan = {"cp": 2, "cache_dtype": "fp8_e4m3"}
    assert deviation(tiny_model("short"), plan, CacheRounding(1.0), (1,)) <= LIMIT[torch.float64]


@pytest.mark.parametrize(
    ("scales", "rounding"),
    [(0.004, to_nearest), (SCALES, toward_zero), (SCALES, without_clamp)],
    ids=["another scale in the second layer", "toward zero", "no clamp"],
)
def test_the_oracle_tells_another_rounding(scales: Any, rounding: Rounding) -> None:
    plan = {"cp": 2, **E4M3}
    assert deviation(tiny_model("short"), plan, CacheRounding(scales, rounding), (1,)) > 1e-4


def test_what_has_no_effect_or_does_not_fit_is_refused() -> None:
    model = tiny_model("short")
    with pytest.raises(PlanError, match=r"cache_scale=0\.5 has no effect at cache_dtype='fp8_ds_mla'"):
        helix_compile(model, cp=2, cache_dtype="fp8_ds_mla", cache_scale=0.5)
    with pytest.raises(PlanError, match="cache_scale: got 3 numbers, expected one, or 2"):
        helix_compile(model, cp=2, cache_dtype="fp8_e4m3", cache_scale=[1.0, 2.0, 3.0])
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "1", []):
        with pytest.raises(PlanError, match="option cache_scale="):
            helix_compile(model, cp=2, cache_dtype="fp8_e4m3", cache_scale=wrong)
