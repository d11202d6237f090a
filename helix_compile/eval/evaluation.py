"""One run: the same questions to the unmodified model and to the compiled one, as rows, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from helix_compile.eval.answers import Answerer
from helix_compile.eval.heat_map import format_heat_map, short_count
from helix_compile.eval.scoring import Answered, Row, ask, row_of
from helix_compile.eval.tasks import Document

ORIGINAL = "original"
Progress = Callable[[str, int, int], None]  # what is done, questions so far, questions in all


@dataclass
class Evaluation:
    """Scores so far.

    Attributes:
        rows: one for each task, context and model.
        answered: model -> its answers; of tasks of a harness there are none.
        facts: what was run: model, options, machine; goes into the JSON as it is.
        is_leader: of several processes this one prints.
    """

    rows: list[Row] = field(default_factory=list)
    answered: dict[str, list[Answered]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    is_leader: bool = True

    @property
    def is_same(self) -> bool:
        """Every token that was compared is the original's."""
        return all(row.agreement in (None, 1.0) for row in self.rows)

    def to_json(self) -> str:
        """One document, with `rows`."""
        return json.dumps({**self.facts, "rows": [row.to_json() for row in self.rows]}, indent=1)

    def to_svg(self) -> str:
        """Score over context and depth."""
        return format_heat_map(self.answered, str(self.facts.get("model", "")))

    def __str__(self) -> str:
        """The rows as a table."""
        table = Table(box=box.MARKDOWN)
        for name, side in (
            ("task", "left"),
            ("context", "right"),
            ("model", "left"),
            ("n", "right"),
            ("correct", "right"),
        ):
            table.add_column(name, justify=side)  # type: ignore[arg-type]  # a literal
        for name in ("score", "95 %", "agreement", "seconds"):
            table.add_column(name, justify="right")
        for row in self.rows:
            low, high = row.interval
            table.add_row(
                row.task,
                short_count(row.context) if row.context else "",
                row.model,
                str(row.n),
                str(row.correct),
                f"{row.correct / row.n:.1%}",
                f"{low:.1%} to {high:.1%}",
                "" if row.agreement is None else f"{row.agreement:.2%}",
                f"{row.seconds:.1f}",
            )
        text = StringIO()
        Console(file=text, width=150).print(table)
        who = self.facts.get("answered_by")
        named = [f"{name}: {by}" for name, by in who.items()] if isinstance(who, dict) else []
        firsts = [f"{r.task} {r.context} {r.model}: {r.first_disagreement}" for r in self.rows if r.first_disagreement]
        return "\n".join([text.getvalue().strip("\n"), *named, *firsts])


def evaluate(
    answerers: dict[str, Answerer], documents: Iterable[Sequence[Document]], progress: Progress | None = None
) -> Evaluation:
    """Ask everyone everything.

    Args:
        answerers: who -> what answers; where "original" is among them the others are compared with it, and it is asked first.
        documents: each element the documents of one task at one context.
        progress: called after each question.
    """
    evaluation = Evaluation(answered={name: [] for name in answerers})
    order = sorted(answerers, key=lambda name: name != ORIGINAL)
    for group in documents:
        total = sum(len(document.questions) for document in group)
        first = group[0]
        originals: list[Answered] | None = None
        for name in order:
            tell = _counted(f"{first.task} {short_count(first.context)}, {name}", total, progress)
            tell()  # a prefill may take minutes
            answered, seconds = ask(answerers[name], group, tell)
            evaluation.rows.append(row_of(name, answered, seconds, originals))
            evaluation.answered[name] += answered
            if name == ORIGINAL:
                originals = answered
    return evaluation


def _counted(what: str, total: int, progress: Progress | None) -> Callable[[], None]:
    """Tells `progress` 0, then 1, 2, ... of `total`."""
    counts = iter(range(total + 1))

    def tell() -> None:
        if progress is not None:
            progress(what, next(counts), total)

    return tell
