"""Answers at lengths that CI can't hold: the unmodified model knows them, and every layout and way of prefill gives the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.eval.answers import Answerer, LocalAnswerer
from helix_compile.eval.decoders import HelixDecoder, ModelDecoder
from helix_compile.eval.evaluation import ORIGINAL, Evaluation, evaluate
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.run import Asked, documents_of
from helix_compile.eval.tasks import TASKS

RECALL = Path(__file__).resolve().parents[1] / "data" / "recall"


def scores(
    contexts: list[int], layouts: list[dict[str, Any]], prefills: tuple[str, ...], tasks: tuple[str, ...], limit: int
) -> Evaluation:
    model = load_folder(RECALL, torch.float32)[0]
    original = ModelDecoder(model)
    answerers: dict[str, Answerer] = {ORIGINAL: LocalAnswerer(original)}
    for layout in layouts:
        compiled = helix_compile(model, **layout, max_batch_size=1, max_seq_len=max(contexts))
        for prefill in prefills:
            sender = None if prefill == "helix" else original
            answerers[f"{layout} {prefill}"] = LocalAnswerer(HelixDecoder(compiled, prefill, sender))
    return evaluate(answerers, documents_of(Asked(tasks, contexts, limit), load_tokenizer(RECALL)))


@pytest.mark.slow
def test_every_layout_and_prefill_answers_alike() -> None:
    layouts = [{"cp": 1}, {"cp": 2}, {"cp": 4}, {"cp": 8, "pad_heads": True}, {"cp": 2, "tpa": 2}]
    evaluation = scores([1024, 4096, 16384], layouts, ("helix", "model", "handover"), TASKS, 10)
    assert evaluation.is_same, str(evaluation)
    assert all(row.correct >= 0.8 * row.n for row in evaluation.rows), str(evaluation)


@pytest.mark.slow
def test_64k() -> None:
    evaluation = scores([65536], [{"cp": 4}, {"cp": 8, "pad_heads": True}], ("handover",), ("recall",), 100)
    assert evaluation.is_same, str(evaluation)
    assert all(row.correct >= 0.9 * row.n for row in evaluation.rows), str(evaluation)


@pytest.mark.slow
def test_faults_cost_answers_and_what_is_none_costs_nothing(tmp_path: Path) -> None:
    """The command of docs/accuracy.md at two of its lengths: what is in its table in bold is below the original's interval."""
    script = RECALL.parents[2] / "benchmarks" / "accuracy_faults.py"
    command = [
        sys.executable,
        str(script),
        str(RECALL),
        "--contexts",
        "512",
        "4096",
        "--json",
        str(tmp_path / "f.json"),
    ]
    subprocess.run(command, check=True, timeout=3000)
    said = json.loads((tmp_path / "f.json").read_text())
    rows = {(row["model"], row["context"]): row for row in said["rows"]}
    for context in (512, 4096):
        sound = rows["unmodified model", context]
        assert sound["n"] == 50 and sound["correct"] >= 45
        for fault in (
            "plain mean of the ranks' parts",
            "RoPE by the local position",
            "the new token is not kept",
            "a block of another sequence in a hand-over",
        ):
            assert rows[fault, context]["interval"][1] < sound["interval"][0], rows[fault, context]
        # latents that change places with their roped keys are no fault
        for no_fault in ("none", "two blocks of a hand-over in each other's place"):
            assert rows[no_fault, context]["agreement"] == 1
    verdicts = said["verdicts"]
    assert {name: text.endswith("passes") for name, text in verdicts.items() if text} == {
        "none": True,
        "plain mean of the ranks' parts": False,
        "RoPE by the local position": True,
        "the new token is not seen by itself": False,
        "the new token is not kept": False,
        "a block of another sequence in a hand-over": True,
        "two blocks of a hand-over in each other's place": True,
        "all keys from elsewhere": True,  # it does not see keys at all: what it passes above says little
    }
