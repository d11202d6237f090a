"""verify() of modules whose caches are in FP8: no alarm where they round as they must, one where they don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helix_compile import helix_compile, verify
from helix_compile.verifier.mutants.mutant import FP8_CATALOGUE, Mutant
from helix_compile.verifier.mutants.self_test import awkward_model, awkward_sparse, awkward_windows

SCALES = (0.01, 0.02, 0.03, 0.05)
E4M3: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": SCALES}
DS_MLA: dict[str, Any] = {"cache_dtype": "fp8_ds_mla"}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "plan"),
    [
        (torch.float32, {"cp": 2, "tpa": 2, **E4M3}),
        pytest.param(torch.float64, {"cp": 4, **DS_MLA}, marks=slow),
        pytest.param(torch.float32, {"cp": 3, **DS_MLA}, marks=slow),
        pytest.param(torch.float64, {"cp": 4, **E4M3}, marks=slow),
        pytest.param(torch.bfloat16, {"cp": 4, **E4M3}, marks=slow),
        pytest.param(torch.bfloat16, {"cp": 2, **DS_MLA}, marks=slow),
    ],
    ids=str,
)
def test_no_alarm_on_latents(dtype: torch.dtype, plan: dict[str, Any]) -> None:
    model = awkward_model(dtype)
    report = verify(helix_compile(model, max_seq_len=512, tokens_per_block=4, **plan), model)
    assert report.ok, str(report)


@slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_alarm_on_k_and_v_with_windows_and_sinks(dtype: torch.dtype) -> None:
    model = awkward_windows(dtype)
    plan: dict[str, Any] = {"cp": 2, "tpa": 2, "cache_dtype": "fp8_e4m3", "cache_scale": 0.01}
    report = verify(helix_compile(model, max_seq_len=512, unmatched="keep", **plan), model)
    assert report.ok, str(report)


@slow
@pytest.mark.fresh_capture  # as in tests/whole/test_fp8_cache.py
@pytest.mark.parametrize("plan", [{**E4M3, "cache_scale": 0.02}, DS_MLA], ids=str)
def test_no_alarm_on_index_keys_behind_them(plan: dict[str, Any]) -> None:
    model = awkward_sparse()
    report = verify(helix_compile(model, cp=2, max_seq_len=512, **plan), model)
    assert report.ok, str(report)


# the check that finds it: what is cached, what attention makes of it, or what the plan states
FOUND = {
    "an entry in FP8 is rounded toward zero": "HX404",
    "what lies beyond 448 times the scale is not clamped": "HX404",
    "an entry is times the scale, not divided by it": "HX404",
    "the cache is read without its scale": "HX402",
    "scores are of scaled keys, the output of values that are not": "HX402",
    "the rope part is in FP8 too": "HX404",
    "the latent is rounded by the scale of the step's largest": "HX404",
    "two layers read by each other's scale": "HX109",
    "a rank holds another scale than the plan states": "HX302",
}
IN_CI = ("an entry in FP8 is rounded toward zero", "two layers read by each other's scale")


def test_every_fault_is_here() -> None:
    assert [m.name for m in FP8_CATALOGUE] == [*FOUND]


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=() if m.name in IN_CI else slow) for m in FP8_CATALOGUE], ids=lambda m: m.name
)
def test_a_fault_is_found(mutant: Mutant) -> None:
    model = awkward_model()
    compiled = helix_compile(model, **mutant.options)
    mutant.apply(compiled)
    codes = {f.code for f in verify(compiled, model).findings}
    assert FOUND[mutant.name] in codes
