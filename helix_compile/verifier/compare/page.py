"""A comparison as one self-contained HTML page: the text, the table, and how the deviation grows over layers as SVG."""

from __future__ import annotations

import math
from html import escape

from helix_compile.runtime.values import LOGITS
from helix_compile.verifier.compare.plans import PlansCompared
from helix_compile.verifier.compare.runs import LayerDeviation, RunsCompared
from helix_compile.verifier.compare.words import cell_of, growth_rows, title_of
from helix_compile.views.report import page_style

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 300, 64, 40, 14, 40
FLOOR = -17  # log10 of what is drawn as equal: below float64's own rounding
STYLE = """
pre { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; background: var(--band); padding: 12px; }
.growth { display: block; width: 100%; min-width: 560px; max-width: 900px; height: auto; }
.growth text { font-size: 11px; fill: var(--muted); } .growth .grid { stroke: var(--rule); }
.growth .limit { stroke: var(--ink); stroke-dasharray: 4 3; }
.growth polyline { fill: none; stroke-width: 2; }
.s0 { stroke: var(--sharded); fill: var(--sharded); } .s1 { stroke: var(--partial); fill: var(--partial); }
.s2 { stroke: var(--per-rank); fill: var(--per-rank); } .growth circle.over { stroke: var(--ink); stroke-width: 1.5; }
td.over { color: var(--partial); font-weight: 600; } table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; text-align: left; }
"""


def format_page(a: str, b: str, found: PlansCompared | RunsCompared, text: str) -> str:
    """The page; `text` is what a terminal shows."""
    verdict = "Nothing differs" if found.equal else "They differ"
    sections = [f"<h1>{verdict}</h1><p class='sub'>A: {escape(a)}</p><p class='sub'>B: {escape(b)}</p>"]
    if isinstance(found, RunsCompared) and found.growth:
        sections.append(f"<h2>How the deviation grows</h2>{_picture(found.growth)}{_table(found.growth)}")
    sections.append(f"<h2>In words</h2><pre>{escape(text)}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>helix-compile compare: {verdict}</title><style>{page_style()}{STYLE}</style></head><body>\n"
        f"<main>{''.join(sections)}</main>\n</body></html>\n"
    )


def _table(growth: list[LayerDeviation]) -> str:
    roles, rows = growth_rows(growth)
    head = "".join(f"<th>{escape(title_of(role))}</th>" for role in (*roles, LOGITS))
    lines = []
    for place, row in rows:
        cells = [row.get(role) for role in (*roles, LOGITS)]
        marks = ["over" if c is not None and c.off > c.tolerance else "" for c in cells]
        texts = "".join(f'<td class="{m}">{escape(cell_of(c))}</td>' for m, c in zip(marks, cells, strict=True))
        lines.append(f"<tr><td>{escape(place)}</td>{texts}</tr>")
    return f'<div class="scroll"><table><tr><th>layer</th>{head}</tr>{"".join(lines)}</table></div>'


def _picture(growth: list[LayerDeviation]) -> str:
    roles, rows = growth_rows(growth)
    layers = [(place, row) for place, row in rows if place != LOGITS]
    heights = [_log(d.off) for _, row in layers for d in row.values()]
    limit = max(d.tolerance for d in growth)
    top = math.ceil(max([*heights, _log(limit)])) + 1
    bottom = max(FLOOR, math.floor(min([*(h for h in heights if h > FLOOR), _log(limit)])) - 1)

    def x(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number / max(1, len(layers) - 1))

    def y(log: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - max(min(log, top), bottom)) / (top - bottom)

    parts = []
    for log in range(bottom, top + 1, max(1, (top - bottom) // 6)):
        label = "0" if log == bottom else f"1e{log}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(log):.1f}" y2="{y(log):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(log) + 4:.1f}" text-anchor="end">{label}</text>')
    for number in range(0, len(layers), max(1, len(layers) // 10)):
        parts.append(
            f'<text x="{x(number):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(layers[number][0])}</text>'
        )
    at = y(_log(limit))
    parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    parts.append(f'<text x="{LEFT + 6}" y="{at - 5:.1f}">tolerance {limit:.0e}</text>')
    for number, role in enumerate(roles):
        points = [(x(i), y(_log(row[role].off)), row[role]) for i, (_, row) in enumerate(layers) if role in row]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f'<polyline class="s{number % 3}" points="{line}"/>')
        for px, py, d in points:
            over = " over" if d.off > d.tolerance else ""
            said = escape(f"{d.place} {title_of(role)}: {cell_of(d)}, step {d.step}")
            parts.append(
                f'<circle class="s{number % 3}{over}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{said}</title></circle>'
            )
        parts.append(
            f'<circle class="s{number % 3}" cx="{LEFT + 8 + 170 * number}" cy="{HEIGHT - 4}" r="3"/>'
            f'<text x="{LEFT + 16 + 170 * number}" y="{HEIGHT}">{escape(title_of(role))}</text>'
        )
    label = "largest deviation of each layer, over its largest element, logarithmic"
    return (
        f'<div class="scroll"><svg class="growth" viewBox="0 0 {WIDTH} {HEIGHT + 6}" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg></div>"
    )


def _log(off: float) -> float:
    if off == math.inf:
        return 1.0
    return max(math.log10(off), FLOOR) if off > 0 else FLOOR
