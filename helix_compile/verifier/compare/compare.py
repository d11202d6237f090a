"""compare(): two plans, two saved modules, two runs, or a run and another engine's attention outputs, side by side.

So a wrong rank is found where verify() can't run: it needs no model and no process group, only what both runs wrote.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.compare.dumps import Dump, is_dump, open_dump
from helix_compile.verifier.compare.engine import open_engine_folder
from helix_compile.verifier.compare.page import format_page
from helix_compile.verifier.compare.plans import PlansCompared, compare_plans, compare_saved
from helix_compile.verifier.compare.runs import Run, RunsCompared, compare_runs
from helix_compile.verifier.compare.words import format_plans, format_runs

Side = HelixPlan | str | Path


@dataclass(frozen=True)
class Comparison:
    """Result of compare(): print it, or read to_json(); `equal` is True when nothing differs.

    Attributes:
        a, b: what was compared, in words.
        found: of plans or of runs.
    """

    a: str
    b: str
    found: PlansCompared | RunsCompared

    @property
    def equal(self) -> bool:
        """Nothing differs beyond the tolerance of its dtype."""
        return self.found.equal

    def __str__(self) -> str:
        head = [f"A: {self.a}", f"B: {self.b}"]
        body = format_plans(self.found) if isinstance(self.found, PlansCompared) else format_runs(self.found)
        return "\n".join([*head, *body])

    def to_json(self) -> str:
        """One JSON document; infinite deviations are the text "inf"."""
        kind = "plans" if isinstance(self.found, PlansCompared) else "runs"
        facts = {"kind": kind, "equal": self.equal, "a": self.a, "b": self.b, **_plain(asdict(self.found))}
        return json.dumps(facts, indent=1)

    def write_html(self, path: str | Path) -> None:
        """One self-contained page with the table, and of runs the picture of how the deviation grows.

        Raises:
            HelixError: the disk refuses.
        """
        path = Path(path)
        page = format_page(self.a, self.b, self.found, str(self))
        with StagedFiles(path.absolute().parent, "compare") as files:
            files.write_text(path.name, page)
            files.move()


def compare(a: Side, b: Side, *, tolerance: float | None = None) -> Comparison:
    """What differs between two plans, two saved modules or two runs.

    Args:
        a, b: both of the first kind, or both of the second. Plans: a HelixPlan, a plan.json or a folder with one, a folder
            of save(). Runs: a folder that HELIX_DUMP_VALUES named, or one of .safetensors files with another engine's
            attention outputs, layer_{i}.attn_out.
        tolerance: largest deviation of a floating-point value over its largest element, in place of that of its dtype
            (float64 1e-10, float32 1e-5, bfloat16 2e-2, float16 5e-3).

    Raises:
        HelixError: neither, a plan and a run, or files that are damaged; names the file.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise HelixError(f"compare: tolerance must be a number >= 0, got {tolerance}")
    mine, theirs = _opened(a), _opened(b)
    plans = [side for side in (mine, theirs) if isinstance(side, _Plan)]
    if len(plans) == 1:
        raise HelixError(f"compare: {a} and {b} are a plan and a run; give two plans, two saved modules or two runs")
    if isinstance(mine, _Plan) and isinstance(theirs, _Plan):
        if tolerance is not None:
            raise HelixError("compare: a tolerance has no effect on plans and saved modules: they are equal or not")
        found = PlansCompared(compare_plans(mine.plan, theirs.plan))
        if mine.saved and theirs.saved:
            if found.equal:
                found.differences += compare_saved(mine.saved, theirs.saved)
            else:
                found.notes.append("graphs and weights of unlike plans are not compared")
        return Comparison(str(mine), str(theirs), found)
    assert not isinstance(mine, _Plan) and not isinstance(theirs, _Plan)
    runs = compare_runs(mine, theirs, tolerance)
    if isinstance(mine, Dump) and isinstance(theirs, Dump) and (unlike := compare_plans(mine.plan, theirs.plan)):
        first = "; ".join(str(d) for d in unlike[:4])
        runs.notes.append(f"their plans differ in {len(unlike)} places: {first}")
    return Comparison(str(mine), str(theirs), runs)


@dataclass(frozen=True)
class _Plan:
    """A plan, and the folder of save() that it is of."""

    plan: HelixPlan
    name: str
    saved: Path | None = None

    def __str__(self) -> str:
        d = self.plan.layout
        return f"{self.name}: {self.plan.model} ({self.plan.dtype}), cp={d.kvp}, tpa={d.tpa}, ep={d.ep}, tpf={d.tpf}"


def _opened(side: Side) -> _Plan | Run:
    if isinstance(side, HelixPlan):
        return _Plan(side, "plan")
    path = Path(side)
    if not path.exists():
        raise HelixError(f"compare: {path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".json":
            raise HelixError(f"compare: {path}: expected a plan.json or a folder")
        return _plan_of(path, str(path), None)
    if is_dump(path):
        return open_dump(path)
    if (path / "plan.json").exists():
        return _plan_of(path / "plan.json", str(path), path if (path / "graphs.json").exists() else None)
    if any(path.glob("*.safetensors")):
        return open_engine_folder(path)
    raise HelixError(
        f"compare: {path}: neither a plan (plan.json), a dump (rank_R_step_S.json, see HELIX_DUMP_VALUES) nor .safetensors files "
        "with layer_{i}.attn_out"
    )


def _plan_of(path: Path, name: str, saved: Path | None) -> _Plan:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HelixError(f"compare: {path}: can't be read: {error}") from error
    return _Plan(HelixPlan.from_json(text), name, saved)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
