"""Intervals, agreement and the picture, from answers made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from helix_compile.eval.evaluation import evaluate
from helix_compile.eval.scoring import Z, wilson
from helix_compile.eval.tasks import Document, Question

DOCUMENT = Document(
    "needle",
    1024,
    (9,) * 8,
    (Question((), (1,), (2, 3), 0.0), Question((), (4,), (5, 6), 0.99), Question((), (7,), (8, 1), 0.5)),
)


class Fixed:
    def __init__(self, *given: tuple[int, ...]):
        self._given = given

    def answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        for _ in self._given:
            done()
        return list(self._given)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 3), (45, 50), (7, 2000)])
def test_the_interval_solves_its_equation(correct: int, n: int) -> None:
    """Its ends are the rates p for which the score is Z standard errors of p away: Wilson's definition."""
    rate = correct / n
    for end in wilson(correct, n):
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n))
    low, high = wilson(correct, n)
    assert low <= rate <= high and (low == 0) == (correct == 0) and (high == 1) == (correct == n)


def test_rows_say_who_differs_where() -> None:
    told = list[tuple[str, int, int]]()
    evaluation = evaluate(
        {"helix": Fixed((2, 3), (5, 5), (8, 1)), "original": Fixed((2, 3), (5, 6), (7, 1))},
        [[DOCUMENT]],
        lambda *what: told.append(what),
    )
    original, helix = evaluation.rows  # it is asked first
    assert (original.model, original.n, original.correct, original.agreement) == ("original", 3, 2, None)
    assert (helix.correct, helix.agreement) == (2, 4 / 6)
    assert helix.first_disagreement == "question 1, token 1: 5, the original has 6"
    assert not evaluation.is_same
    assert told[0] == ("needle 1K, original", 0, 3) and told[-1] == ("needle 1K, helix", 3, 3)
    row = json.loads(evaluation.to_json())["rows"][1]
    assert {"task", "context", "model", "n", "correct", "interval", "agreement"} <= row.keys()
    assert "66.67%" in str(evaluation) and "needle 1024 helix: question 1" in str(evaluation)


def test_the_picture_has_a_cell_for_each_depth() -> None:
    evaluation = evaluate({"original": Fixed((2, 3), (5, 5), (8, 1))}, [[DOCUMENT]])
    root = ElementTree.fromstring(evaluation.to_svg())
    cells = [c for c in root.iter() if c.get("class") == "cell"]
    texts = [t.text for t in root.iter() if t.get("class") == "cell-text"]
    assert len(cells) == 3 and texts == ["1/1", "1/1", "0/1"]  # from the top: depths 0, 0.5, 0.99
    assert len({c.get("fill") for c in cells}) == 2
