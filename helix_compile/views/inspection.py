"""What was rewritten, what was not and why, bytes on the wire: as text, as JSON, as files. The same facts in all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import fx

from helix_compile.config.options import PAGE_SIZE
from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles
from helix_compile.ir.graph import helix_op, inputs_of
from helix_compile.ir.stage import OUTER, SEGMENTS, body_of, graphs_of, uncut
from helix_compile.passes.lower.pieces import piece_facts
from helix_compile.passes.lower.select_kernels import KERNEL
from helix_compile.passes.pipeline import OVERLAP, STAGES, lowered_copy
from helix_compile.plan.helix_plan import OF_CANDIDATES, BodyPlan, HelixPlan, number
from helix_compile.predict.schedule import chrome_trace, predict_schedule, predicted_facts, rank_schedules
from helix_compile.views.bodies import body_views
from helix_compile.views.graph_python import format_python, stage_diff
from helix_compile.views.graph_text import attention_block
from helix_compile.views.layer_svg import format_layer_svg
from helix_compile.views.model_explorer import format_model_explorer
from helix_compile.views.report import format_html_report
from helix_compile.views.schedule_svg import format_schedule_svg


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
        before, after = (attention_block(self.stages[s].get_submodule(body), weight) for s in stages)
        return before, after

    def write(self, folder: Path) -> list[Path]:
        """Everything that docs/inspect.md lists; graphs are read, never changed.

        Raises:
            HelixError: a file can't be written; none is then, and what was there is as it was.
        """
        texts = {
            "plan.json": self.plan.to_json(),
            "report.txt": str(self),
            "report.json": self.to_json(),
            **self._graph_files(),
            **self._stage_files(),
            **self._pictures(),
            "schedule.trace.json": self._trace(),
        }
        if taken := [name for name in ("graphs.json", "config.json") if (folder / name).exists()]:
            raise HelixError(
                f"inspect: {folder} holds {taken[0]}: a saved module or a checkpoint, whose files would be replaced; choose a "
                "folder of its own"
            )
        with StagedFiles(folder, "inspection") as files:
            for name, text in texts.items():
                files.write_text(name, text if text.endswith("\n") else f"{text}\n")
            return files.move()

    def _trace(self) -> str:
        """The predicted schedule of one layer of each body; opens in Perfetto."""
        lowered = list(uncut(self.stages).values())[-1]
        return json.dumps(chrome_trace(predict_schedule(self.plan, lowered), self.plan))

    def _pictures(self) -> dict[str, str]:
        """report.html, model_explorer.json, and NAME.svg of each body."""
        files = {
            "report.html": format_html_report(self.plan, uncut(self.stages), self.facts),
            "model_explorer.json": format_model_explorer(self.plan, uncut(self.stages)),
        }
        for views in body_views(self.plan, uncut(self.stages)):
            layers = ranges_text(list(views.plan.layers))
            title = f"{self.plan.model}, {views.plan.name} (layers {layers})"
            files[f"{views.plan.name}.svg"] = format_layer_svg(title, views.before, views.after)
        lowered = list(uncut(self.stages).values())[-1]
        for schedule in rank_schedules(self.plan, lowered):
            title = f"{self.plan.model}, {schedule.body}: predicted schedule of a layer, rank 0"
            files[f"{schedule.body}.schedule.svg"] = format_schedule_svg(title, schedule)
        return files

    def _graph_files(self) -> dict[str, str]:
        """NAME.before.py and NAME.after.py of each body and the outer graph: Python that runs."""
        files = {}
        names = list(uncut(self.stages))
        for moment, stage in (("before", names[0]), ("after", names[-1])):
            for name, gm in graphs_of(self.stages[stage]):
                title = f"{name} of {self.plan.model}, stage {stage}."
                files[f"{name}.{moment}.py"] = format_python(gm, name, title)
        return files

    def _stage_files(self) -> dict[str, str]:
        """NN_STAGE.txt of each stage, and NN_STAGE.diff: what its pass changed."""
        files, before = {}, None
        first = STAGES.index(next(iter(self.stages)))  # a reloaded module has the last ones alone
        for position, (stage, gm) in enumerate(self.stages.items(), first):
            number = f"{position:02d}"
            files[f"{number}_{stage}.txt"] = format_python(gm, OUTER, f"Stage {stage}.")
            if before is not None:
                files[f"{number}_{stage}.diff"] = stage_diff(self.stages, before, stage)
            before = stage
        return files


def inspect_module(
    plan: HelixPlan, stages: dict[str, fx.GraphModule], replays: dict[str, Any], targets: list[dict[str, str]]
) -> Inspection:
    """Collect the facts of a plan and its stages.

    Args:
        replays: see runtime/replays.py, replay_facts().
        targets: see export/targets.py, targets_of(); plain.
    """
    first, last = next(iter(stages.values())), list(uncut(stages).values())[-1]
    facts = {
        "model": plan.model,
        "dtype": plan.dtype,
        "world_size": plan.layout.world_size,
        "layout": {"cp": plan.layout.kvp, **{k: v for k, v in asdict(plan.layout).items() if k != "kvp"}},
        "options": plan.options.to_json(),
        "layers": [_layer_facts(plan, b, first, last) for b in plan.bodies],
        "collectives": [
            {
                "body": name,
                "op": c.op,
                "axis": c.axis,
                "what": c.what,
                "egress_bytes_per_rank_per_token": number(c.egress_bytes_per_rank_per_token),
                "tokens_rounded_to": c.tokens_rounded_to,
                "parts": c.parts,
            }
            for name, collectives in (*((b.name, b.collectives) for b in plan.bodies), (OUTER, plan.outer.collectives))
            for c in collectives
        ],
        "egress_bytes_per_rank_per_token": number(plan.egress_bytes_per_rank_per_token),
        "sparse": [facts for body in plan.bodies for facts in _sparse_facts(plan, body, last)],
        "not_rewritten": [{"what": w, "reason": r} for w, r in plan.not_rewritten],
        "leaves": [{"module": name, "reason": why} for name, why in plan.leaves],
        "kv_bytes_per_token_per_rank": number(plan.kv_bytes_per_token_per_rank),
        "ring_bytes_per_sequence_per_rank": plan.ring_bytes_per_sequence_per_rank,
        "params_bytes_per_rank": plan.params_bytes_per_rank,
        "memory_per_rank": _memory(plan, last),
        "predicted": predicted_facts(plan, last, _of_overlap(stages)),
        "decisions": [
            {"name": d.name, "rule": d.rule, "inputs": dict(d.inputs), "result": d.result} for d in plan.decisions
        ],
        "kernels": _kernel_facts(plan, last),
        "engines": piece_facts(stages[SEGMENTS]) if plan.options.builds_engines else [],
        "cuda_graphs": replays,
        "targets": targets,
        "notes": list(plan.notes),
    }
    return Inspection(plan, stages, facts)


def _of_overlap(stages: dict[str, fx.GraphModule]) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """The stages before and after parts overlap, lowered alike; None where nothing does."""
    if OVERLAP.stage not in stages:
        return None
    return lowered_copy(stages["ffn"]), lowered_copy(stages[OVERLAP.stage])


def _kernel_facts(plan: HelixPlan, last: fx.GraphModule) -> list[dict[str, Any]]:
    """What computes each helix:: op of each body, and why; empty where lowering asked for no kernels."""
    return [
        {
            "body": body.name,
            "node": node.name,
            "op": str(node.target),
            "provider": node.meta[KERNEL][0],
            "reason": node.meta[KERNEL][1],
        }
        for body in plan.bodies
        for node in last.get_submodule(body.name).graph.nodes
        if KERNEL in node.meta
    ]


def _sparse_facts(whole: HelixPlan, plan: BodyPlan, last: fx.GraphModule) -> list[dict[str, Any]]:
    """Of each attention of a body that sees chosen keys: how many, who chooses, and what that costs a rank in each layer."""
    scored = [n for n in body_of(last, plan.name).graph.nodes if helix_op(n) == "index_scores"]
    sites = [site for site in plan.attentions if site.top_k]
    sent = [c.egress_bytes_per_rank_per_token for c in plan.collectives if c.what in OF_CANDIDATES]
    moves = len(sent) // max(1, len(sites))  # of a site
    rows = []
    for place, (site, scores) in enumerate(zip(sites, scored, strict=False)):
        keys = scores.args[2].meta["val"]
        rows.append(
            {
                "body": plan.name,
                "site": site.site,
                "top_k": site.top_k,
                "exchange": site.topk_exchange,
                "index_bytes_per_token_per_rank": number(Fraction(keys.shape[-1] * keys.itemsize, whole.layout.kvp)),
                "candidate_bytes_per_rank_per_token": number(
                    sum(sent[place * moves : (place + 1) * moves], Fraction())
                ),
            }
        )
    return rows


def _memory(plan: HelixPlan, last: fx.GraphModule) -> dict[str, int]:
    """Bytes that one rank holds: its shards, and its caches as they are allocated (whole pages, every sequence)."""
    caches = [n.meta["val"] for n in inputs_of(last.graph, "cache")]
    cache = sum(c.numel() * c.itemsize for c in caches)
    return {
        "params_bytes": plan.params_bytes_per_rank,
        "kv_cache_bytes": cache,
        "total_bytes": plan.params_bytes_per_rank + cache,
        "sequences": plan.options.max_batch_size,
        "tokens_per_sequence": plan.options.max_seq_len,
    }


def _layer_facts(whole: HelixPlan, plan: BodyPlan, first: fx.GraphModule, last: fx.GraphModule) -> dict[str, Any]:
    roles: dict[str, int] = {"attention": len(plan.attentions)}
    names = {"dense": "dense_ffn", "shared": "shared_expert", "routed": "routed_experts"}
    for ffn in plan.ffns:
        roles[names[ffn.kind]] = roles.get(names[ffn.kind], 0) + 1
    before, after = (body_of(stage, plan.name) for stage in (first, last))
    padding = plan.attentions[0].padding(whole.layout)
    return {
        "body": plan.name,
        "layers": list(plan.layers),
        "count": len(plan.layers),
        "roles": roles,
        "head_ranges": [list(r) for r in plan.attentions[0].head_ranges(whole.layout)],
        "zero_heads": padding.places - padding.heads,
        "windows": [a.window for a in plan.attentions],
        "chunks": [a.chunk for a in plan.attentions],
        "ring_tokens": [a.ring * PAGE_SIZE for a in plan.attentions],
        "sinks": [bool(a.sinks) for a in plan.attentions],
        "cache_of": [list(a.cache_of) for a in plan.attentions],
        "ffn": [{k: v for k, v in f.written(whole.layout).items() if k != "site"} for f in plan.ffns],
        "nodes_before": len(before.graph.nodes),
        "nodes_after": len(after.graph.nodes),
    }


def format_report(facts: dict[str, Any]) -> str:
    """The facts as a report for a terminal."""
    console = Console(file=StringIO(), width=110, highlight=False, no_color=True)
    layout = ", ".join(f"{k}={v}" for k, v in facts["layout"].items())
    console.print(f"{facts['model']} ({facts['dtype']}) on {facts['world_size']} ranks: {layout}", markup=False)
    rewrites = ("body", "layers", "rewritten", "heads/rank", "FFN/rank", "nodes")
    console.print(_table(rewrites, map(_rewrite, facts["layers"])))
    sent = (
        (c["body"], c["op"], c["axis"], c["what"], _count(c["egress_bytes_per_rank_per_token"]))
        for c in facts["collectives"]
    )
    console.print(_table(("body", "collective", "axis", "of", "bytes/rank/token"), sent))
    per_rank = (
        f"per rank: {_count(facts['kv_bytes_per_token_per_rank'])} bytes of KV cache a token, "
        + (
            f"{ring:,} bytes of a sequence's last tokens, "
            if (ring := facts["ring_bytes_per_sequence_per_rank"])
            else ""
        )
        + f"{facts['params_bytes_per_rank']:,} bytes of parameters, "
        f"{_count(facts['egress_bytes_per_rank_per_token'])} bytes sent a token"
    )
    console.print(per_rank, markup=False, soft_wrap=True)
    console.print(_memory_text(facts["memory_per_rank"]), markup=False, soft_wrap=True)
    if facts["sparse"]:
        console.print(
            _table(
                ("indexer of", "keys a query sees", "index keys: bytes", "candidates: bytes"),
                map(_sparse, facts["sparse"]),
            )
        )
        console.print(
            "index keys: of a token on a rank, on average; candidates: that leave a rank for a token"
            + "".join(
                {f", tokens rounded up to {n}" for c in facts["collectives"] if (n := c["tokens_rounded_to"]) > 1}
            ),
            markup=False,
        )
    console.print(_predicted(facts["predicted"]))
    if overlap := facts["predicted"]["overlap"]:
        console.print(overlap["text"], markup=False, soft_wrap=True)
    console.print(_two_columns("not rewritten", "why", ((x["what"], x["reason"]) for x in facts["not_rewritten"])))
    if facts["leaves"]:
        leaves = ((x["module"], x["reason"]) for x in facts["leaves"])
        console.print(_two_columns("leaf: as in the model, whole on every rank", "why", leaves))
    decisions = ((f"{d['name']} = {d['result']}", d["rule"]) for d in facts["decisions"])
    console.print(_two_columns("decision", "rule", decisions))
    if facts["kernels"]:
        rows = ((x["body"], x["node"], x["op"], x["reason"]) for x in facts["kernels"])
        console.print(_table(("body", "node", "computed by", "why"), rows))
    if facts["engines"]:
        console.print(_table(("engine of", "ops", "takes", "weights in it", "returns"), _engine_rows(facts["engines"])))
        stays = ((f"{x['body']}: {', '.join(x['nodes'])}", x["why"]) for x in _in_no_engine(facts["engines"]))
        console.print(_two_columns("in no engine", "why", stays))
        console.print("engines: TensorRT's; none has been built or run on a card yet (docs/exports.md)", markup=False)
    graphs = facts["cuda_graphs"]
    if facts["kernels"] or graphs["used"]:  # a report of a CPU says nothing of it
        console.print(f"CUDA graphs: {'' if graphs['used'] else 'none: '}{graphs['why']}", markup=False, soft_wrap=True)
    if graphs["apart"]:
        apart = ((x["node"], x["why"]) for x in graphs["apart"])
        console.print(_two_columns("called between CUDA graphs", "why", apart))
    goes = ", ".join(t["name"] for t in facts["targets"] if not t["stops"])
    console.print(f"can go to: {goes}", markup=False, soft_wrap=True)
    if stopped := [(f"not to {t['name']}", t["stops"]) for t in facts["targets"] if t["stops"]]:
        console.print(_two_columns("target", "what stops it", stopped))
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined] # StringIO


def _engine_rows(bodies: list[dict[str, Any]]) -> Iterable[Iterable[str]]:
    for body in bodies:
        for piece in body["pieces"]:
            takes, returns = (", ".join(piece[key]) for key in ("inputs", "outputs"))
            yield piece["piece"], str(piece["ops"]), takes, str(len(piece["weights"])), returns


def _in_no_engine(bodies: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Nodes of a body that stay outside for one reason, together."""
    for body in bodies:
        together: dict[str, list[str]] = {}
        for node in body["in_no_engine"]:
            together.setdefault(node["why"], []).append(node["node"])
        for why, nodes in together.items():
            yield {"body": body["body"], "nodes": nodes, "why": why}


def _count(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _sparse(site: dict[str, Any]) -> tuple[str, ...]:
    index, sent = site["index_bytes_per_token_per_rank"], site["candidate_bytes_per_rank_per_token"]
    exchange = f" ({site['exchange']})" if sent else ""
    return site["body"], f"{site['top_k']:,}", _count(index), f"{_count(sent)}{exchange}"


def _rewrite(layer: dict[str, Any]) -> tuple[str, ...]:
    (start, stop), zeros = layer["head_ranges"][0], layer["zero_heads"]
    heads = f"{stop - start}" + (f" (+{zeros} zero heads)" if zeros else "")
    ffn = "; ".join(_ffn_text(f) for f in layer["ffn"])
    nodes = f"{layer['nodes_before']} -> {layer['nodes_after']}"
    rewritten = ", ".join(_role_text(role, layer) for role in layer["roles"])
    return layer["body"], ranges_text(layer["layers"]), rewritten, heads, ffn, nodes


def _role_text(role: str, layer: dict[str, Any]) -> str:
    """Of attention also what it forgets, whether it has sinks, and whose cache it reads."""
    if role != "attention":
        return role
    reaches = [*_each("window of", layer["windows"]), *_each("chunks of", layer["chunks"])]
    reaches += _each("on every rank the last", layer["ring_tokens"])
    reaches += ["sinks"] if any(layer["sinks"]) else []
    owners = sorted({layer for of in layer["cache_of"] for layer in of})
    reaches += [f"cache of {'layers' if owners[1:] else 'layer'} {ranges_text(owners)}"] if owners else []
    return f"{role} ({', '.join(reaches)})" if reaches else role


def _each(what: str, sizes: list[int]) -> list[str]:
    return [f"{what} {size:,}" for size in dict.fromkeys(sizes) if size]


def _ffn_text(ffn: dict[str, Any]) -> str:
    experts = f"{ffn['experts_per_rank']} experts x " if ffn["experts_per_rank"] else ""
    padding = f" (+{sum(ffn['padding'])} padding)" if sum(ffn["padding"]) else ""
    return f"{ffn['kind']} {experts}{ffn['shard_width']} of {ffn['width']}{padding}"


def _memory_text(memory: dict[str, int]) -> str:
    return (
        f"memory: {memory['params_bytes']:,} bytes of parameters + {memory['kv_cache_bytes']:,} of KV cache "
        f"= {memory['total_bytes']:,}\n"
        f"capacity: {memory['sequences']} sequences of {memory['tokens_per_sequence']:,} tokens"
    )


def _predicted(facts: dict[str, Any]) -> Table:
    """The caption says of which machine and step; a row says what of a layer's time each collective takes, and holds."""
    rows = []
    for body in facts["bodies"]:
        collectives = ", ".join(
            f"{c['node']} {c['microseconds']:.1f} ({c['held_microseconds']:.1f})" for c in body["collectives"]
        )
        rows.append((body["body"], f"{body['microseconds_of_a_layer']:.1f}", body["longest"], collectives))
    table = _table(("predicted", "us a layer", "longest", "collectives: us (of which compute waits)"), rows)
    step = f"{facts['batch']} sequences x {facts['tokens']} token, context {facts['context']:,}"
    fixed = facts["fixed_microseconds_of_a_layer"]
    table.caption = (
        f"{facts['what']}: {facts['machine']}; {step}; a step {facts['microseconds_of_a_step']:,.1f} us, of which {fixed:g} a layer are "
        "fitted"
    )
    table.caption_justify = "left"
    return table


def _two_columns(left: str, right: str, rows: Any) -> Table:
    return _table((left, right), ([text.replace("[", r"\[") for text in row] for row in rows))


def ranges_text(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
