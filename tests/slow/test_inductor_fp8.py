"""Compiled segments beside an FP8 cache: as exact as the oracle in float64; verify() compares cached values too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helix_compile import helix_compile, verify
from helix_compile.verifier.mutants.self_test import awkward_windows
from tests.support.driver import worst_deviation
from tests.support.families import fresh_family
from tests.support.fp8 import CacheRounding, poison, rounded_reference
from tests.support.models import fresh_model
from tests.support.numerics import LIMIT

pytestmark = [pytest.mark.slow, pytest.mark.fresh_capture]
E4M3: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": (0.01, 0.002)}


def windows() -> Any:
    """GPT-OSS: K and V, a window of 21 in one of two layers, sinks."""
    return awkward_windows(torch.float64)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "windows replicated": (windows, {"cp": 2, "window": "replicate", "unmatched": "keep"}, E4M3),
    "windows sharded": (windows, {"cp": 3, "unmatched": "keep"}, E4M3),
    "windows, heads cut": (windows, {"cp": 2, "tpa": 2, "tokens_per_block": 1, "unmatched": "keep"}, E4M3),
    "K and V of another layer": (lambda: fresh_family("gemma4"), {"cp": 4, "window": "replicate"}, E4M3),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_the_model_with_rounded_entries(case: str) -> None:
    """Ragged, T in {1, 2, 5, 14}, NaN in every slot that nobody has written; with another scale the oracle is far off."""
    make, plan, given = CASES[case]
    model = make()
    compiled = helix_compile(model, lower="inductor", max_seq_len=256, **plan, **given)
    scales = given.get("cache_scale")
    for rounding, steps, limit in (
        (CacheRounding(scales), (1, 2, 5, 14, 1), LIMIT[torch.float64]),
        (CacheRounding(0.004), (1,), None),
    ):
        compiled.reset()
        poison(compiled)
        off = worst_deviation(model, compiled, [6, 11, 9], steps, rounded_reference(model, rounding))
        assert off <= limit if limit else off > 1e-4


def test_verify_compares_cached_values_in_fp8() -> None:
    model = fresh_model("short", torch.bfloat16)
    fp8 = {"cache_dtype": "fp8_e4m3", "cache_scale": 0.02}
    compiled = helix_compile(model, cp=2, lower="inductor", max_seq_len=256, **fp8)
    report = verify(compiled, model)
    assert report.ok, report
    assert any("compiled segments" in note for note in report.notes), report
