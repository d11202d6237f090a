"""verify() of modules whose caches are in FP8: no alarm where they round as they must, one where they don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helix_compile import helix_compile, verify
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
@pytest.mark.parametrize("plan", [{**E4M3, "cache_scale": 0.02}, DS_MLA], ids=str)
def test_no_alarm_on_index_keys_behind_them(plan: dict[str, Any]) -> None:
    model = awkward_sparse()
    report = verify(helix_compile(model, cp=2, max_seq_len=512, **plan), model)
    assert report.ok, str(report)
