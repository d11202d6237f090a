"""A model that can do something answers alike unmodified and compiled; a broken one does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.errors import HelixError
from helix_compile.eval.answers import LocalAnswerer
from helix_compile.eval.decoders import HelixDecoder, ModelDecoder
from helix_compile.eval.evaluation import ORIGINAL, Evaluation, evaluate
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.tasks import TASKS, make_documents
from helix_compile.ir.stage import graphs_of
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.kernel_mutants import plain_mean
from helix_compile.verifier.mutants.mutant import replace_op
from tests.distributed.steps import launch
from tests.support.command import run_here

RECALL = Path(__file__).resolve().parents[1] / "data" / "recall"
CONTEXT = 512
LIMITS = {"recall": 20, "needle": 6, "copy": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_folder(RECALL, torch.float32)[0]


@pytest.fixture(scope="module")
def compiled(model: Any) -> HelixModule:
    return helix_compile(model, cp=4, max_batch_size=1, max_seq_len=CONTEXT)


def scores(model: Any, decoder: HelixDecoder, tasks: tuple[str, ...] = TASKS) -> Evaluation:
    documents = [make_documents(task, load_tokenizer(RECALL), CONTEXT, LIMITS[task]) for task in tasks]
    return evaluate({ORIGINAL: LocalAnswerer(ModelDecoder(model)), "helix": LocalAnswerer(decoder)}, documents)


def test_the_model_knows_the_answers_and_helix_gives_the_same(model: Any, compiled: HelixModule) -> None:
    for prefill in ("helix", "model", "handover"):
        sender = None if prefill == "helix" else ModelDecoder(model)
        tasks = TASKS if prefill == "handover" else ("recall",)
        evaluation = scores(model, HelixDecoder(compiled, prefill, sender), tasks)
        assert all(row.correct >= 0.9 * row.n for row in evaluation.rows), str(evaluation)
        assert evaluation.is_same, f"{prefill}:\n{evaluation}"


def test_a_wrong_merge_loses_answers(model: Any) -> None:
    broken = helix_compile(model, cp=4, max_batch_size=1, max_seq_len=CONTEXT)
    replace_op(broken, "merge_lse", plain_mean)
    for _, gm in graphs_of(broken.graph):
        gm.recompile()
    recall = scores(model, HelixDecoder(broken), ("recall",)).rows[1]
    assert recall.interval[1] < 0.9 and recall.first_disagreement


def test_a_step_is_the_same_in_chunks_and_in_one(model: Any) -> None:
    ids = list(range(2, 40))
    whole, cut = ModelDecoder(model), ModelDecoder(model, chunk=7)
    for keep in (1, 3, 8, 38):
        whole.begin([])
        cut.begin([])
        torch.testing.assert_close(cut.step(ids, keep), whole.step(ids, keep), rtol=1e-4, atol=1e-4)
    cut.truncate(20)
    torch.testing.assert_close(cut.step(ids[20:], 2), _last(model, ids, 2), rtol=1e-4, atol=1e-4)


def _last(model: Any, ids: list[int], keep: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -keep:]


def test_the_command(tmp_path: Path) -> None:
    asked = ["--cp", "2", "--tasks", "recall,copy", "--context", "256..512", "--limit", "5", "--dtype", "float32"]
    done = run_here("eval", str(RECALL), *asked, "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((tmp_path / "scores.json").read_text())
    assert [(r["task"], r["context"], r["model"], r["n"]) for r in said["rows"]] == [
        (task, context, who, 5)
        for context in (256, 512)
        for task in ("recall", "copy")
        for who in ("original", "helix")
    ]
    assert all(r["agreement"] == 1 for r in said["rows"] if r["model"] == "helix")
    ElementTree.fromstring((tmp_path / "scores.svg").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cp", "2", "--include", "."], "--include has no effect"),
        (["--cp", "2", "--context", "4K..1K"], "--context '4K..1K'"),
        (["--cp", "2", "--prefill", "file"], "prefill: got 'file', expected model | helix | handover"),
        (["--cp", "2", "--max-seq-len", "99"], "leave --max-seq-len"),
        (["--cp", "2", "--limit", "0"], "--limit must be >= 1"),
        ([], "Missing option '--cp'"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    done = run_here("eval", str(RECALL), *arguments)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
@pytest.mark.multi_process
def test_under_torchrun_one_prints() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "helix_compile",
        "eval",
        str(RECALL),
    ]
    command += ["--cp", "2", "--tasks", "recall", "--context", "256", "--limit", "5", "--dtype", "float32", "--json"]
    done = launch(command, 400)
    assert done.returncode == 0, done.stderr
    original, helix = json.loads(done.stdout)["rows"]
    assert original["correct"] == helix["correct"] == 5 and helix["agreement"] == 1


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HelixError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
