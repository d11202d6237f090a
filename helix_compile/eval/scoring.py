"""What was answered, right or wrong, and the rows of a table: scores with binomial intervals, and how far two answerers agree."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from helix_compile.eval.answers import Answerer
from helix_compile.eval.tasks import Document

Z = 1.959964  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Answered:
    """One question's answer.

    Attributes:
        depth: as of Question.
        expected, given: tokens.
    """

    task: str
    context: int
    depth: float | None
    expected: tuple[int, ...]
    given: tuple[int, ...]

    @property
    def is_correct(self) -> bool:
        """All tokens right."""
        return self.given == self.expected


@dataclass(frozen=True)
class Row:
    """A score.

    Attributes:
        task, context: what was asked, and over how many tokens; context 0: as long as the task has it.
        model: "original", "helix", or what else answered.
        n, correct: questions, and how many of them all tokens of the answer are right of.
        interval: of the rate, 95 % (Wilson).
        agreement: share of tokens equal to the original's; None: it is the original, or there is none.
        first_disagreement: where the first token differs, in words; None: nowhere.
        seconds: of all its answers, prefill included.
    """

    task: str
    context: int
    model: str
    n: int
    correct: int
    interval: tuple[float, float]
    agreement: float | None
    first_disagreement: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Interval of a rate, 95 %: Wilson's, which holds at 0 and at 1 too (JASA 22, 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = correct / n, Z * Z
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # at the ends the formula gives them but for rounding
    low = 0.0 if correct == 0 else max(0.0, middle - half)
    return low, 1.0 if correct == n else min(1.0, middle + half)


def ask(answerer: Answerer, documents: Sequence[Document], done: Callable[[], None]) -> tuple[list[Answered], float]:
    """All questions of all documents, and the seconds that it took; `done` is called after each question."""
    answered, begun = list[Answered](), time.perf_counter()
    for document in documents:
        for question, given in zip(document.questions, answerer.answers(document, done), strict=True):
            answered.append(Answered(document.task, document.context, question.depth, question.answer, given))
    return answered, time.perf_counter() - begun


def row_of(model: str, answered: Sequence[Answered], seconds: float, original: Sequence[Answered] | None = None) -> Row:
    """The row of one task at one context; `original` answered the same questions."""
    correct, agreement, first = sum(a.is_correct for a in answered), None, None
    if original is not None:
        agreement, first = _agreement(answered, original)
    first_one = answered[0]
    return Row(
        first_one.task,
        first_one.context,
        model,
        len(answered),
        correct,
        wilson(correct, len(answered)),
        agreement,
        first,
        round(seconds, 2),
    )


def _agreement(answered: Sequence[Answered], original: Sequence[Answered]) -> tuple[float, str | None]:
    """Share of tokens that are the original's, and the first place where one is not."""
    equal = count = 0
    first = None
    for number, (one, other) in enumerate(zip(answered, original, strict=True)):
        count += max(len(one.given), len(other.given))
        same = [a == b for a, b in zip(one.given, other.given, strict=False)]
        equal += sum(same)
        if first is None and one.given != other.given:
            at = same.index(False) if False in same else len(same)
            got, wanted = one.given[at : at + 1], other.given[at : at + 1]
            first = f"question {number}, token {at}: {got[0] if got else 'none'}, the original has {wanted[0] if wanted else 'none'}"
    return (equal / count if count else 1.0), first
