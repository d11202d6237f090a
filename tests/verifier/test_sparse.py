"""verify() of sparse attention: clean modules are ok, each fault is found by the check that must find it, at its node."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, VerificationReport, helix_compile, verify
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.stage import copy_module
from helix_compile.verifier import verify as verification
from helix_compile.verifier.mutants.mutant import A2A, SPARSE_CATALOGUE, Mutant
from helix_compile.verifier.mutants.self_test import awkward_sparse
from tests.support.families import tiny_family
from tests.support.family_run import compiled_family

# what each must be found by
EXPECTED = {
    "an indexer's query sees one slot too many": ("HX410",),
    "the new index key is appended after its query is scored": ("HX410",),
    "relu of the sum over index heads, not of each": ("HX410",),
    "of keys that tie the last ones are kept": ("HX303",),
    "a rank offers k / cp candidates": ("HX303", "HX410"),
    "candidates are named by their local slots": ("HX303", "HX410"),
    "the union of local top-ks: the bound is one rank's": ("HX303", "HX410"),
    "the bound says no position: every key that ties is chosen": ("HX303", "HX410"),
    "the bound of another sequence or query": ("HX303",),  # lists of more than k slots do not run
    "the k-th key itself is left out": ("HX303", "HX410"),
    "a local slot is compared with the position of the bound": ("HX303", "HX410"),
    "a key without a number is not chosen": ("HX303",),
    "a list is read to its end": ("HX402",),
    "T > 1: every query reads the list of the last one": ("HX402",),
    "places of the list are taken for slots": ("HX402",),
    "candidates are not exchanged: each rank attends to its own top-k": ("HX101", "HX105", "HX303", "HX410"),
    "the last rank's candidates are dropped": ("HX303", "HX410"),
    "of tied keys each rank takes the last": ("HX303", "HX410"),
    "a rank offers the last of its tied keys, all ranks together take the first": ("HX303",),
    "-0.0 stands behind 0.0, as its bits do": ("HX303",),
    "candidates of every rank have rank 0's positions": ("HX303", "HX410"),
    "T > 1: every query attends to the first one's slots": ("HX402",),
    "attention takes a slot for one of the next page": ("HX402",),
    "a shared layer attends to another sequence's keys": ("HX102", "HX410"),
    "a shared layer attends to the keys of the query before": ("HX102", "HX410"),
    "a shared layer loses one key of each rank": ("HX102", "HX410"),
    "keys are scored before the new ones are written": ("HX410",),
    "the indexer's scale is of another width": ("HX410",),
    "the norm of index keys has the eps of the other norms": ("HX404",),
    "the index key is read one channel late": ("HX410",),
    "the index key is not written": ("HX404", "HX410"),
    "sparse attention over the cache is computed twice": ("HX107",),
    "the list of slots has a hole of -1, which is read as a slot": ("HX303", "HX402", "HX410"),
    "a rank that holds no chosen key counts as 0 * NaN": ("HX402",),
    "a shared layer runs an index of its own": ("HX402", "HX410"),
}
IN_CI = (
    "candidates are not exchanged: each rank attends to its own top-k",
    "of tied keys each rank takes the last",
    "-0.0 stands behind 0.0, as its bits do",
    "a key without a number is not chosen",
    "T > 1: every query attends to the first one's slots",
    "a shared layer attends to another sequence's keys",
    "keys are scored before the new ones are written",
    "the index key is not written",
)
BY_NAME = {m.name: m for m in SPARSE_CATALOGUE}


def test_the_expectations_name_every_mutant() -> None:
    assert set(EXPECTED) == set(BY_NAME)


@cache
def awkward(dtype: torch.dtype) -> tuple[Any, CapturedGraph, HelixModule]:
    """The model, its capture, and one module that the mutants are made of."""
    model = awkward_sparse(dtype)
    captured = capture(model)
    return model, captured, helix_compile(captured, world="virtual", **A2A)


def report_of(
    mutant: Mutant, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, steps: bool
) -> VerificationReport:
    model, captured, compiled = awkward(dtype)
    monkeypatch.setattr(verification, "capture", lambda *args, **kwargs: captured)
    if not steps:
        monkeypatch.setattr(verification, "check_steps", lambda subject: None)
    monkeypatch.setitem(compiled.stages, "lowered", copy_module(compiled.stages["lowered"]))
    mutant.apply(compiled)
    return verify(compiled, model)


@pytest.mark.parametrize("name", IN_CI)
def test_a_fault_is_found_by_the_check_that_must_find_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(BY_NAME[name], torch.float64, monkeypatch, steps=False)
    assert {f.code for f in report.findings} >= set(EXPECTED[name]), report


TOO_SMALL = (
    "the norm of index keys has the eps of the other norms"  # 9e-6 of a variance of 0.03: below bfloat16's rounding
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in BY_NAME for d in (torch.float32, torch.bfloat16) if (n, d) != (TOO_SMALL, torch.bfloat16)],
    ids=str,
)
def test_a_fault_is_found_in_every_dtype(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(BY_NAME[name], dtype, monkeypatch, steps=True)
    assert {f.code for f in report.findings} >= set(EXPECTED[name]), report


@pytest.mark.parametrize(
    ("name", "node"),
    [("the indexer's scale is of another width", "index_scores"), ("the k-th key itself is left out", "select_slots")],
)
def test_the_node_is_named(name: str, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are wrong and a choice that is wrong are two nodes."""
    report = report_of(BY_NAME[name], torch.float64, monkeypatch, steps=False)
    assert report.findings and all(f"`{node}`" in f.where for f in report.findings), report


CLEAN = [
    pytest.param("glm_moe_dsa", 3, torch.float64, {}),
    pytest.param("deepseek_v32", 2, torch.bfloat16, {"topk_exchange": "owner"}),
    pytest.param("glm_moe_dsa", 2, torch.bfloat16, {}, marks=pytest.mark.slow),
    pytest.param("glm_moe_dsa", 4, torch.float32, {"topk_exchange": "owner"}, marks=pytest.mark.slow),
    pytest.param("deepseek_v32", 2, torch.float64, {"tpa": 2, "merge": "ag_rs"}, marks=pytest.mark.slow),
    pytest.param("deepseek_v32", 1, torch.float64, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "cp", "dtype", "options"), CLEAN)
def test_a_clean_module_is_ok(name: str, cp: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = tiny_family(name, dtype=dtype)
    compiled = compiled_family(model, cp, **options)
    report = verify(compiled, model)
    assert report.ok, report
    seen = report.coverage
    assert seen.choices > 100 and seen.tied_choices and seen.full_cache
    text = str(compiled.inspect())
    assert "indexer of" in text and "every rank must choose by the same scores" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_two_modules_of_unlike_plans(dtype: torch.dtype) -> None:
    model = tiny_family("glm_moe_dsa", "", dtype=dtype)
    one, other = compiled_family(model, 2), compiled_family(model, 3)
    report = verify(one, other)
    assert report.ok, report
    for body in ("body_0", "body_2"):
        graph = other.graph.get_submodule(body).graph
        select = next(n for n in graph.nodes if n.name == "select_slots")
        select.update_arg(5, 3)  # fewer than the model's k
        other.graph.get_submodule(body).recompile()
    assert not verify(one, other).ok


def test_inspect_says_what_choosing_costs() -> None:
    compiled = awkward(torch.float64)[2]
    facts = compiled.inspect().facts
    wanted = {"top_k": 7, "exchange": "gather", "index_bytes_per_token_per_rank": 32}
    assert [x["body"] for x in facts["sparse"]] == ["body_0", "body_2"]
    for site in facts["sparse"]:
        assert {k: site[k] for k in wanted} == wanted
        assert site["candidate_bytes_per_rank_per_token"] == 3 * 7 * (
            4 + 4
        )  # to three peers, float32 score and position
    assert {"what": "indexer", "reason": "q, weights and keys: every rank must choose by the same scores"} in facts[
        "not_rewritten"
    ]
