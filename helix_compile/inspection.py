"""What was rewritten, what was not and why, bytes on the wire: as text, as JSON, as files. The same facts in all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import fx

from helix_compile.graph_text import attention_block, format_python
from helix_compile.plan import BodyPlan, HelixPlan, number
from helix_compile.views.bodies import body_views
from helix_compile.views.layer_svg import format_layer_svg
from helix_compile.views.model_explorer import format_model_explorer
from helix_compile.views.report import format_html_report


@dataclass(frozen=True)
class Inspection:
    """A report on a compiled module. print() it, or read `.facts` (what --json prints)."""

    plan: HelixPlan
    stages: dict[str, fx.GraphModule]
    facts: dict[str, Any]

    def __str__(self) -> str:
        return format_report(self.facts)

    def to_json(self) -> str:
        """The facts as one JSON document."""
        return json.dumps(self.facts, indent=1)

    def attention_before_after(self, body: str) -> tuple[list[str], list[str]]:
        """Short view of one body's attention block in the captured graph and in the last stage before lowering."""
        weight = self.plan.body(body).attentions[0].output_weight
        stages = ("captured", "ffn") if "captured" in self.stages else ("ffn", "lowered")
        before, after = (self.stages[s].get_submodule(body) for s in stages)
        assert isinstance(before, fx.GraphModule) and isinstance(after, fx.GraphModule)
        return attention_block(before, weight), attention_block(after, weight)

    def write(self, folder: Path) -> list[Path]:
        """plan.json; report.txt, .json, .html; NAME.before.py and NAME.after.py of each body and the outer graph;
        NAME.svg of each body; model_explorer.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "plan.json": self.plan.to_json(),
            "report.txt": str(self),
            "report.json": self.to_json(),
            "report.html": format_html_report(self.plan, self.stages, self.facts),
            "model_explorer.json": format_model_explorer(self.plan, self.stages),
        }
        for views in body_views(self.plan, self.stages):
            body = views.plan
            title = f"{self.plan.model}, {body.name} (layers {ranges_text(list(body.layers))})"
            files[f"{body.name}.svg"] = format_layer_svg(title, views.before, views.after)
        first, last = next(iter(self.stages.values())), list(self.stages.values())[-1]
        for moment, stage in (("before", first), ("after", last)):
            files[f"outer.{moment}.py"] = format_python(stage)
            for name, graph in stage.named_children():
                assert isinstance(graph, fx.GraphModule)
                files[f"{name}.{moment}.py"] = format_python(graph)
        written = []
        for name, text in files.items():
            (folder / name).write_text(
                text + ("" if text.endswith("\n") else "\n"), encoding="utf-8"
            )
            written.append(folder / name)
        return written


def inspect_module(plan: HelixPlan, stages: dict[str, fx.GraphModule]) -> Inspection:
    """Collect the facts of a plan and its stages."""
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    facts = {
        "model": plan.model,
        "dtype": plan.dtype,
        "world_size": plan.layout.world_size,
        "layout": {
            "cp": plan.layout.kvp,
            **{k: v for k, v in asdict(plan.layout).items() if k != "kvp"},
        },
        "options": plan.options.to_json(),
        "layers": [_layer_facts(b, first, last) for b in plan.bodies],
        "collectives": [
            {
                "body": body.name,
                "op": c.op,
                "axis": c.axis,
                "what": c.what,
                "egress_bytes_per_rank_per_token": number(c.egress_bytes_per_rank_per_token),
            }
            for body in plan.bodies
            for c in body.collectives
        ],
        "egress_bytes_per_rank_per_token": number(plan.egress_bytes_per_rank_per_token),
        "not_rewritten": [{"what": w, "reason": r} for w, r in plan.not_rewritten],
        "kv_bytes_per_token_per_rank": number(plan.kv_bytes_per_token_per_rank),
        "params_bytes_per_rank": plan.params_bytes_per_rank,
        "decisions": [
            {"name": d.name, "rule": d.rule, "inputs": dict(d.inputs), "result": d.result}
            for d in plan.decisions
        ],
        "notes": list(plan.notes),
    }
    return Inspection(plan, stages, facts)


def _layer_facts(plan: BodyPlan, first: fx.GraphModule, last: fx.GraphModule) -> dict[str, Any]:
    roles: dict[str, int] = {"attention": len(plan.attentions)}
    names = {"dense": "dense_ffn", "shared": "shared_expert", "routed": "routed_experts"}
    for ffn in plan.ffns:
        roles[names[ffn.kind]] = roles.get(names[ffn.kind], 0) + 1
    before, after = (stage.get_submodule(plan.name) for stage in (first, last))
    assert isinstance(before, fx.GraphModule) and isinstance(after, fx.GraphModule)
    return {
        "body": plan.name,
        "layers": list(plan.layers),
        "count": len(plan.layers),
        "roles": roles,
        "head_ranges": [list(r) for r in plan.attentions[0].head_ranges],
        "ffn": [
            {"kind": f.kind, "axes": list(f.axes), "width": f.width, "shard_width": f.shard_width,
             "padding": list(f.padding), "experts_per_rank": f.experts_per_rank}
            for f in plan.ffns
        ],
        "nodes_before": len(before.graph.nodes),
        "nodes_after": len(after.graph.nodes),
    }  # fmt: skip


def format_report(facts: dict[str, Any]) -> str:
    """The facts as a report for a terminal."""
    console = Console(file=StringIO(), width=110, highlight=False, no_color=True)
    layout = ", ".join(f"{k}={v}" for k, v in facts["layout"].items())
    console.print(
        f"{facts['model']} ({facts['dtype']}) on {facts['world_size']} ranks: {layout}",
        markup=False,
    )
    console.print(_rewrites(facts))
    console.print(_collectives(facts))
    per_rank = (
        f"per rank: {_count(facts['kv_bytes_per_token_per_rank'])} bytes of KV cache a token, "
        f"{facts['params_bytes_per_rank']:,} bytes of parameters, "
        f"{_count(facts['egress_bytes_per_rank_per_token'])} bytes sent a token"
    )
    console.print(per_rank, markup=False, soft_wrap=True)
    console.print(
        _two_columns(
            "not rewritten", "why", ((x["what"], x["reason"]) for x in facts["not_rewritten"])
        )
    )
    decisions = ((f"{d['name']} = {d['result']}", d["rule"]) for d in facts["decisions"])
    console.print(_two_columns("decision", "rule", decisions))
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined] # StringIO


def _count(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _rewrites(facts: dict[str, Any]) -> Table:
    table = _table("body", "layers", "rewritten", "heads/rank", "FFN/rank", "nodes")
    for layer in facts["layers"]:
        start, stop = layer["head_ranges"][0]
        ffn = "; ".join(_ffn_text(f) for f in layer["ffn"])
        nodes = f"{layer['nodes_before']} -> {layer['nodes_after']}"
        table.add_row(
            layer["body"],
            ranges_text(layer["layers"]),
            ", ".join(layer["roles"]),
            str(stop - start),
            ffn,
            nodes,
        )
    return table


def _ffn_text(ffn: dict[str, Any]) -> str:
    experts = f"{ffn['experts_per_rank']} experts x " if ffn["experts_per_rank"] else ""
    padding = f" (+{sum(ffn['padding'])} padding)" if sum(ffn["padding"]) else ""
    return f"{ffn['kind']} {experts}{ffn['shard_width']} of {ffn['width']}{padding}"


def _collectives(facts: dict[str, Any]) -> Table:
    table = _table("body", "collective", "axis", "of", "bytes/rank/token")
    for c in facts["collectives"]:
        table.add_row(
            c["body"], c["op"], c["axis"], c["what"], _count(c["egress_bytes_per_rank_per_token"])
        )
    return table


def _two_columns(left: str, right: str, rows: Any) -> Table:
    table = _table(left, right)
    for a, b in rows:
        table.add_row(a.replace("[", r"\["), b.replace("[", r"\["))
    return table


def ranges_text(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
