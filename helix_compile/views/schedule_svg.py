"""NAME.schedule.svg: the predicted schedule of a layer on one rank. Time goes to the right, a lane for compute and one for the link.

A box is a node that takes time; a hatched one is compute that waits for the link. A line leads from the end of a collective to its wait.
"""

from __future__ import annotations

from html import escape

from helix_compile.predict.schedule import COMPUTE, LINK, BodySchedule, Event
from helix_compile.views.layer_svg import LETTER, LIGHT

WIDTH, LEFT, LANE, GAP, TOP = 1160, 76, 44, 26, 62
_Y = {COMPUTE: TOP, LINK: TOP + LANE + GAP}
STYLE = """
.lane { fill: #f5f6f7; }
.lane-name, .tick { font-size: 11px; fill: #5b626c; }
.compute { fill: #e8f1f8; stroke: #3a7ca8; stroke-width: .6; }
.attention { fill: #3a7ca8; stroke: #3a7ca8; stroke-width: .6; }
.link { fill: #b8500c; stroke: #ffffff; stroke-width: .6; }
.wait { fill: url(#hatched); stroke: #b8500c; stroke-width: .6; }
.name { font-size: 10px; }
.attention-name, .link-name { font-size: 10px; fill: #ffffff; }
.meets { stroke: #b8500c; stroke-width: 1; stroke-dasharray: 3 2; fill: none; }
"""


def format_schedule_svg(title: str, schedule: BodySchedule, rank: int = 0) -> str:
    """The picture of one body, on its own."""
    events = [e for e in schedule.events if e.rank == rank]
    total = schedule.seconds or 1.0
    scale = (WIDTH - LEFT - 12) / total
    ends = {e.node: e.end for e in events if e.thread == LINK}
    boxes = [_box(e, scale) for e in events]
    lines = [_line(ends[e.waits_for], e.end, scale) for e in events if e.waits_for is not None]
    height = _Y[LINK] + LANE + 46
    lanes = (
        f'<rect class="lane" x="{LEFT}" y="{y}" width="{total * scale:.2f}" height="{LANE}"/>'
        f'<text class="lane-name" x="8" y="{y + LANE / 2 + 4:.0f}">{name}</text>'
        for name, y in _Y.items()
    )
    ticks = (
        f'<text class="tick" x="{LEFT + total * scale * i / 4:.1f}" y="{height - 22}" text-anchor="{("start", "middle", "end")[(i > 0) + (i == 4)]}">'
        f"{1e6 * total * i / 4:.1f} us</text>"
        for i in range(5)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{escape(LIGHT + STYLE, quote=False)}</style>"
        '<defs><pattern id="hatched" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#fbeee5"/><line x1="0" y1="0" x2="0" y2="6" stroke="#b8500c" stroke-width="1.4"/></pattern></defs>'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/><text class="heading" x="8" y="24">{escape(title)}</text>'
        f'<text class="tick" x="8" y="44">{escape(_summary(schedule, rank))}</text>'
        + "\n".join((*lanes, *boxes, *lines, *ticks))
        + "</svg>\n"
    )


def _summary(schedule: BodySchedule, rank: int) -> str:
    link = sum(e.seconds for e in schedule.events if e.rank == rank and e.thread == LINK)
    held = sum(schedule.held(rank).values())
    return (
        f"predicted, not measured: {1e6 * schedule.seconds:.1f} us; the link is busy for {1e6 * link:.1f} us, compute waits for "
        f"{1e6 * held:.1f} us of them, {1e6 * max(0.0, link - held):.1f} us are hidden"
    )


def _box(event: Event, scale: float) -> str:
    kind = "wait" if event.waits_for is not None else LINK if event.thread == LINK else COMPUTE
    if kind == COMPUTE and event.cost.cache_bytes:
        kind = "attention"
    x, width, y = LEFT + event.start * scale, event.seconds * scale, _Y[event.thread]
    what = f"waits for {event.waits_for.name}" if event.waits_for is not None else event.node.name
    name = what if len(what) * LETTER + 8 < width else ""
    style = f"{kind}-name" if kind in ("attention", LINK) else "name"
    return (
        f'<g data-node="{escape(event.node.name)}"><title>{escape(what)}: {1e6 * event.start:.2f} to {1e6 * event.end:.2f} us</title>'
        f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{LANE}"/>'
        f'<text class="{style}" x="{x + 4:.2f}" y="{y + LANE / 2 + 4:.0f}">{escape(name)}</text></g>'
    )


def _line(started_until: float, waited_until: float, scale: float) -> str:
    """From the end of a collective, up to where compute goes on with what it brought."""
    x, to = LEFT + started_until * scale, LEFT + waited_until * scale
    y, middle, top = _Y[LINK], _Y[LINK] - GAP / 2, _Y[COMPUTE] + LANE
    return f'<path class="meets" d="M{x:.2f} {y} L{x:.2f} {middle:.1f} L{to:.2f} {middle:.1f} L{to:.2f} {top}"/>'
