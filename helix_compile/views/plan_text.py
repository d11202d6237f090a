"""What a planner found, for a terminal: the plan and why, the front as a table, cp = 1 against cp > 1, what would change it."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from helix_compile.predict.planner import Planned, counted
from helix_compile.predict.search import Point

LAYOUT = ("cp", "tpa", "ep", "tpf")


def format_plan(planned: Planned, width: int = 132) -> str:
    """The facts of a plan as text. Every time and rate in it is predicted; the word stands in each title."""
    facts, console = planned.facts, Console(file=StringIO(), width=width, highlight=False, no_color=True)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(
        f"predicted, not measured: {facts['model']} ({facts['dtype']}; weights {facts['weights']}, cache {facts['kv_dtype']}) on "
        f"{facts['ranks']} x {facts['gpu']}, {facts['context']:,} tokens of context"
    )
    best = facts["recommended"]
    say(f"recommended (predicted): {_named(best) if best else 'nothing'}")
    for reason in facts["reasons"]:
        say(f"  {reason}")
    console.print(_front(planned))
    console.print(_by_batch(facts["by_batch"]))
    for row in facts["by_batch"]:
        if row["winner"] in ("cp=1", "equal"):
            say(row["text"])
    if facts["sensitivity"]:
        rows = ((s["if"], s["changes"] or "the same plan") for s in facts["sensitivity"])
        console.print(_table("what would change it (predicted)", ("if", "then"), rows))
    if facts["calibration"]:
        console.print(_residuals(facts["calibration"]))
    say("assumed:")
    for line in facts["assumptions"]:
        say(f"  {line}")
    looked = facts["looked_at"]
    say(f"looked at {looked['plans']:,} layouts and batches, of which {looked['fit']:,} fit")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined] # StringIO


def _named(row: dict[str, Any]) -> str:
    extras = [
        f"{k}={row[k]}"
        for k in ("merge", "q_proj", "v_up", "overlap")
        if row["cp"] > 1 and row[k] not in ("a2a", "replicate", "auto", "none")
    ]
    extras += ["pad_heads"] if row["pad_heads"] else []
    layout = ", ".join(f"{k}={row[k]}" for k in LAYOUT)
    return (
        f"{layout}{''.join(f', {x}' for x in extras)}, batch {row['batch']} on {counted(row['ranks'], 'rank')}: "
        f"{row['tokens_per_s_per_user']:,.1f} tokens/s a user, {row['tokens_per_s_per_gpu']:,.1f} tokens/s a GPU"
    )


def _front(planned: Planned) -> Table:
    rows = (_front_row(p, bool(planned.outside(p))) for p in planned.front)
    heads = (
        *LAYOUT,
        "batch",
        "merge, q_proj, v_up, overlap",
        "tokens/s/user",
        "tokens/s/GPU",
        "KV GB/rank",
        "GB/rank",
        "tokens that fit",
    )
    return _table("Pareto front (predicted)", heads, rows, numeric=(0, 1, 2, 3, 4, 6, 7, 8, 9, 10))


def _front_row(point: Point, beyond: bool) -> tuple[str, ...]:
    own = point.candidate
    how = (own.merge, own.q_proj, *(x for x in (own.v_up, own.overlap) if x not in ("auto", "none")))
    exchange = "-" if own.cp == 1 else ", ".join(how)
    return (
        *(str(getattr(own, name)) for name in LAYOUT),
        str(point.batch),
        exchange + (" (extrapolated)" if beyond else ""),
        f"{point.tokens_per_s_per_user:,.1f}",
        f"{point.tokens_per_s_per_gpu:,.1f}",
        f"{point.kv_bytes_per_rank / 1e9:,.1f}",
        f"{point.bytes_per_rank / 1e9:,.1f}",
        f"{point.tokens_that_fit:,}",
    )


def _by_batch(rows: list[dict[str, Any]]) -> Table:
    def cell(row: dict[str, Any] | None, exists: bool) -> str:
        return (
            ("does not fit" if exists else "no such layout")
            if row is None
            else f"{row['step_us']:,.0f} us (cp={row['cp']}, tpa={row['tpa']}, ep={row['ep']})"
        )

    ranks = rows[0]["ranks"] if rows else 0
    body = (
        (
            str(r["batch"]),
            *(cell(r[side], exists) for side, exists in zip(("cp_1", "helix"), r["exist"], strict=True)),
            r["winner"],
        )
        for r in rows
    )
    return _table(
        f"Helix or not, on {counted(ranks, 'rank')} (predicted)",
        ("batch", "best with cp=1", "best with cp>1", "faster"),
        body,
        numeric=(0,),
    )


def _residuals(facts: dict[str, Any]) -> Table:
    rows = (
        (
            *(f"{r[k]:,}" for k in ("cp", "tpa", "ep", "batch", "context")),
            f"{r['measured_us']:,.1f}",
            f"{r['fitted_us']:,.1f}",
            f"{r['residual_us']:+,.1f}",
        )
        for r in facts["residuals"]
    )
    heads = ("cp", "tpa", "ep", "batch", "context", "measured us", "fitted us", "residual us")
    return _table("calibration: measured against fitted", heads, rows, numeric=tuple(range(8)))


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], numeric: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False, title=title, title_justify="left", title_style="")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if i in numeric else "left")
    for row in rows:
        table.add_row(*row)
    return table
