"""The picture that long-context tests are known by: context along, depth of the needle down, the score as a colour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from helix_compile.eval.scoring import Answered

DEPTHS = 10
_CELL_WIDTH, _CELL_HEIGHT, _LEFT, _TOP, _GAP = 56, 22, 64, 46, 26
_STYLE = """
text { font: 11px ui-sans-serif, system-ui, "Helvetica Neue", Arial, sans-serif; fill: #1c1f23; }
.paper { fill: #ffffff; } .heading { font-size: 13px; font-weight: 600; } .quiet { fill: #5b626c; }
.cell { stroke: #ffffff; } .cell-text { font-size: 10px; fill: #1c1f23; text-anchor: middle; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #16191d; } text { fill: #e6e8eb; } .quiet { fill: #a2a9b3; } .cell { stroke: #16191d; } .cell-text { fill: #1c1f23; }
}
"""


def short_count(tokens: int) -> str:
    """65536 -> "64K"."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


def format_heat_map(answered: Mapping[str, Sequence[Answered]], title: str = "") -> str:
    """SVG with a panel for each task and each who answered; a cell is right / asked of questions that deep.

    Args:
        answered: who ("original", "helix") -> all its answers, of any tasks and contexts.
        title: of the whole.
    """
    tasks = list(dict.fromkeys(a.task for answers in answered.values() for a in answers))
    contexts = sorted({a.context for answers in answered.values() for a in answers})
    panel_width = _LEFT + _CELL_WIDTH * len(contexts) + _GAP
    panel_height = _TOP + _CELL_HEIGHT * (DEPTHS + 1) + _GAP
    width, height = max(panel_width * len(answered), 300), 28 + panel_height * len(tasks)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="heading" x="12" y="20">{escape(title)}</text>',
    ]
    for row, task in enumerate(tasks):
        for column, (who, answers) in enumerate(answered.items()):
            own = [a for a in answers if a.task == task]
            parts.append(f'<g transform="translate({column * panel_width},{28 + row * panel_height})">')
            parts += _panel(f"{task}: {who}", own, contexts)
            parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(heading: str, answered: Sequence[Answered], contexts: Sequence[int]) -> list[str]:
    cells: dict[tuple[int, int], list[bool]] = defaultdict(list)
    for answer in answered:
        cells[_row(answer.depth), answer.context].append(answer.is_correct)
    parts = [f'<text class="heading" x="12" y="18">{escape(heading)}</text>']
    for column, context in enumerate(contexts):
        x = _LEFT + (column + 0.5) * _CELL_WIDTH
        parts.append(f'<text class="quiet" x="{x}" y="{_TOP - 8}" text-anchor="middle">{short_count(context)}</text>')
    for row in range(DEPTHS + 1):
        if row == DEPTHS and not any(r == DEPTHS for r, _ in cells):
            continue
        y = _TOP + row * _CELL_HEIGHT
        label = f"{100 * row // DEPTHS} %" if row < DEPTHS else "said after"
        parts.append(f'<text class="quiet" x="{_LEFT - 6}" y="{y + 15}" text-anchor="end">{label}</text>')
        for column, context in enumerate(contexts):
            if not (right := cells[row, context]):
                continue
            x = _LEFT + column * _CELL_WIDTH
            share = sum(right) / len(right)
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{_CELL_WIDTH}" height="{_CELL_HEIGHT}" fill="{_colour(share)}"/>'
                f'<text class="cell-text" x="{x + _CELL_WIDTH / 2}" y="{y + 15}">{sum(right)}/{len(right)}</text>'
            )
    return parts


def _row(depth: float | None) -> int:
    return DEPTHS if depth is None else min(int(depth * DEPTHS), DEPTHS - 1)


def _colour(share: float) -> str:
    """Red over yellow to green; told apart without colours by the numbers."""
    low, middle, high = (232, 112, 96), (247, 214, 112), (116, 196, 128)
    first, second, at = (low, middle, share * 2) if share < 0.5 else (middle, high, share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * at):02x}" for a, b in zip(first, second, strict=True))
