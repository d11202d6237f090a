"""--tune without a card: candidates, the trial of each by the interpreter with a false clock, and the table it prints."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import helix_compile.cli.commands as cli
import helix_compile.ir.ops  # noqa: F401
import helix_compile.kernels.lab.tune as tuner
import helix_compile.kernels.mla.tuning as tuning
from helix_compile.capture.model import capture
from helix_compile.cli.kernel_cases import attention_site
from helix_compile.compile import plan_model
from helix_compile.config.options import HelixOptions
from helix_compile.errors import LoweringUnavailable
from helix_compile.kernels.lab.tune import (
    LocalTrials,
    Trial,
    TuneSizes,
    candidates,
    classes_of,
    replacement,
    table_text,
    trials_text,
    tune,
)
from helix_compile.kernels.lab.tune_child import ChildTrials
from helix_compile.kernels.mla.tuning import MLA_DECODE, POINTER, MlaConfig, MlaEntry, form_runs
from helix_compile.kernels.registry import CompileCase
from helix_compile.kernels.target import KernelTarget, device_target, offline_target
from tests.support.gqa_models import fresh_gqa

V3 = TuneSizes(8, 32768, 512, 64, 128, torch.bfloat16)
SMALL = TuneSizes(2, 40, 32, 16, 32, torch.float32)
CPU = torch.device("cpu")
DATE = datetime.date(2026, 1, 2)
TARGETS = [offline_target(arch) for arch in ("sm_100", "sm_90", "sm_80")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
def test_each_class_has_candidates_that_can_run_it(target: KernelTarget) -> None:
    classes = classes_of(target, V3)
    assert classes and all(entry.arch == target.arch for entry in classes)
    for entry in classes:
        found = candidates(entry, V3, target)
        shape = tuner._shape(entry, V3)
        assert found[0] == entry.config and len(found) == len(set(found)) >= 4
        assert all(form_runs(config, shape) for config in found)
        assert {c.form == POINTER for c in found} == {entry.config.form == POINTER}
        special = any(c.warp_specialize or c.packed for c in found)
        assert special == (target.arch == "sm_100" and entry.config.form != POINTER)


def test_every_choice_of_the_table_is_among_the_classes() -> None:
    """What mla_config answers on a card today would be replaced by what is measured."""
    for target in TARGETS[:2]:
        configs = {entry.config for entry in classes_of(target, V3)}
        for rows in (16, 32, 128):
            for scaled in (False, True):
                shape = tuning.MlaShape(rows, 512, 64, 128, 2, tma=True)
                assert tuning.mla_config(shape, target, scaled) in configs


def test_a_compiler_that_can_not_split_halves_gets_one_part() -> None:
    for rows in (16, 128):
        shape = tuning.MlaShape(rows, 512, 64, 128, 2, tma=True)
        usual, without = (tuning.mla_config(shape, TARGETS[0], halves=h) for h in (True, False))
        assert (usual.parts, without) == (2, replace(usual, parts=1, packed=without.packed))
        assert tuning.mla_config(shape, TARGETS[1], halves=False).form != POINTER


def parsed(text: str) -> tuple[MlaEntry, ...]:
    """The table that a text of tuning.py's makes."""
    names: dict[str, Any] = dict(vars(tuning))
    exec(text, names)
    table: tuple[MlaEntry, ...] = names["MLA_DECODE"]
    return table


def test_the_printed_table_is_the_table() -> None:
    assert parsed(table_text(MLA_DECODE)) == MLA_DECODE


def test_the_fastest_of_a_class_replaces_its_entry() -> None:
    target = offline_target("sm_90")
    first, *_ = classes = classes_of(target, V3)
    anywhere = next(c for c in classes if c not in MLA_DECODE)  # stood under "any card" before
    slow, fast, other = candidates(first, V3, target)[:3]
    trials = [
        Trial(first, slow, 0.3),
        Trial(first, fast, 0.1),
        Trial(first, other, reason="too large"),
        Trial(anywhere, anywhere.config, 0.2),
    ]
    table = parsed(table_text(replacement(trials, V3, "a card", DATE)))
    new = [entry for entry in table if entry not in MLA_DECODE]
    assert [e for e in table if e not in new] == [e for e in MLA_DECODE if e != first]
    assert [(e.arch, e.config) for e in new] == [("sm_90", fast), ("sm_90", anywhere.config)]
    assert new[0].evidence.startswith("a card, 2026-01-02, Triton ") and "100.0 us, B 8" in new[0].evidence
    assert table.index(new[0]) == MLA_DECODE.index(first)
    assert table[table.index(new[1]) + 1] == replace(anywhere, arch="")
    text = trials_text(trials)
    assert text.index(str(fast)) < text.index(str(slow)) < text.index("too large")


def test_nothing_measured_changes_nothing() -> None:
    entry = classes_of(TARGETS[0], V3)[0]
    assert tuple(replacement([Trial(entry, entry.config, reason="no")], V3, "c", DATE)) == MLA_DECODE


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three candidates a class, and the deterministic memory that shows what is not written."""
    every = candidates
    monkeypatch.setattr(tuner, "candidates", lambda *a: every(*a)[:3])
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def no_limit(cases: Sequence[CompileCase]) -> list[str | None]:
    return [None] * len(cases)


def test_only_what_fits_and_is_right_is_timed(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def clock(call: Callable[[], object]) -> float:
        call()
        timed.append(1)
        return float(len(timed))

    def first_too_large(cases: Sequence[CompileCase]) -> list[str | None]:
        return ["too large", *no_limit(cases)[1:]]

    measured = LocalTrials(device_target(CPU), SMALL, CPU, clock)
    trials = tune(device_target(CPU), SMALL, first_too_large, measured)
    classes = classes_of(device_target(CPU), SMALL)
    assert len(trials) == 3 * len(classes)
    assert [t.ms is None for t in trials] == [True, False, False] * len(classes), trials
    assert len(timed) == 2 * len(classes)

    decode = tuner.mla_decode_triton
    monkeypatch.setattr(tuner, "mla_decode_triton", lambda *a, **k: [x * 1.01 for x in decode(*a, **k)])
    wrong = tune(device_target(CPU), SMALL, no_limit, measured)
    assert all(t.ms is None and t.reason.startswith("wrong: off by") for t in wrong)
    assert len(timed) == 2 * len(classes)


def deadly_trials(path: str) -> Callable[[MlaEntry, MlaConfig], Trial]:
    """Stands for a card: some candidates fault, end the process or hang, and a fault spoils what comes after it."""
    spoilt = False
    with open(path, "a") as file:
        file.write("started\n")

    def trial(entry: MlaEntry, config: MlaConfig) -> Trial:
        nonlocal spoilt
        if config.num_stages == 1 or spoilt:
            spoilt = True
            return Trial(entry, config, reason="AcceleratorError: illegal", faulted=True)
        if config.num_stages == 2:
            os._exit(7)
        if config.num_stages == 3:
            time.sleep(60)
        return Trial(entry, config, ms=1.0)

    return trial


@pytest.mark.slow
def test_a_candidate_that_faults_costs_no_other_its_trial(tmp_path: Path) -> None:
    entry = classes_of(TARGETS[1], V3)[0]
    log = tmp_path / "children"
    stages = (4, 1, 4, 5, 2, 4, 3, 4, 4)
    with closing(ChildTrials(str(log), make=deadly_trials, timeout_s=3)) as trials:
        got = [trials(entry, replace(entry.config, num_stages=n)) for n in stages]
    assert [t.config.num_stages for t in got] == list(stages)
    bad = {n: t.reason for n, t in zip(stages, got, strict=True) if t.ms is None}
    assert bad == {1: "AcceleratorError: illegal", 2: "ended its process (exit status 7)", 3: "took longer than 3 s"}
    assert log.read_text().count("started") == 4  # the first, and one after each of the three


def test_no_card_is_a_refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for extra, message in (
        ([], "LoweringUnavailable: kernels: --tune measures on a CUDA device, and torch finds none"),
        (["--all"], "HelixError: kernels: --tune takes no --all"),
        (["--arch", "sm_90"], "HelixError: kernels: --tune takes no --arch"),
    ):
        monkeypatch.setattr(sys, "argv", ["helix-compile", "kernels", "tiny", "--tune", *extra])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.startswith(message), err


def test_a_model_without_mla_decode_has_nothing_to_tune() -> None:
    captured = capture(fresh_gqa("llama", torch.bfloat16).to("meta"))
    model = plan_model(captured, HelixOptions(cp=4))
    with pytest.raises(
        LoweringUnavailable, match="no layer of the model is lowered to it; --tune measures mla_decode alone"
    ):
        attention_site(model, offline_target("sm_90"))
