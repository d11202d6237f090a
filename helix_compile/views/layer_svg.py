"""NAME.svg: a body before and after, side by side. Drawn in plain Python; Graphviz is not asked for.

A picture holds shapes and class names; colours come from a style sheet, so that the report can draw it dark. The
file on its own brings LIGHT with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from helix_compile.views.graph_view import EdgeView, GraphView, NodeView
from helix_compile.views.lanes import TRACKS, Lanes, place

NODE_WIDTH, NODE_HEIGHT, ROW = 212, 38, 68
LANE_GAP, TRACK_WIDTH, MARGIN = 18, 15, 12
PORT = 80  # how far from the middle of a box a line from the side enters
CROSSING = 20  # where in a gap between rows lines run sideways
LETTER = 5.8  # width of a letter of an edge label
TITLE_LETTER, SMALL_LETTER = 6.9, 5.6

LIGHT = """
text { font-family: ui-sans-serif, system-ui, "Helvetica Neue", Arial, sans-serif; fill: #1c1f23; }
.paper { fill: #ffffff; }
.heading { font-size: 15px; font-weight: 600; }
.band { fill: #f5f6f7; }
.band-title { font-size: 10px; fill: #6a717b; letter-spacing: .04em; }
.box { fill: #ffffff; stroke: #b9bfc7; }
.input .box, .output .box, .cache .box { fill: none; stroke-dasharray: 3 2; }
.helix .box { fill: #e8f1f8; stroke: #3a7ca8; }
.collective .box { fill: #b8500c; stroke: #b8500c; }
.collective text { fill: #ffffff; }
.title { font-size: 12px; font-weight: 600; }
.op, .detail, .made { font-size: 10px; fill: #5b626c; }
.made { fill: #2f6a92; }
.line { fill: none; stroke: #9aa1ab; stroke-width: 1.2; }
.tip { fill: #9aa1ab; }
.line.sharded { stroke: #3a7ca8; } .tip.sharded { fill: #3a7ca8; }
.line.partial { stroke: #b8500c; stroke-dasharray: 5 3; } .tip.partial { fill: #b8500c; }
.line.per-rank { stroke: #7a6aa8; stroke-dasharray: 1.5 2.5; } .tip.per-rank { fill: #7a6aa8; }
.shape { font-size: 9.5px; fill: #5b626c; font-family: ui-monospace, Menlo, Consolas, monospace; }
.shape { paint-order: stroke; stroke: #fafafb; stroke-width: 3px; stroke-linejoin: round; }
.legend { font-size: 10px; fill: #5b626c; }
"""


LEGEND = (
    ("replicated", "the same on every rank"),
    ("sharded", "cut over ranks"),
    ("partial", "partial: needs a sum or a merge"),
    ("per-rank", "each rank its own"),
)


@dataclass(frozen=True)
class Panel:
    """One drawn graph: SVG elements and their size."""

    markup: str
    width: int
    height: int


def format_layer_svg(title: str, before: GraphView, after: GraphView) -> str:
    """The standalone picture of one body."""
    panels = [draw_panel(before), draw_panel(after)]
    top, gap = 66, 28
    width = sum(p.width for p in panels) + gap
    height = top + max(p.height for p in panels) + 40
    parts = [f'<text class="heading" x="{MARGIN}" y="28">{escape(title)}</text>']
    x = 0
    for name, panel in zip(("before", "after"), panels, strict=True):
        parts.append(f'<text class="heading" x="{x + MARGIN}" y="54">{name}</text>')
        parts.append(f'<g transform="translate({x} {top})">{panel.markup}</g>')
        x += panel.width + gap
    parts.append(_legend(MARGIN, height - 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{escape(LIGHT, quote=False)}</style>"
        f'<rect class="paper" width="{width}" height="{height}"/>' + "\n".join(parts) + "</svg>\n"
    )


def format_panel_svg(panel: Panel, label: str) -> str:
    """One graph as an element of an HTML page, without a style of its own."""
    return (
        f'<svg class="layer" role="group" aria-label="{escape(label)}" viewBox="0 0 {panel.width} {panel.height}" '
        f'width="{panel.width}" height="{panel.height}">{panel.markup}</svg>'
    )


def draw_panel(view: GraphView) -> Panel:
    """Draw one graph. Each node is <g class="node KIND" data-node="NAME">."""
    lanes = place(view)
    grid = _Grid(lanes)
    parts = _bands(view, lanes, grid)
    labels: list[str] = []
    for edge in view.edges:
        lines, label = _edge(edge, lanes, grid)
        parts.append(lines)
        labels.append(label)
    laid_out = any(v.layout for n in view.nodes for v in n.outputs)
    parts += [_node(n, lanes, grid, laid_out) for n in view.nodes]
    return Panel("\n".join(parts + labels), grid.width, lanes.rows * ROW)


class _Grid:
    """Coordinates of lanes, tracks and rows."""

    def __init__(self, lanes: Lanes):
        used = set(lanes.track.values())
        left = sorted((t for t in used if t < 0), reverse=True)
        x = MARGIN + len(left) * TRACK_WIDTH
        self.tracks = {t: x - (i + 1) * TRACK_WIDTH + 3 for i, t in enumerate(left)}
        self.lanes = []  # middle of each
        for lane in range(lanes.lanes):
            self.lanes.append(x + NODE_WIDTH // 2)
            x += NODE_WIDTH
            mine = sorted(t for t in used if t >= 0 and t // TRACKS == lane)
            for i, t in enumerate(mine):
                self.tracks[t] = x + (i + 1) * TRACK_WIDTH
            x += len(mine) * TRACK_WIDTH + LANE_GAP
        self.width = x - LANE_GAP + MARGIN

    @staticmethod
    def top(row: int) -> int:
        """The upper side of the boxes of a row."""
        return row * ROW + (ROW - NODE_HEIGHT) // 2


def _bands(view: GraphView, lanes: Lanes, grid: _Grid) -> list[str]:
    """One band for each submodule of the layer that has more than one box."""
    rows: dict[str, list[int]] = {}
    for node in view.nodes:
        if node.cluster:
            rows.setdefault(node.cluster, []).append(lanes.row[node.name])
    parts = []
    for cluster, levels in rows.items():
        if len(levels) < 2:
            continue
        y, height = min(levels) * ROW + 1, (max(levels) - min(levels) + 1) * ROW - 2
        parts.append(f'<rect class="band" x="4" y="{y}" width="{grid.width - 8}" height="{height}" rx="4"/>')
        parts.append(
            f'<text class="band-title" x="{grid.width - 12}" y="{y + 10}" text-anchor="end">{escape(cluster)}</text>'
        )
    return parts


def _node(node: NodeView, lanes: Lanes, grid: _Grid, laid_out: bool) -> str:
    x, y = grid.lanes[lanes.lane[node.name]] - NODE_WIDTH // 2, grid.top(lanes.row[node.name])
    layouts = ", ".join(dict.fromkeys(v.layout_text for v in node.outputs))
    if node.egress is not None:
        detail = f"{node.egress:,.0f} bytes a token"
    elif laid_out:
        detail = "replicated" if layouts == "R" else layouts
    else:
        detail = node.source
    made = "" if node.stage == "captured" else f"{node.stage} stage"
    room = NODE_WIDTH - 22 - len(node.subtitle) * SMALL_LETTER
    title = _cut(node.title, int(room / TITLE_LETTER))
    right = x + NODE_WIDTH - 9
    return (
        f'<g class="node {node.kind}" data-node="{escape(node.name)}" data-stage="{escape(node.stage)}" '
        f'tabindex="0" role="button"><title>{escape(node.title)}: {escape(node.op)}</title>'
        f'<rect class="box" x="{x}" y="{y}" width="{NODE_WIDTH}" height="{NODE_HEIGHT}" rx="3"/>'
        f'<text class="title" x="{x + 9}" y="{y + 15}">{escape(title)}</text>'
        f'<text class="op" x="{right}" y="{y + 15}" text-anchor="end">{escape(node.subtitle)}</text>'
        f'<text class="detail" x="{x + 9}" y="{y + 30}">{escape(_cut(detail, 21 if made else 36))}</text>'
        f'<text class="made" x="{right}" y="{y + 30}" text-anchor="end">{escape(made)}</text></g>'
    )


def _edge(edge: EdgeView, lanes: Lanes, grid: _Grid) -> tuple[str, str]:
    """The line of an edge with its tip, and its label."""
    key = (edge.source, edge.target)
    start, end = grid.lanes[lanes.lane[edge.source]], grid.lanes[lanes.lane[edge.target]]
    top = grid.top(lanes.row[edge.source]) + NODE_HEIGHT
    bottom = grid.top(lanes.row[edge.target])
    upright = key in lanes.track
    if upright:
        x = grid.tracks[lanes.track[key]]
    else:
        x = grid.lanes[lanes.run[key]] if key in lanes.run else end
    start, end = start + _port(x, start), end + _port(x, end)
    path = f"M{start} {top}" + _step(start, x, top)
    gap_below = bottom - (ROW - NODE_HEIGHT)
    path += _step(x, end, gap_below) + f"V{bottom - 4}"
    form = edge.form
    lines = (
        f'<path class="line {form}" d="{path}"><title>{escape(edge.label)}</title></path>'
        f'<path class="tip {form}" d="M{end - 3.5} {bottom - 6}h7l-3.5 6z"/>'
    )
    return lines, _label(edge, x, (top, bottom), upright, x == start)


def _step(x: int, end: int, top: int) -> str:
    """Down from the top of a gap between rows, and sideways below the labels that stand in it."""
    y, round_off = top + CROSSING, 5 if end > x else -5
    if x == end:
        return ""
    return f"V{y - 5}Q{x} {y} {x + round_off} {y}H{end - round_off}Q{end} {y} {end} {y + 5}"


def _label(edge: EdgeView, x: int, span: tuple[int, int], upright: bool, leaves: bool) -> str:
    """Beside the part of the line that runs straight; along it where the line has a track."""
    text, (top, bottom) = escape(edge.label), span
    if not upright:
        y = top if leaves else bottom - (ROW - NODE_HEIGHT)
        return f'<text class="shape" x="{x + 6}" y="{y + CROSSING - 7}">{text}</text>'
    if len(edge.label) * LETTER > bottom - top - 2 * (ROW - NODE_HEIGHT):
        return ""
    y = (top + bottom) // 2
    return f'<text class="shape" text-anchor="middle" transform="translate({x - 4} {y}) rotate(-90)">{text}</text>'


def _port(x: int, middle: int) -> int:
    """Where on its side a box is left or entered: on the side that the line comes from."""
    return 0 if x == middle else (PORT if x > middle else -PORT)


def _legend(x: int, y: int) -> str:
    parts = []
    for form, text in LEGEND:
        parts.append(f'<path class="line {form}" d="M{x} {y - 3}h26"/>')
        parts.append(f'<text class="legend" x="{x + 32}" y="{y}">{text}</text>')
        x += 52 + int(len(text) * 5.4)
    return "".join(parts)


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 2] + ".."
