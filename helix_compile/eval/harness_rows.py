"""Tasks of lm-evaluation-harness as rows: run once over the unmodified model, once over the compiled one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from helix_compile.errors import HelixError
from helix_compile.eval.harness import DecoderLM
from helix_compile.eval.scoring import Row, wilson

Samples = list[dict[str, Any]]


def manager_of(tasks: Sequence[str], include: Path | None = None) -> TaskManager:
    """What knows these tasks; HelixError names those that neither the harness nor `include` has."""
    path = None if include is None else str(include)
    # of its own tasks there are thousands, and an index of them takes seconds
    manager = TaskManager(include_path=path, include_defaults=False)
    if not all(map(manager.match_tasks, [[task] for task in tasks])):
        manager = TaskManager(include_path=path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise HelixError(
            f"--tasks: neither ours nor the harness's: {', '.join(unknown)}; `lm_eval ls tasks` lists its own"
        )
    return manager


def harness_rows(
    models: dict[str, DecoderLM], tasks: Sequence[str], limit: int | None, include: Path | None = None, seed: int = 0
) -> list[Row]:
    """A row of each task and model, in the order of tasks; the first model is what the others are compared with.

    Args:
        models: who -> model.
        tasks: names that the harness, or `include`, has.
        limit: documents of a task, from its beginning; None: all.
        include: a folder with task files.
        seed: of few-shot examples.

    Raises:
        HelixError: no such task, or one without a metric that is 0 or 1 for each document.
    """
    manager = manager_of(tasks, include)
    of_model: dict[str, dict[str, Samples]] = {}
    seconds = {}
    for who, model in models.items():
        begun = time.perf_counter()
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            fewshot_random_seed=seed,
            verbosity="WARNING",
        )
        of_model[who], seconds[who] = found["samples"], time.perf_counter() - begun
    first = next(iter(models))
    rows = []
    for task in of_model[first]:
        for who in models:
            samples = sorted(of_model[who][task], key=lambda s: (s["doc_id"], s.get("filter", "")))
            compared = None
            if who != first:
                compared = sorted(of_model[first][task], key=lambda s: (s["doc_id"], s.get("filter", "")))
            rows.append(_row(task, who, samples, compared, seconds[who]))
    return rows


def _row(task: str, who: str, samples: Samples, compared: Samples | None, seconds: float) -> Row:
    metric = _metric(task, samples[0])
    right = [float(sample[metric]) for sample in samples]
    if other := [value for value in right if value not in (0.0, 1.0)]:
        raise HelixError(
            f"--tasks {task}: its {metric} is {other[0]} for a document, expected 0 or 1; {_elsewhere(task)}"
        )
    agreement, first = None, None
    if compared is not None:
        same = [_choices(a) == _choices(b) for a, b in zip(samples, compared, strict=True)]
        agreement = sum(same) / len(same)
        if False in same:
            at = same.index(False)
            first = (
                f"document {samples[at]['doc_id']}: {_choices(samples[at])}, the original has {_choices(compared[at])}"
            )
    correct = int(sum(right))
    return Row(task, 0, who, len(right), correct, wilson(correct, len(right)), agreement, first, round(seconds, 2))


def _metric(task: str, sample: dict[str, Any]) -> str:
    """The metric of a task that says right or wrong."""
    for name in ("acc", "exact_match"):
        if name in sample:
            return name
    raise HelixError(
        f"--tasks {task}: it has {', '.join(sample.get('metrics', ()))}, none of acc and exact_match; {_elsewhere(task)}"
    )


def _elsewhere(task: str) -> str:
    return f"run it by the harness: python -m helix_compile.eval.harness run --model helix --tasks {task} ..."


def _choices(sample: dict[str, Any]) -> Any:
    """What was decided: generated texts, or which continuation is likeliest and which are greedy."""
    answers = [
        response[0] if isinstance(response, list) and len(response) == 1 else response for response in sample["resps"]
    ]
    if all(isinstance(a, (tuple, list)) and len(a) == 2 for a in answers):
        likeliest = max(range(len(answers)), key=lambda i: float(answers[i][0]))
        return likeliest, [str(a[1]) for a in answers]
    return [str(a) for a in answers]
