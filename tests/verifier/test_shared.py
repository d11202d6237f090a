"""verify() of layers that read what an earlier layer caches: a clean module is ok, each fault is found by the check that must find it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from helix_compile import helix_compile, verify
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.verifier import verify as verification
from helix_compile.verifier.mutants.mutant import A2A, SHARED_CATALOGUE
from helix_compile.verifier.mutants.self_test import awkward_shared

# what each must be found by; in a world that runs nodes in order a value that does not wait is the same value
EXPECTED = {
    "a shared layer reads its neighbour's cache": ("HX109", "HX402"),
    "a shared layer reads before the new tokens are in": ("HX109", "HX402"),
    "what a layer hands on does not wait for its append": ("HX102", "HX109"),
}
BY_NAME = {m.name: m for m in SHARED_CATALOGUE}


@cache
def awkward(dtype: torch.dtype) -> tuple[Any, CapturedGraph]:
    model = awkward_shared(dtype)
    return model, capture(model)


def test_the_expectations_name_every_mutant() -> None:
    assert set(EXPECTED) == set(BY_NAME)


@pytest.mark.parametrize("name", ["", *EXPECTED], ids=lambda name: name or "clean")
def test_a_fault_is_found_by_the_check_that_must_find_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured = awkward(torch.float64)
    monkeypatch.setattr(verification, "capture", lambda *args, **kwargs: captured)
    options = {**(BY_NAME[name].options if name else A2A), "max_seq_len": 96}
    compiled = helix_compile(captured, world="virtual", **options)
    if name:
        BY_NAME[name].apply(compiled)
        monkeypatch.setattr(verification, "check_steps", lambda subject: None)
    report = verify(compiled, model)
    assert {f.code for f in report.findings} >= set(EXPECTED.get(name, ())), report
    assert report.ok == (not name), report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["", *EXPECTED], ids=lambda name: name or "clean")
def test_in_every_dtype(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured = awkward(dtype)
    monkeypatch.setattr(verification, "capture", lambda *args, **kwargs: captured)
    compiled = helix_compile(captured, world="virtual", **(BY_NAME[name].options if name else A2A))
    if name:
        BY_NAME[name].apply(compiled)
    report = verify(compiled, model)
    assert {f.code for f in report.findings} >= set(EXPECTED.get(name, ())), report
    assert report.ok == (not name), report
