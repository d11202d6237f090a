"""report.html: one self-contained page. Layers before and after, who owns which block, collectives, memory, order.

The page is put together here: tables and pictures are plain HTML and work without a script. report.js adds what
moves (choosing a body, details of a node, the KV map); it reads one JSON document embedded in the page. Nothing is
loaded from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from torch import fx

from helix_compile.config.options import PAGE_SIZE
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import BodyPlan, HelixPlan, ParamShard
from helix_compile.predict.schedule import BodySchedule, rank_schedules
from helix_compile.views.bodies import BodyViews, body_views
from helix_compile.views.graph_view import GraphView, NodeView, ValueView
from helix_compile.views.layer_svg import LEGEND, draw_panel, format_panel_svg
from helix_compile.views.schedule_svg import draw_schedule, summary

_HERE = Path(__file__).parent


def format_html_report(plan: HelixPlan, stages: Mapping[str, fx.GraphModule], facts: dict[str, Any]) -> str:
    """The page of a compiled module.

    Args:
        plan: its plan.
        stages: stage name -> outer graph.
        facts: what inspect() says (Inspection.facts).
    """
    bodies = body_views(plan, stages)
    sections = (
        _header(plan, facts),
        _layers(bodies, list(stages)),
        _kv_map(plan),
        _collectives(plan),
        _memory(plan, bodies),
        _schedule(bodies, facts["predicted"], {s.body: s for s in rank_schedules(plan, list(stages.values())[-1])}),
        _decisions(facts),
    )
    style = page_style()
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    embedded = json.dumps(_embedded(plan, bodies), separators=(",", ":"))
    embedded = embedded.replace("<", "\\u003c")  # "</script" in a name would end the element
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(plan.model)}: Helix plan</title><style>{style}</style></head><body>\n"
        f"<main>{''.join(sections)}</main>\n"
        '<aside id="details" hidden aria-live="polite"></aside>\n'
        f'<script id="facts" type="application/json">{embedded}</script>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )


def page_style() -> str:
    """The style sheet of every page, light and dark."""
    return (_HERE / "report.css").read_text(encoding="utf-8")


def _embedded(plan: HelixPlan, bodies: list[BodyViews]) -> dict[str, Any]:
    """What the script reads."""
    options, cp = plan.options, plan.layout.kvp
    return {
        "kv": {
            "cp": cp,
            "tpa": plan.layout.tpa,
            "tokens_per_block": options.tokens_per_block,
            "max_seq_len": options.max_seq_len,
            # the plan's figure is an average over ranks; a rank stores cp times that for each token it owns
            "bytes_per_owned_token": float(plan.kv_bytes_per_token_per_rank * cp),
        },
        "bodies": {b.plan.name: {"before": _nodes(b.before), "after": _nodes(b.after)} for b in bodies},
    }


def _nodes(view: GraphView) -> dict[str, Any]:
    """Node name -> its facts, those without a value left out."""
    return {
        node["name"]: {k: v for k, v in node.items() if v not in ("", (), [], None)} for node in view.to_json()["nodes"]
    }


def _header(plan: HelixPlan, facts: dict[str, Any]) -> str:
    layout = plan.layout
    layers = sum(len(b.layers) for b in plan.bodies)
    view = f"attention cp {layout.kvp} x tpa {layout.tpa}, FFN ep {layout.ep} x tpf {layout.tpf}"
    figures = (
        ("ranks", f"{layout.world_size}", view),
        ("layers", f"{layers}", f"{len(plan.bodies)} kinds of layer"),
        ("sent per token", _size(plan.egress_bytes_per_rank_per_token), "by each rank, all layers"),
        ("KV cache per token", _size(plan.kv_bytes_per_token_per_rank), "on each rank, on average"),
        ("parameters", _size(plan.params_bytes_per_rank), "on each rank"),
    )
    items = "".join(
        f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd><dd class='note'>{escape(w)}</dd></div>" for n, v, w in figures
    )
    chosen = ", ".join(f"{k}={v}" for k, v in facts["options"].items() if v is not None)
    return (
        f"<header><h1>{escape(plan.model)}</h1><p class='sub'>{escape(plan.dtype)}, rewritten for Helix "
        f"parallelism</p><dl class='figures'>{items}</dl><p class='options'>{escape(chosen)}</p></header>"
    )


def _layers(bodies: list[BodyViews], stages: list[str]) -> str:
    buttons = "".join(
        f'<button type="button" data-body="{escape(b.plan.name)}" aria-pressed="{str(i == 0).lower()}">'
        f"{escape(b.plan.name)} <span>layer{'s' * (len(b.plan.layers) > 1)} {_ranges(b.plan)}</span></button>"
        for i, b in enumerate(bodies)
    )
    figures = []
    for i, body in enumerate(bodies):
        for moment, view, stage in (("before", body.before, stages[0]), ("after", body.after, stages[-1])):
            label = f"{body.plan.name} {moment}"
            figures.append(
                f'<figure data-body="{escape(body.plan.name)}" data-moment="{moment}"{" hidden" * (i > 0)}>'
                f"<figcaption>{moment} <span>{escape(stage)}, {len(view.nodes)} boxes</span></figcaption>"
                f'<div class="scroll">{format_panel_svg(draw_panel(view), label)}</div></figure>'
            )
    key = "".join(
        f'<li class="{form}">{text}</li>' for form, text in (*LEGEND, ("exchange", "collective"), ("helix", "helix op"))
    )
    return (
        f"<section id='layers'><h2>A layer before and after</h2><div class='tabs'>{buttons}</div>"
        f"<ul class='key'>{key}</ul><p class='note'>Choose a box for its shapes, layout, bytes and source.</p>"
        f"<div class='pair'>{''.join(figures)}</div></section>"
    )


def _kv_map(plan: HelixPlan) -> str:
    options, layout = plan.options, plan.layout
    start = min(options.max_seq_len, 5 * layout.kvp * options.tokens_per_block // 2 + 7)
    also = f" Each of the {layout.tpa} tpa groups holds the same; ranks here are cp ranks." if layout.tpa > 1 else ""
    return (
        "<section id='kv'><h2>Who owns which block of the KV cache</h2>"
        f"<p class='note'>Blocks of {options.tokens_per_block} tokens go round robin over {layout.kvp} ranks; "
        f"inside a rank they are stored in pages of {PAGE_SIZE} slots.{also}</p>"
        f"<div class='length'><label for='length'>sequence length</label>"
        f"<input id='length' type='range' min='0' max='{options.max_seq_len}' step='1' value='{start}'>"
        f"<input id='length-number' type='number' min='0' max='{options.max_seq_len}' value='{start}' "
        "aria-label='sequence length in tokens'></div>"
        "<p id='next-token'></p><div id='ranks'></div></section>"
    )


def _collectives(plan: HelixPlan) -> str:
    rows = []
    for body in plan.bodies:
        for c in body.collectives:
            each = c.egress_bytes_per_rank_per_token
            rows.append(
                (
                    f"{body.name} ({_ranges(body)})",
                    c.op,
                    c.axis,
                    c.what + (f", in {c.parts} parts" if c.parts > 1 else ""),
                    _size(each),
                    _size(each * len(body.layers)),
                )
            )
    rows.append(("all", "", "", "", "", _size(plan.egress_bytes_per_rank_per_token)))
    heads = ("body (layers)", "collective", "over", "of", "sent, one layer", "sent, all layers")
    return (
        "<section id='collectives'><h2>Collectives</h2><p class='note'>Bytes that leave each rank for each token "
        f"of a step.</p>{_table(heads, rows, numeric=(4, 5))}</section>"
    )


def _memory(plan: HelixPlan, bodies: list[BodyViews]) -> str:
    options = plan.options
    slots = pages_per_sequence(options, plan.layout.kvp) * PAGE_SIZE * options.max_batch_size
    rings = plan.ring_bytes_per_sequence_per_rank
    allocated = plan.kv_bytes_per_token_per_rank * plan.layout.kvp * slots + rings * options.max_batch_size
    whole = f"KV cache as allocated: {options.max_batch_size} sequences of {options.max_seq_len:,} tokens"
    rows = [
        ("parameters", _size(plan.params_bytes_per_rank)),
        ("KV cache, a token, on average", _size(plan.kv_bytes_per_token_per_rank)),
        *((("KV cache, the last tokens of a sequence", _size(rings)),) if rings else ()),
        (whole, _size(allocated)),
    ]
    parts = [_table(("on each rank", "bytes"), rows, numeric=(1,))]
    for body in bodies:
        params = {p.name: p for n in body.after.nodes for p in n.params}
        shards = [
            (name, *_cut(body.plan.shard(name), p.value, plan.layout), p.value.dtype, p.value.bytes)
            for name, p in params.items()
        ]
        heads = ("parameter", "original", "on a rank", "cut", "dtype", "bytes on a rank")
        parts.append(
            f"<details><summary>Parameters of {escape(body.plan.name)} (layers {_ranges(body.plan)})</summary>"
            f"{_table(heads, shards, numeric=(5,))}</details>"
        )
    return f"<section id='memory'><h2>Memory</h2>{''.join(parts)}</section>"


def _schedule(bodies: list[BodyViews], predicted: dict[str, Any], schedules: Mapping[str, BodySchedule]) -> str:
    """Compute and the link on a line of time; then the order of one layer: work between exchanges, and each exchange with its bytes."""
    parts = []
    times = {b["body"]: b for b in predicted["bodies"]}
    for i, body in enumerate(bodies):
        layer = times[body.plan.name]
        exchanges = {c["node"]: c for c in layer["collectives"]}
        largest = max((n.egress or 0 for n in body.after.nodes), default=0) or 1
        rows = [_timeline(schedules[body.plan.name])]
        work: list[NodeView] = []
        for node in (*body.after.nodes, None):
            if node is not None and node.kind != "collective":
                work += [node] if node.kind not in ("input", "output") else []
                continue
            if work:
                names = ", ".join(n.title for n in work)
                rows.append(
                    f"<li class='work'><b>{len(work)} step{'s' * (len(work) > 1)}</b> <span>{escape(names)}</span></li>"
                )
            if node is not None:
                share = 100 * (node.egress or 0) / largest
                sent = "" if node.egress is None else _size(node.egress)
                if time := exchanges.get(node.name):
                    sent += (
                        f", {time['microseconds']:.1f} us, of which compute waits {time['held_microseconds']:.1f} us"
                    )
                rows.append(
                    f"<li class='exchange'><b>{escape(node.title)}</b> <span>{escape(node.subtitle)}, {sent}</span>"
                    f"<i style='width:{share:.1f}%'></i></li>"
                )
            work = []
        rows.append(
            f"<li class='work'><b>{layer['microseconds_of_a_layer']:.1f} us</b> <span>the layer, without the fixed time of "
            f"{predicted['fixed_microseconds_of_a_layer']:g} us</span></li>"
        )
        parts.append(f'<ol data-body="{escape(body.plan.name)}"{" hidden" * (i > 0)}>{"".join(rows)}</ol>')
    return (
        "<section id='schedule'><h2>Schedule of a layer</h2><p class='note'>Predicted, nothing here is a measured "
        f"time: {escape(predicted['what'])} ({escape(predicted['machine'])}, {predicted['batch']} sequences x "
        f"{predicted['tokens']} token, context {predicted['context']:,}). What compute does not wait for is hidden "
        "behind other work. A bar is as long as the bytes that a rank sends for a token.</p>"
        + (f"<p class='note'>{escape(predicted['overlap']['text'])}</p>" if predicted["overlap"] else "")
        + f"{''.join(parts)}</section>"
    )


def _timeline(schedule: BodySchedule) -> str:
    panel = draw_schedule(schedule)
    return (
        f"<li class='timeline'><span>{escape(summary(schedule))}</span><div class='scroll'><svg role='img' "
        f"aria-label='{escape(schedule.body)}: schedule of rank 0' viewBox='0 0 {panel.width} {panel.height}' "
        f"width='{panel.width}' height='{panel.height}'>{panel.markup}</svg></div></li>"
    )


def _decisions(facts: dict[str, Any]) -> str:
    decisions = [(f"{d['name']} = {d['result']}", d["rule"]) for d in facts["decisions"]]
    kept = [(x["what"], x["reason"]) for x in facts["not_rewritten"]]
    notes = "".join(f"<li>{escape(n)}</li>" for n in facts["notes"])
    return (
        f"<section id='decisions'><h2>Decisions</h2>{_table(('decision', 'rule'), decisions)}"
        f"<h2>Not rewritten</h2>{_table(('what', 'why'), kept)}"
        + (f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "")
        + "</section>"
    )


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]], numeric: tuple[int, ...] = ()) -> str:
    def cell(tag: str, i: int, value: Any) -> str:
        return f"<{tag}{' class=n' * (i in numeric)}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cut(shard: ParamShard | None, value: ValueView, layout: HelixLayout) -> tuple[str, str, str]:
    """Original shape, shape on a rank, and the cuts between them."""
    if shard is None:
        return value.shape, value.shape, "whole"
    original = "[" + ",".join(map(str, shard.source_shape)) + "]"
    cuts = [f"dim {c.dim} over {c.axis}" for c in shard.cuts if layout.size(c.axis) > 1]
    return original, value.shape, ", ".join(cuts) or "whole"


def _ranges(body: BodyPlan) -> str:
    first, last = body.layers[0], body.layers[-1]
    if len(body.layers) == 1:
        return str(first)
    whole = list(body.layers) == list(range(first, last + 1))
    return f"{first}-{last}" if whole else ", ".join(map(str, body.layers))


def _size(count: Any) -> str:
    """Bytes in the unit that a reader wants; exact below 10,000."""
    value = float(count)
    if value < 10_000:
        return f"{value:,.0f} B" if value == int(value) else f"{value:,.1f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 1000 or unit == "TB":
            break
    return f"{value:,.1f} {unit}"
