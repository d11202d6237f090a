"""The page of a plan: context, batch, link and cache move, and with them the front, the winner and the bytes. Self-contained.

The page gets the terms of every layout (predict/terms.py) and adds them up by itself in plan_page.js, as predict/search.py does; a
test holds one to the other. Tables that need no script stand below.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from helix_compile.errors import HelixError
from helix_compile.predict.formats import CACHES, read_factor
from helix_compile.predict.planner import Planned
from helix_compile.predict.search import with_goal
from helix_compile.predict.terms import Term
from helix_compile.views.plan_text import format_plan
from helix_compile.views.report import page_style

_HERE = Path(__file__).parent


def format_plan_page(planned: Planned) -> str:
    """The page of what a planner found; all figures in it are predicted."""
    facts = planned.facts
    title = f"{facts['model']} on {facts['ranks']} x {facts['gpu']}"
    embedded = json.dumps(page_data(planned), separators=(",", ":")).replace("<", "\\u003c")
    style = page_style() + (_HERE / "plan_page.css").read_text(encoding="utf-8")
    script = (_HERE / "plan_page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}: predicted plan</title><style>{style}</style></head><body>\n<main>"
        f"<header><h1>{escape(title)}</h1><p class='sub'>Which layout, and is Helix worth it: predicted, not measured.</p></header>"
        f"{_controls(planned)}"
        "<section><h2>Winner (predicted)</h2><p id='winner' aria-live='polite'></p><p id='verdict'></p></section>"
        "<section><h2>Tokens a second of a user and of a GPU (predicted)</h2><ul class='key'>"
        "<li class='sharded'>cp &gt; 1</li><li class='partial'>cp = 1</li></ul>"
        "<div class='scroll'><svg id='front' role='img' viewBox='0 0 720 360'></svg></div></section>"
        "<section><h2>Pareto front (predicted)</h2><div class='scroll'><table id='pareto'></table></div></section>"
        "<section><h2>Helix or not, batch by batch (predicted)</h2><div class='scroll'><table id='batches'></table></div></section>"
        "<section><h2>As the command said it</h2><p class='note'>At the figures that it was asked for.</p>"
        f"<pre class='scroll'>{escape(format_plan(planned))}</pre></section></main>\n"
        f'<script id="facts" type="application/json">{embedded}</script>\n<script>{script}</script>\n</body></html>\n'
    )


def _controls(planned: Planned) -> str:
    goal = planned.goal
    options = "".join(
        f"<option value='{name}' title='{escape(CACHES[name].meaning)}'{' selected' * (name == goal.cache.name)}>{name}</option>"
        for name in _caches(planned)
    )
    return (
        "<section id='controls'>"
        "<label>context, tokens <output id='context-is'></output>"
        f"<input id='context' type='range' min='10' max='23' step='0.25' data-exact='{goal.context}'></label>"
        "<label>sequences of a step, at most <output id='batch-is'></output>"
        f"<input id='batch' type='range' min='0' max='{len(goal.batches) - 1}' step='1' value='{len(goal.batches) - 1}'></label>"
        "<label>link, GB/s one way <output id='link-is'></output>"
        f"<input id='link' type='range' min='3' max='11' step='0.25' data-exact='{goal.accelerator.link_gb_s}'></label>"
        f"<label>cache<select id='cache'>{options}</select></label>"
        "<button type='button' id='reset'>as asked</button>"
        "</section>"
    )


def page_data(planned: Planned) -> dict[str, Any]:
    """What the script reads: terms of groups, and of each layout which groups it has, how often."""
    search, model, goal = planned.search, planned.model, planned.goal
    machine = goal.accelerator
    numbers: dict[Hashable, int] = {}
    groups: list[list[Any]] = []
    plans = []
    caches = {name: with_goal(search, cache=CACHES[name]) for name in _caches(planned)}
    for candidate in search.candidates():
        own = []
        for group in model.structure(candidate).terms(candidate.layout):
            if group.key not in numbers:
                numbers[group.key] = len(groups)
                groups.append([_term(t) for t in group.terms])
            own.append([numbers[group.key], group.layers, group.body, group.parts])
        held = search.held(candidate)
        plans.append(
            {
                **asdict(candidate),
                "ranks": candidate.ranks,
                "least_batch": candidate.least_batch,
                "groups": own,
                "params": held.params,
                "buffer": held.buffer,
                "kv": {name: float(s.kv_bytes(candidate)) for name, s in caches.items()},
            }
        )
    return {
        "plans": plans,
        "groups": groups,
        "layers": model.layers,
        "tokens_per_block": model.base.tokens_per_block,
        "batches": list(goal.batches),
        "context": goal.context,
        "cache": goal.cache.name,
        "caches": {name: {"read": s.read, "peak": CACHES[name].peak} for name, s in caches.items()},
        "weights": {"read": search.weights, "peak": goal.weights.peak},
        "least": goal.tokens_per_s_per_user,
        "machine": {
            "flops_per_us": {kind: machine.flops_per_us(kind) for kind in ("bf16", "fp8", "fp4")},
            "bytes_per_us": machine.bytes_per_us,
            "link_gb_s": machine.link_gb_s,
            "latency_us": {op: [list(row) for row in rows] for op, rows in machine.latency_us.items()},
            "fixed_us_per_layer": machine.fixed_us_per_layer,
            "launch_us": machine.launch_us,
            "room": search.room,
        },
    }


def _caches(planned: Planned) -> list[str]:
    """Formats that this model's cache can have."""
    found = []
    for name, cache in CACHES.items():
        try:
            read_factor(cache, planned.model.sites, planned.model.captured.dtype.itemsize)
        except HelixError:
            continue
        found.append(name)
    return found


def _term(term: Term) -> list[Any]:
    """In the order that plan_page.js reads."""
    return [
        term.kind,
        *term.flops,
        *term.moved,
        term.weights,
        term.cached,
        term.wire,
        term.peers,
        term.routed,
        list(term.reach),
        term.launches,
        term.chunk,
        term.whole,
    ]
