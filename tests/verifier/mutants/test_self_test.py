"""Every known fault is caught, and what the verifier says of it is of the right kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from helix_compile import VerificationReport, helix_compile, verify
from helix_compile.verifier.mutants.mutant import (
    A2A,
    CATALOGUE,
    GQA_CATALOGUE,
    MIXED,
    SHARED_CATALOGUE,
    SPARSE_CATALOGUE,
    WINDOW_CATALOGUE,
    Mutant,
)
from helix_compile.verifier.mutants.self_test import AcceptanceRule, awkward_gqa, awkward_model, awkward_windows
from helix_compile.verifier.report import CODES, FAMILIES
from tests.support.models import tiny_model

OPTIONS = [dict(t) for t in dict.fromkeys(tuple(m.options.items()) for m in CATALOGUE)]

MUTANTS = {m.name: m for m in CATALOGUE}
# what no type can see: these must be found by the numbers, and by this check of them
BY_NUMBERS = {
    "gate and up are swapped": "HX403",
    "the last choice of a token is dropped": "HX403",
    "plain mean of the parts": "HX402",
    "base-2 weights from natural-log statistics": "HX402",
    "an empty shard says lse = 0": "HX402",
    "dead parts are multiplied by 0 and hold NaN": "HX406",
    "a page is counted in absolute slots past the first": "HX402",
    "a token is also written one slot further": "HX404",
    "query and key positions one too large": "HX404",
    "only the first token of a step is written": "HX404",
    "ranks of ep count experts without those that are padded": "HX401",
    "padding is written to slot 0": "HX401",
    "ranks count their rows of the embedding from the one before": "HX401",
    "the logits are those of the last words and the rows of zeros, without the first": "HX401",
    "attention reads the cache before the new token is written": "HX402",
}
# right numbers, wrong all the same: only the static check can find these
BY_TYPES = {
    "every part attends with all rows": "HX107",
    "every rank computes the whole FFN and takes its part of the sum": "HX107",
    "a projection is computed twice and averaged": "HX107",
    "attention over the cache is computed twice": "HX107",
    "merge option accepted and ignored": "HX105",
    "a part is waited for before the next one attends": "HX111",
    "the plan has no word of zero heads": "HX302",
    "v_up option accepted and ignored": "HX302",
    "two sequences share a page": "HX404",
    "a cache is imported in the order of the sender, not dealt block by block": "HX404",
    "a collective is waited for twice": "HX104",
    "o_proj rows in (kvp, tpa) order": "HX201",
    "FFN shards overlap by one row": "HX202",
    "o_proj's columns for a zero head are those of the head before": "HX202",
    "a zero head stands before the others of its rank": "HX202",
    "the expert that no token chooses holds weights": "HX202",
    "rows of a zero head are not zero": "HX202",
    "two ranks hold each other's rows of the head": "HX201",
    "rows of zeros of the head are not zero, and no logit shows it": "HX202",
    "the plan has no word of what is cut around the layers": "HX302",
    "one rank has an older router bias": "HX204",
    "kvp groups run through in reverse": "HX106",
    "blocks start one token late": "HX301",
    "an op of unknown meaning stands in the graph": "HX103",
    "a layer is called with the norm of another": "HX109",
    "no all_reduce behind the FFN": "HX101",
    "owned heads reach o_proj in reverse": "HX102",
}


# faults between two layers of one kind; the others need one of each kind
OF_TWO_LAYERS = ("the layers of a model share one layer's cache", "a layer is called with the norm of another")


@cache
def report_of(name: str) -> VerificationReport:
    mutant, model = MUTANTS[name], tiny_model("plain" if name in OF_TWO_LAYERS else "short")
    compiled = helix_compile(model, **mutant.options)
    mutant.apply(compiled)
    return verify(compiled, model)


def test_the_catalogue_is_wide() -> None:
    every = CATALOGUE + GQA_CATALOGUE + SPARSE_CATALOGUE + WINDOW_CATALOGUE + SHARED_CATALOGUE
    assert len({m.name for m in every}) == len(every)
    assert len(MUTANTS) == len(CATALOGUE) >= 40
    assert {m.family for m in CATALOGUE + SPARSE_CATALOGUE} == set(FAMILIES) - {0}
    kinds = {"graph", "parameters", "cache", "positions", "plan", "kernel"}
    assert {m.kind for m in CATALOGUE} == kinds


# in CI one of each code that only one check can find; the slow tier has all, and all of them in bfloat16
ONE_OF_EACH = {code: name for by in (BY_NUMBERS, BY_TYPES) for name, code in by.items()}.values()
NAMES = [pytest.param(n, marks=() if n in ONE_OF_EACH else pytest.mark.slow) for n in MUTANTS]


@pytest.mark.parametrize("name", NAMES)
def test_caught(name: str) -> None:
    report = report_of(name)
    assert not report.ok
    assert all(f.code in CODES and f.where and f.got and f.expected for f in report.findings)
    found = {(f.code, f.check) for f in report.findings}
    if name in BY_NUMBERS:
        assert (BY_NUMBERS[name], "numeric") in found
    if name in BY_TYPES:
        assert (BY_TYPES[name], "static") in found


def test_the_expectations_name_mutants() -> None:
    assert set(BY_NUMBERS) | set(BY_TYPES) <= set(MUTANTS)


@pytest.mark.parametrize(
    "options", [*OPTIONS[:2], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS[2:])], ids=str
)
def test_the_same_plan_without_a_fault_is_fine(options: dict) -> None:
    model = tiny_model("short")
    report = verify(helix_compile(model, **options), model)
    assert report.ok, report


# of grouped-query attention: what each must be found by, numbers and types
GROUPED = {
    "query heads are dealt to K/V heads in turn, not in groups": "HX402",
    "query heads read the next group's K/V head": "HX402",
    "every query head reads the first value head": "HX402",
    "ranks of tpa hold each other's K and V rows": "HX201",
    "K rows of a rank are one head late, V rows are not": "HX202",
    "V is read one channel early": "HX402",
    "K and V change places in the cache": "HX404",
    "the last K/V head is not written": "HX404",
    "the norms of query and key are swapped": "HX204",
    "grouped scores without the model's scale": "HX402",
    "the mask of gqa_decode is off by one slot": "HX402",
    "T > 1: each grouped query sees the whole step": "HX402",
    "an empty shard of K/V says lse = 0": "HX402",
    "statistics of a group are those of its first query head": "HX402",
    "grouped attention over the cache is computed twice": "HX107",
    "zero heads behind all groups in place of behind each": "HX403",
    "the plan pads groups at the end of all": "HX302",
}
IN_CI = ("HX201", "HX202", "HX204", "HX107", "HX404")


@cache
def grouped_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    model: Any = awkward_gqa(dtype)
    model.set_experts_implementation("batched_mm")  # grouped_mm takes no 16-bit rows of 36
    return model


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if GROUPED[m.name] in IN_CI else pytest.mark.slow) for m in GQA_CATALOGUE],
    ids=lambda m: m.name,
)
def test_caught_on_grouped_query_attention(mutant: Mutant) -> None:
    compiled = helix_compile(grouped_model(), **mutant.options)
    mutant.apply(compiled)
    report = verify(compiled, grouped_model())
    assert GROUPED[mutant.name] in {f.code for f in report.findings}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", GQA_CATALOGUE, ids=lambda m: m.name)
def test_caught_on_grouped_query_attention_in_bfloat16(mutant: Mutant) -> None:
    model = grouped_model(torch.bfloat16)
    compiled = helix_compile(model, **mutant.options)
    mutant.apply(compiled)
    assert not verify(compiled, model).ok


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [A2A, MIXED], ids=str)
def test_grouped_query_attention_without_a_fault_is_fine(dtype: torch.dtype, options: dict) -> None:
    model = grouped_model(dtype)
    report = verify(helix_compile(model, **options), model)
    assert report.ok, report


# of windows and sinks
FORGETFUL = {
    "a window begins one slot late": "HX301",
    "a window begins one slot early": "HX301",
    "a query's own token is not counted in its window": "HX301",
    "where a window begins is a position, used as a slot": "HX301",
    "T > 1: all queries of a step have the first one's window": "HX301",
    "the layer with a window sees all": "HX301",
    "the plan says another window than the model has": "HX302",
    "a sink stands in every rank's part": "HX402",
    "sinks are scaled as scores are": "HX402",
    "sinks are left out": "HX402",
    "sinks are applied twice": "HX402",
    "sinks weigh against the keys of one rank": "HX402",
    "sinks of a rank are those of the heads beside its own": "HX202",
    "sinks act on a rank's part before the exchange": "HX102",
    "a ring holds the KV heads that the rank beside reads": "HX404",
    "a ring begins again one page early": "HX404",
    "the plan's ring is shorter than a window": "HX302",
    "tokens are written to a ring one slot late": "HX301",
}
IN_CI_TOO = (
    "a window begins one slot late",
    "a sink stands in every rank's part",
    "a ring holds the KV heads that the rank beside reads",
    "a ring begins again one page early",
)


@cache
def forgetful_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return awkward_windows(dtype)


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if m.name in IN_CI_TOO else pytest.mark.slow) for m in WINDOW_CATALOGUE],
    ids=lambda m: m.name,
)
def test_caught_on_windows_and_sinks(mutant: Mutant) -> None:
    """By numbers too, wherever they change."""
    compiled = helix_compile(forgetful_model(), **mutant.options)
    mutant.apply(compiled)
    report = verify(compiled, forgetful_model())
    assert FORGETFUL[mutant.name] in {f.code for f in report.findings}
    assert mutant.kind in ("plan", "cache") or "numeric" in {f.check for f in report.findings}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [A2A, MIXED, {**MIXED, "window": "replicate"}], ids=str)
def test_windows_and_sinks_without_a_fault_are_fine(dtype: torch.dtype, options: dict) -> None:
    model = forgetful_model(dtype)
    report = verify(helix_compile(model, **options, unmatched="keep"), model)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("mutant", WINDOW_CATALOGUE, ids=lambda m: m.name)
def test_caught_on_windows_and_sinks_in_bfloat16(mutant: Mutant) -> None:
    model = forgetful_model(torch.bfloat16)
    compiled = helix_compile(model, **mutant.options)
    mutant.apply(compiled)
    assert not verify(compiled, model).ok


@pytest.mark.parametrize("build", [awkward_model, awkward_gqa])
def test_the_acceptance_rule_runs_on_sound_modules(build: Callable[[], torch.nn.Module]) -> None:
    """Or "does not run" would say nothing of a mutant."""
    model = build()
    assert AcceptanceRule(model).share_off(helix_compile(model, **CATALOGUE[0].options)) == 0.0


@pytest.mark.slow
def test_the_likeliest_family_is_usually_the_one() -> None:
    """A guess, so not each time; but a reader who follows it is right more often than not."""
    right = [n for n, m in MUTANTS.items() if m.family in {f.family for f in report_of(n).findings}]
    assert len(right) >= 0.7 * len(MUTANTS)
