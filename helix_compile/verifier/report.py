"""What a verification found and what it looked at, and how a fault of the module under test becomes a finding.

A finding has a stable code; docs/findings.md explains each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from helix_compile.errors import HelixError

Progress = Callable[[str], None]

# code -> what it says; docs/findings.md has a section for each
CODES: dict[str, str] = {
    "HX101": "a partial value reaches an op or an output that needs the whole",
    "HX102": "layouts that do not meet",
    "HX103": "an op without a typing rule",
    "HX104": "a collective that is not waited for exactly once",
    "HX105": "collectives that the plan does not have, or too few of them",
    "HX106": "rank order: the heads a rank owns are not the o_proj rows it holds",
    "HX107": "duplicated work: more operations a rank than the plan's",
    "HX108": "ranks run different collectives",
    "HX109": "a layer call does not fit its body",
    "HX110": "a graph that is not well formed",
    "HX111": "an exchange that the plan overlaps with attention and the graph does not",
    "HX201": "a parameter shard of another rank or another view",
    "HX202": "a parameter shard whose values are not the original's",
    "HX203": "a parameter that is missing or has a wrong shape",
    "HX204": "a replicated parameter that differs",
    "HX301": "the ledger of who owns which token is not the round robin",
    "HX302": "a plan that contradicts itself or the model",
    "HX303": "the ranks' own top-k is not that over all of them",
    "HX401": "logits deviate from the original model",
    "HX402": "an attention output deviates on identical inputs",
    "HX403": "a layer's output deviates",
    "HX404": "a cache does not hold what it should",
    "HX405": "ranks return different logits",
    "HX406": "a value that is not finite",
    "HX407": "the captured graph deviates from the model",
    "HX408": "the router chooses other experts",
    "HX409": "logits of the two modules deviate from each other",
    "HX410": "a query attends to other keys than the indexer chooses",
    "HX411": "a compiled segment computes something else than its graph",
    "HX501": "the module faults while it runs",
    "HX502": "a deadlock, or ranks that disagree on a collective",
    "HX503": "the original model can't run",
    "HX504": "a path of the model that could not be compared with its graph",
}

# the bug families of served systems that a finding may point to
FAMILIES: dict[int, str] = {
    0: "unknown",
    1: "rank order",
    2: "shard from the wrong view",
    3: "head to KV-head map",
    4: "global positions used as local slots",
    5: "empty or short shard",
    6: "log-sum-exp base or statistics",
    7: "owner arithmetic at a boundary",
    8: "RoPE position",
    9: "option without effect",
    10: "collective missing, doubled or not waited for",
    11: "import order",
    12: "divisibility",
    13: "duplicated work",
    14: "mask or padding",
    15: "one workspace for several groups",
    16: "which keys are chosen",
}


@dataclass(frozen=True)
class Finding:
    """One deviation from what must hold.

    Attributes:
        code: stable, "HX401"; see CODES and docs/findings.md.
        where: stage, layer, node, rank, sequence, position: as far as they are known.
        got: what is there.
        expected: what should be.
        family: the likeliest bug family, a key of FAMILIES.
        check: "static" or "numeric".
    """

    code: str
    where: str
    got: str
    expected: str
    family: int = 0
    check: str = "static"

    @property
    def title(self) -> str:
        """What the code says in general."""
        return CODES[self.code]

    def __str__(self) -> str:
        family = f" [{FAMILIES[self.family]}]" if self.family else ""
        return f"{self.code} {self.title}{family}\n  at {self.where}\n  got {self.got}\n  expected {self.expected}"


def numeric_finding(code: str, where: str, got: str, expected: str, family: int = 0) -> Finding:
    """A finding of a check that ran something."""
    return Finding(code, where, got, expected, family, "numeric")


@dataclass
class Coverage:
    """What was looked at; a check that was left out is a note of the report."""

    stages: list[str] = field(default_factory=list)
    ranks: int = 0
    nodes_typed: int = 0
    parameters: int = 0
    steps: int = 0
    tokens: int = 0
    longest_context: int = 0
    empty_shards: int = 0
    unequal_shards: int = 0
    block_boundaries: int = 0
    page_boundaries: int = 0
    padded_rows: int = 0
    idle_rows: int = 0
    needles: int = 0
    choices: int = 0
    tied_choices: int = 0
    conditioned: bool = False
    full_cache: bool = False
    largest_deviation: float = 0.0
    limit: float = 0.0

    def count_shards(self, tokens: list[int]) -> None:
        """A sequence with so many tokens on each CP rank was checked."""
        self.empty_shards += sum(n == 0 for n in tokens)
        self.unequal_shards += len(set(tokens)) > 1


@dataclass(frozen=True)
class VerificationReport:
    """Result of verify(). `ok` is True when nothing was found; print it, or read `to_json()`.

    Attributes:
        findings: what is wrong, the first place first.
        notes: what was left out or seen and is not wrong (near-tied routers, memory bounds).
        coverage: what was looked at.
        model: name of the model.
        dtype: dtypes that were checked, e.g. "bfloat16" or "float64".
        seconds: how long it took.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    coverage: Coverage
    model: str
    dtype: str
    seconds: float

    @property
    def ok(self) -> bool:
        """True when nothing was found."""
        return not self.findings

    def to_json(self) -> str:
        """One JSON document with everything that print() shows."""
        return json.dumps(
            {
                "ok": self.ok,
                "model": self.model,
                "dtype": self.dtype,
                "seconds": round(self.seconds, 2),
                "findings": [{**asdict(f), "title": f.title, "family": FAMILIES[f.family]} for f in self.findings],
                "notes": list(self.notes),
                "coverage": asdict(self.coverage),
            },
            indent=1,
        )

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=110, highlight=False, no_color=True)
        verdict = "equivalent" if self.ok else f"NOT equivalent: {len(self.findings)} findings"
        console.print(f"{self.model} ({self.dtype}): {verdict} ({self.seconds:.1f} s)", markup=False)
        for finding in self.findings:
            console.print(str(finding), markup=False, soft_wrap=True)
        console.print(_coverage_table(asdict(self.coverage)))
        for note in self.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined] # StringIO


def _coverage_table(facts: dict[str, Any]) -> Table:
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    table.add_column("checked")
    table.add_column("")
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        table.add_row(name.replace("_", " "), f"{text:.2g}" if isinstance(text, float) else str(text))
    return table


def grouped(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings in order; those that differ only in numbers (layers, ranks) are told once, with how many there are."""
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        place = re.sub(r"\d+", "#", finding.where.split(";")[0])
        groups.setdefault((finding.code, finding.check, place), []).append(finding)
    return tuple(
        group[0] if len(group) == 1 else replace(group[0], where=f"{group[0].where} (and {len(group) - 1} like it)")
        for group in groups.values()
    )


@dataclass
class Check:
    """Findings, notes and coverage of a run; `dtypes` are those that were checked."""

    dtypes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def merge(self, other: Check) -> None:
        """Take over what another dtype has shown."""
        self.dtypes += other.dtypes
        self.findings += [replace(f, where=f"{other.dtypes[0]}: {f.where}") for f in other.findings]
        self.notes += [f"in {other.dtypes[0]}: {n}" for n in other.notes]
        for name in ("steps", "tokens", "needles", "choices", "tied_choices", "empty_shards", "unequal_shards"):
            total = getattr(self.coverage, name) + getattr(other.coverage, name)
            setattr(self.coverage, name, total)

    def guarded(self, where: str, run: Callable[[], Any]) -> Any:
        """run(), or None and a finding: whatever the module under test makes a check do, verify() does not raise."""
        try:
            return run()
        except Exception as error:
            self.findings.append(fault(error, where))
            return None


class OriginalFails(HelixError):
    """The original model raised: there is nothing to compare with, and the module under test is not to blame."""


def fault(error: Exception, where: str) -> Finding:
    """A finding for an exception of the module under test."""
    if isinstance(error, OriginalFails):
        expected = "an original that runs by itself: change its own settings, such as the experts' implementation"
        return numeric_finding("HX503", where, str(error), expected)
    text = str(error)
    collective = "deadlock" in text or "ranks disagree" in text or "waited for" in text
    pending = "wait" in text and not text.startswith("deadlock")
    got = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    family = 10 if collective or pending else 0
    return numeric_finding("HX502" if collective else "HX501", where, got, "a step that runs", family)
