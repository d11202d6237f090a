"""The predicted schedule of a layer on one rank as a picture. Time goes to the right, a lane for compute and one for the link.

A box is a node that takes time; a hatched one is compute that waits for the link. A line leads from the end of a collective to its wait.
NAME.schedule.svg is the picture alone; the report draws it in its own colours.
"""

from __future__ import annotations

from html import escape

from helix_compile.predict.schedule import COMPUTE, LINK, BodySchedule, Event
from helix_compile.views.layer_svg import LETTER, LIGHT, Panel

WIDTH, LEFT, LANE, GAP = 1080, 72, 44, 26
_Y = {COMPUTE: 4, LINK: 4 + LANE + GAP}
STYLE = """
.lane { fill: #f5f6f7; }
.lane-name, .tick { font-size: 11px; fill: #5b626c; }
.compute { fill: #e8f1f8; stroke: #3a7ca8; stroke-width: .6; }
.attention { fill: #3a7ca8; }
.link { fill: #b8500c; stroke: #ffffff; stroke-width: .6; }
.wait { stroke: #b8500c; stroke-width: .8; }
.hatch { stroke: #b8500c; stroke-width: 1.2; }
.name { font-size: 10px; }
.attention-name, .link-name { font-size: 10px; fill: #ffffff; }
.meets { stroke: #b8500c; stroke-width: 1; stroke-dasharray: 3 2; fill: none; }
"""


def format_schedule_svg(title: str, schedule: BodySchedule, rank: int = 0) -> str:
    """The picture of one body, on its own."""
    panel, top = draw_schedule(schedule, rank), 56
    height = panel.height + top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {panel.width} {height}" width="{panel.width}" height="{height}">'
        f"<style>{escape(LIGHT + STYLE, quote=False)}</style>"
        f'<rect class="paper" width="{panel.width}" height="{height}"/><text class="heading" x="8" y="24">{escape(title)}</text>'
        f'<text class="tick" x="8" y="44">{escape(summary(schedule, rank))}</text>'
        f'<g transform="translate(0 {top})">{panel.markup}</g></svg>\n'
    )


def summary(schedule: BodySchedule, rank: int = 0) -> str:
    """What of the link is hidden, in words."""
    link = sum(e.seconds for e in schedule.events if e.rank == rank and e.thread == LINK)
    held = sum(schedule.held(rank).values())
    return (
        f"predicted, not measured: {1e6 * schedule.seconds:.1f} us; the link is busy for {1e6 * link:.1f} us, of which compute waits for "
        f"{1e6 * held:.1f} us and {1e6 * max(0.0, link - held):.1f} us are hidden"
    )


def draw_schedule(schedule: BodySchedule, rank: int = 0) -> Panel:
    """The lanes, without title and style."""
    events = [e for e in schedule.events if e.rank == rank]
    total = schedule.seconds or 1.0
    scale = (WIDTH - LEFT - 12) / total
    ends = {e.node: e.end for e in events if e.thread == LINK}
    hatched = f"hatched-{schedule.body}"
    height = _Y[LINK] + LANE + 22
    parts = [
        f'<defs><pattern id="{escape(hatched)}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line class="hatch" x1="1" y1="0" x2="1" y2="6"/></pattern></defs>'
    ]
    for name, y in _Y.items():
        parts.append(
            f'<rect class="lane" x="{LEFT}" y="{y}" width="{total * scale:.2f}" height="{LANE}"/>'
            f'<text class="lane-name" x="8" y="{y + LANE // 2 + 4}">{name}</text>'
        )
    parts += [_box(e, scale, hatched) for e in events]
    parts += [_line(ends[e.waits_for], e.end, scale) for e in events if e.waits_for is not None]
    for i, anchor in enumerate(("start", "middle", "middle", "middle", "end")):
        x = LEFT + total * scale * i / 4
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{1e6 * total * i / 4:.1f} us</text>'
        )
    return Panel("\n".join(parts), WIDTH, height)


def _box(event: Event, scale: float, hatched: str) -> str:
    kind = LINK if event.thread == LINK else "attention" if event.cost.cache_bytes else COMPUTE
    what, fill = event.node.name, ""
    if event.waits_for is not None:
        kind, what, fill = "wait", f"waits for {event.waits_for.name}", f' fill="url(#{escape(hatched)})"'
    x, width, y = LEFT + event.start * scale, event.seconds * scale, _Y[event.thread]
    name = what if len(what) * LETTER + 8 < width else ""
    style = f"{kind}-name" if kind in ("attention", LINK) else "name"
    return (
        f'<g data-event="{escape(event.node.name)}"><title>{escape(what)}: {1e6 * event.start:.2f} to {1e6 * event.end:.2f} us</title>'
        f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{LANE}"{fill}/>'
        f'<text class="{style}" x="{x + 4:.2f}" y="{y + LANE // 2 + 4}">{escape(name)}</text></g>'
    )


def _line(started_until: float, waited_until: float, scale: float) -> str:
    """From the end of a collective up to where compute goes on with what it brought."""
    x, to = LEFT + started_until * scale, LEFT + waited_until * scale
    y, middle, top = _Y[LINK], _Y[LINK] - GAP // 2, _Y[COMPUTE] + LANE
    return f'<path class="meets" d="M{x:.2f} {y} L{x:.2f} {middle} L{to:.2f} {middle} L{to:.2f} {top}"/>'
