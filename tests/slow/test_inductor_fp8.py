"""verify() of compiled segments beside an FP8 cache: they are compared with their graphs, cached values too."""

from __future__ import annotations

import pytest
import torch

from helix_compile import helix_compile, verify
from tests.support.models import fresh_model

pytestmark = pytest.mark.slow


def test_verify_compares_cached_values_in_fp8() -> None:
    model = fresh_model("short", torch.bfloat16)
    fp8 = {"cache_dtype": "fp8_e4m3", "cache_scale": 0.02}
    compiled = helix_compile(model, cp=2, lower="inductor", max_seq_len=256, **fp8)
    report = verify(compiled, model)
    assert report.ok, report
    assert any("compiled segments" in note for note in report.notes), report
