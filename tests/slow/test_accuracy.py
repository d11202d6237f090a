"""Answers at lengths that CI can't hold: the unmodified model knows them, and every layout and way of prefill gives the same."""

from __future__ import annotations

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
from helix_compile.ir.stage import graphs_of
from helix_compile.verifier.mutants.graph_mutants import local_position
from helix_compile.verifier.mutants.kernel_mutants import plain_mean
from helix_compile.verifier.mutants.mutant import replace_op

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


def _not_kept(cache: Any, table: Any, slots: Any, visible: Any, latent: Any, k_rope: Any) -> Any:
    kept = slots if slots.shape[1] > 1 else torch.full_like(slots, -1)
    return torch.ops.helix.cache_append(cache, table, kept, visible, latent, k_rope)


FAULTS = {
    "plain mean": lambda compiled: replace_op(compiled, "merge_lse", plain_mean),
    "local position": local_position,
    "not kept": lambda compiled: replace_op(compiled, "cache_append", _not_kept),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_answers(fault: str) -> None:
    """After a prefill by the unmodified model: outside of its interval at the length of docs/accuracy.md, and so beyond."""
    model = load_folder(RECALL, torch.float32)[0]
    original = ModelDecoder(model)
    compiled = helix_compile(model, cp=4, max_batch_size=1, max_seq_len=8192)
    FAULTS[fault](compiled)
    for _, gm in graphs_of(compiled.graph):
        gm.recompile()
    broken = LocalAnswerer(HelixDecoder(compiled, "model", original))
    documents = documents_of(Asked(["recall"], [2048, 8192], 50), load_tokenizer(RECALL))
    rows = evaluate({ORIGINAL: LocalAnswerer(original), "broken": broken}, documents).rows
    for sound, faulty in zip(rows[::2], rows[1::2], strict=True):
        assert faulty.interval[1] < sound.interval[0], (sound, faulty)
