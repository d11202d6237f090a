"""The installed lm-evaluation-harness over a compiled module, on task files of ours: no network."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml

from helix_compile.capture.source import load_folder
from helix_compile.cli.evaluate import check_harness
from helix_compile.errors import HelixError
from helix_compile.eval.harness import HelixLM, on_device, written_to
from helix_compile.eval.harness_rows import harness_rows
from helix_compile.eval.words import FILLERS, WORDS
from tests.distributed.steps import free_port, launch

pytestmark = pytest.mark.slow

RECALL = Path(__file__).resolve().parents[1] / "data" / "recall"
KINDS: dict[str, dict[str, Any]] = {
    "pairs_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "pairs_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "strict", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    },
    "pairs_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 12 facts between fillers, one asked for: by its first word, for three words; and which of three follows it."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    lines = []
    for _ in range(4):
        words = draw.sample(WORDS, 48)
        facts = [words[i : i + 4] for i in range(0, 48, 4)]
        text = " ".join(" ".join([*fact, *draw.choices(FILLERS, k=3)]) for fact in facts)
        asked, *others = draw.sample(facts, 3)
        choices = draw.sample([fact[1] for fact in (asked, *others)], 3)
        answer = {"answer": " ".join(asked[1:]), "choices": choices, "label": choices.index(asked[1])}
        lines.append({"text": f"{text} {asked[0]}", **answer})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, kind in KINDS.items():
        task = {"task": name, "dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = {"data_files": {"test": str(folder / "pairs.jsonl")}}  # type: ignore[assignment]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **kind}))
    return folder


@pytest.fixture(scope="module")
def models() -> dict[str, HelixLM]:
    return {
        "original": HelixLM(RECALL, model="original", dtype="float32", max_seq_len=128),
        "helix": HelixLM(RECALL, cp=4, dtype="float32", max_seq_len=128),
    }


def test_tasks_as_rows(models: dict[str, HelixLM], task_files: Path) -> None:
    rows = harness_rows(models, ["pairs_choice", "pairs_generate"], None, task_files)
    assert [(r.task, r.model, r.n) for r in rows] == [
        (task, who, 4) for task in ("pairs_choice", "pairs_generate") for who in ("original", "helix")
    ]
    assert all(r.correct >= 3 for r in rows), rows
    assert all(r.agreement == 1 for r in rows if r.model == "helix")
    with pytest.raises(HelixError, match=r"pairs_text: it has .*word_perplexity"):
        harness_rows(models, ["pairs_text"], 1, task_files)


def test_log_probabilities_are_the_models(models: dict[str, HelixLM], task_files: Path) -> None:
    """Of a text that fits: the sum that log_softmax of one whole pass gives; and of one that is longer, in windows."""
    text = json.loads((task_files / "pairs.jsonl").read_text().splitlines()[0])["text"]
    model = load_folder(RECALL, torch.float32)[0]
    helix = models["helix"]
    ids = helix.tok_encode(text)
    with torch.no_grad():
        scores = model(torch.tensor([[helix.prefix_token_id, *ids]])).logits[0, :-1].double().log_softmax(-1)
    whole = scores.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    request = type("Request", (), {"args": (text,)})
    assert helix.loglikelihood_rolling([request])[0] == pytest.approx(float(whole.sum()), rel=1e-5)
    longer = type("Request", (), {"args": (f"{text} {text}",)})
    assert helix.loglikelihood_rolling([longer])[0] == pytest.approx(
        models["original"].loglikelihood_rolling([longer])[0], rel=1e-5
    )
    score, greedy = helix._loglikelihood(ids[:50], ids[50:60])
    with torch.no_grad():
        part = model(torch.tensor([ids[:60]])).logits[0, 49:59].double().log_softmax(-1)
    assert score == pytest.approx(float(part.gather(-1, torch.tensor(ids[50:60])[:, None]).sum()), rel=1e-5)
    assert greedy == bool((part.argmax(-1) == torch.tensor(ids[50:60])).all())
    assert helix._loglikelihood(ids[:-3], ids[-3:])[0] == pytest.approx(
        models["original"]._loglikelihood(ids[:-3], ids[-3:])[0], rel=1e-5
    )


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HelixError, match="no option tp"):
        HelixLM(RECALL, tp=4)
    with pytest.raises(HelixError, match="batch_size 8"):
        HelixLM(RECALL, cp=4, batch_size=8)
    with pytest.raises(HelixError, match=r"model=other, expected helix \| original"):
        HelixLM(RECALL, cp=4, model="other")


@pytest.mark.slow
def test_the_command_line(task_files: Path, tmp_path: Path) -> None:
    """As docs/accuracy.md has it: the harness's own command, with our model."""
    command = [
        sys.executable,
        "-m",
        "helix_compile.eval.harness",
        "run",
        "--model",
        "helix",
        "--tasks",
        "pairs_choice,pairs_text",
    ]
    command += ["--model_args", f"path={RECALL},cp=4,dtype=float32,max_seq_len=128", "--include_path", str(task_files)]
    subprocess.run([*command, "--output_path", str(tmp_path)], check=True, timeout=900)
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    with pytest.raises(HelixError, match="neither ours nor the harness's: pears_choice"):  # its thousands are looked at
        check_harness(["pears_choice"], task_files)  # before weights are loaded
    assert results["pairs_choice"]["acc,none"] >= 3 / 4 and results["pairs_text"]["word_perplexity,none"] > 1


@pytest.mark.multi_process
def test_the_command_line_under_torchrun(task_files: Path, tmp_path: Path) -> None:
    """The torchrun command of docs/accuracy.md, on a task of ours: four processes answer, the first one prints and writes, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", free_port(), "--nproc-per-node", "4"]
    command += ["-m", "helix_compile.eval.harness", "run", "--model", "helix", "--tasks", "pairs_choice,pairs_generate"]
    command += ["--model_args", f"path={RECALL},cp=4,dtype=float32,max_seq_len=128", "--include_path", str(task_files)]
    done = launch([*command, "--output_path", str(tmp_path)], 1500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|pairs_choice") == 1, done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert results["pairs_choice"]["acc,none"] >= 3 / 4
    assert results["pairs_generate"]["exact_match,strict"] >= 3 / 4


def test_of_several_processes_one_writes() -> None:
    given = ["lm_eval", "run", "--tasks", "a", "-o", "x", "--model", "helix"]
    assert written_to(given, "/tmp/y") == ["lm_eval", "run", "--tasks", "a", "-o", "/tmp/y", "--model", "helix"]
    assert written_to(["lm_eval", "--output_path=x", "-v"], "y") == ["lm_eval", "--output_path=y", "-v"]
    assert written_to(["lm_eval", "--output_path", "x"], "y") == ["lm_eval", "--output_path", "y"]


def test_a_device_is_said_where_nobody_did(tmp_path: Path) -> None:
    """The harness's own default is cuda:0, and what stands last in a command line or first in its file wins."""
    assert on_device(["x", "run", "--tasks", "a"], "cpu") == ["x", "run", "--device", "cpu", "--tasks", "a"]
    assert on_device(["x", "--tasks", "a"], "cuda") == ["x", "--device", "cuda", "--tasks", "a"]
    for left in (["x"], ["x", "ls", "tasks"], ["x", "--help"], ["x", "run", "-h"]):
        assert on_device(left, "cpu") == left
    (tmp_path / "c.yaml").write_text("device: cuda:1\n")
    (tmp_path / "d.yaml").write_text("limit: 1\n")
    assert on_device(["x", "run", "-C", str(tmp_path / "c.yaml")], "cpu") == [
        "x",
        "run",
        "-C",
        str(tmp_path / "c.yaml"),
    ]
    assert on_device(["x", "run", f"--config={tmp_path / 'd.yaml'}"], "cpu")[2:4] == ["--device", "cpu"]


def test_it_is_found_by_name() -> None:
    assert lm_eval.api.registry.get_model("helix") is HelixLM
