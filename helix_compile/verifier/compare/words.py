"""A comparison as text for a terminal."""

from __future__ import annotations

from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from helix_compile.runtime.values import ATTENTION_OUTPUT, LAYER_OUTPUT, LOGITS
from helix_compile.verifier.compare.plans import PlansCompared
from helix_compile.verifier.compare.runs import Difference, LayerDeviation, RunsCompared
from helix_compile.verifier.compare.whole import DTYPE, SHAPE

SHOWN = 12


def format_plans(found: PlansCompared) -> list[str]:
    """One line a difference, by what it is about."""
    if found.equal:
        return ["nothing differs", *found.notes]
    lines = []
    for about in dict.fromkeys(d.about for d in found.differences):
        mine = [d for d in found.differences if d.about == about]
        lines.append(f"{about}: {len(mine)} differ{'s' * (len(mine) == 1)} (A -> B)")
        lines += [f"  {d}" for d in mine[:SHOWN]]
        if len(mine) > SHOWN:
            lines.append(f"  and {len(mine) - SHOWN} more (--json has all)")
    return lines + found.notes


def format_runs(found: RunsCompared) -> list[str]:
    """The first value that differs, who contradicts whom, weights, and the table of layers."""
    how = "rank by rank" if found.by_rank else "by what means the same, joined over the ranks"
    lines = [f"{found.compared:,} values of {found.steps} steps compared {how}"]
    if found.equal:
        worst = max(found.growth, key=lambda g: g.off, default=None)
        tail = (
            f"; largest deviation {worst.off:.1e}, {worst.place} {worst.role}"
            if worst and worst.off
            else ", not in one bit"
            if found.by_rank
            else ""
        )
        lines.append(f"nothing differs{tail}")
    if found.first is not None:
        lines += ["first value that differs:", *_of_difference(found.first)]
    for d in found.contradictions:
        lines += [f"ranks of {d.run} do not agree on what all must have alike, first:", *_of_difference(d)]
    if found.parameters:
        lines.append(f"weights that differ: {len(found.parameters)}")
        lines += [f"  {place_of(d)}, {said_ranks(d.ranks)}: {said_values(d)}" for d in found.parameters[:SHOWN]]
    for run, names in found.only.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"nodes that only {run} has: {', '.join(sorted(names)[:SHOWN])}{more}")
    for run, names in found.lacking.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"values that some ranks of {run} lack: {', '.join(names[:SHOWN])}{more}")
    return [*lines, "", *_table(found.growth), *found.notes]


def place_of(d: Difference) -> str:
    """Such as layer_1.mul_1."""
    return f"{d.place}.{d.node}"


def said_ranks(ranks: tuple[int, ...]) -> str:
    """Such as "ranks 1, 2" or "ranks 0-63"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [f"{a}-{b}" if b > a + 1 else f"{a}, {b}" if b > a else f"{a}" for a, b in runs]
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(texts)}"


def said_values(d: Difference) -> str:
    """What was furthest off, of both."""
    if d.what in (SHAPE, DTYPE):
        return f"has another {d.what} in each"
    a, b = d.values
    what = f"{d.what} {list(d.at)}" if d.at else d.what
    return f"off by {d.off:.1e} of the largest element ({what}: A {a:.6g}, B {b:.6g})"


def _of_difference(d: Difference) -> list[str]:
    made = ", ".join(filter(None, (d.role, d.op, d.source)))
    limit = f"tolerance {d.tolerance:.0e}" if d.tolerance else "they must be equal"
    limit += f" ({d.narrowest} is the narrowest on its path)" if d.narrowest else ""
    lines = [
        f"  step {d.step}, {place_of(d)} {list(d.shape)}, {said_ranks(d.ranks)}",
        f"  {made}" if made else "",
        f"  {_said_of_run(d) if d.run else said_values(d)}; {limit}",
    ]
    reads = [f"{name} {verdict}" for name, verdict in d.reads if verdict]
    if reads:
        lines.append(f"  it reads: {', '.join(reads)}")
    return [line for line in lines if line]


def _said_of_run(d: Difference) -> str:
    """Both values are of one run here: of most ranks, and of the odd one."""
    if d.what in (SHAPE, DTYPE):
        return f"has not the {d.what} that most ranks have"
    usual, odd = d.values
    what = f"{d.what} {list(d.at)}" if d.at else d.what
    return f"off by {d.off:.1e} of the largest element ({what}: most ranks {usual:.6g}, rank {d.ranks[0]} {odd:.6g})"


def growth_rows(growth: list[LayerDeviation]) -> tuple[list[str], list[tuple[str, dict[str, LayerDeviation]]]]:
    """(roles, rows): for each layer and then the logits, by role the largest deviation over the steps."""
    rows: dict[str, dict[str, LayerDeviation]] = {}
    for g in growth:
        row = rows.setdefault(g.place if g.role != LOGITS else LOGITS, {})
        if g.role not in row or g.off > row[g.role].off:
            row[g.role] = g
    roles = sorted(
        {role for row in rows.values() for role in row if role != LOGITS}, key=lambda r: (r == LAYER_OUTPUT, r)
    )
    return roles, list(rows.items())


ROLE_TITLES = {ATTENTION_OUTPUT: "attention output", LAYER_OUTPUT: "layer output", LOGITS: "logits"}


def title_of(role: str) -> str:
    """A role for readers; a second attention of a layer keeps its number."""
    base, _, number = role.partition(f"{ATTENTION_OUTPUT}_")
    return f"attention output {int(number) + 1}" if number and not base else ROLE_TITLES.get(role, role)


def cell_of(deviation: LayerDeviation | None) -> str:
    """Such as "1.2e-03 rank 2 !": the mark says that it is more than its tolerance."""
    if deviation is None:
        return ""
    if not deviation.off:
        return "0"
    beyond = deviation.off > deviation.tolerance
    return f"{deviation.off:.1e}" + (f" {said_ranks(deviation.ranks)} !" if beyond else "")


def _table(growth: list[LayerDeviation]) -> list[str]:
    roles, rows = growth_rows(growth)
    if not rows:
        return []
    table = Table(box=box.ASCII2, show_edge=False)
    for title in ("layer", *map(title_of, roles)):
        table.add_column(title)
    for place, row in rows:
        cells = [cell_of(row.get(role)) for role in roles]
        if place == LOGITS:
            cells = [*cells[:-1], cell_of(row[LOGITS])]
        table.add_row(place, *cells)
    out = StringIO()
    Console(file=out, width=100, color_system=None).print(table)
    return [
        "largest deviation over the steps (!: beyond the tolerance)",
        *(line.rstrip() for line in out.getvalue().splitlines()),
    ]
