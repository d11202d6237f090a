"""Does the plan fit the model and itself, and does the graph do what the plan says: collectives, work, ownership.

What is expected is computed from the matches of the original model and from the options, not from the plan's own lists.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from helix_compile.capture.captured import CapturedGraph, CapturedLayer
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.dataflow import follow
from helix_compile.ir.graph import aten, calls, helix_op, input_ref, is_call, is_param, placeholders
from helix_compile.ir.sizes import hint_of
from helix_compile.ir.stage import bodies_of, body_of
from helix_compile.passes.match.vocabulary import find_vocabulary
from helix_compile.plan.helix_plan import AttentionPlan, BodyPlan, HelixPlan
from helix_compile.plan.matches import AttentionMatch, LayerMatch, Selection
from helix_compile.verifier.contract import PAGE, head_places, parts_of_batch, places_of
from helix_compile.verifier.decodes import decodes_by_site
from helix_compile.verifier.report import Finding
from helix_compile.verifier.static.graph import COLLECTIVES

WORK_SLACK = 1e-9  # counts are exact; this only forgives the division


def check_plan(
    plan: HelixPlan, matches: dict[str, LayerMatch], ranks: int, layers: Sequence[CapturedLayer] = ()
) -> list[Finding]:
    """The plan's numbers against the model's and against each other."""
    layout, options, findings = plan.layout, plan.options, []

    def expect(where: str, got: Any, expected: Any, family: int) -> None:
        if got != expected:
            findings.append(Finding("HX302", where, str(got), str(expected), family))

    expect("plan.layout: cp", layout.kvp, options.cp, 12)
    expect("plan.layout: tpa", layout.tpa, options.tpa, 12)
    expect("plan.layout: ranks", layout.world_size, ranks, 12)
    expect("plan.layout: ep * tpf", layout.ep * layout.tpf, layout.kvp * layout.tpa, 12)
    if options.ep is not None:
        expect("plan.layout: ep", layout.ep, options.ep, 9)
    expect("plan.bodies", [b.name for b in plan.bodies], list(matches), 0)
    for body in plan.bodies:
        match = matches.get(body.name)
        if match is None:
            continue
        for site, (attention, found) in enumerate(zip(body.attentions, match.attentions, strict=False)):
            where = f"plan, {body.name}, attention {site}"
            expect(f"{where}: heads", attention.heads, found.num_heads, 1)
            expect(f"{where}: parts of the batch", attention.parts, _parts(attention, plan), 10)
            expect(f"{where}: KV heads", attention.kv_heads, found.cache.heads, 1)
            expect(f"{where}: window and chunk", (attention.window, attention.chunk), (found.window, found.chunk), 7)
            own = tuple(x for x in layers if x.body == body.name)
            if layers:
                expect(f"{where}: whose cache it reads", attention.cache_of, _whose(layers, own, site), 4)
            expect(f"{where}: sinks", attention.sinks, found.sinks.name if found.sinks else "", 6)
            places = head_places(found.num_heads, found.cache.heads, layout)
            if not options.pad_heads:
                expect(f"{where}: zero heads without pad_heads", places.count(None), 0, 12)
            findings += _zero_heads(body, found, places, where)
            expect(f"{where}: top_k", attention.top_k, _top_k(found), 16)
            if attention.top_k and options.topk_exchange != "auto":
                expect(f"{where}: topk_exchange", attention.topk_exchange, options.topk_exchange, 9)
            if options.v_up != "auto" and not attention.ring:
                expect(f"{where}: v_up", attention.v_up, options.v_up, 9)
            findings += _ring(attention, found, plan, where)
        for ffn in body.ffns:
            if ffn.kind == "routed":
                where, experts = f"plan, {body.name}, {ffn.kind} FFN", match.moes[ffn.site].num_experts
                expect(f"{where}: experts", ffn.experts, experts, 12)
                if not options.pad_heads:
                    expect(f"{where}: experts % ep", experts % layout.ep, 0, 12)
        findings += _cuts(body)
        findings += _shard_axes(body, match, plan)
    return findings


def _ring(attention: AttentionPlan, found: AttentionMatch, plan: HelixPlan, where: str) -> list[Finding]:
    """Where every rank holds the last tokens: as the option says, and enough of them for a window, a token and what it begins."""
    options, findings = plan.options, []
    reach = found.window or found.chunk
    allowed = {"shard": (False,), "replicate": (bool(reach),)}.get(options.window, (False, bool(reach)))
    if bool(attention.ring) not in allowed:
        text = f"{attention.ring} pages on every rank"
        findings.append(
            Finding("HX302", f"{where}: window={options.window!r}", text, f"{allowed} for a reach of {reach}", 9)
        )
    # tokens of a window lie on so many pages where the last one begins a page
    needed = min(2 + max(0, reach - 2) // PAGE, -(-options.max_seq_len // PAGE)) if reach > 1 else 1
    if attention.ring and attention.ring < needed:
        findings.append(
            Finding(
                "HX302", f"{where}: pages of a ring", str(attention.ring), f"at least {needed} for {reach} tokens", 7
            )
        )
    return findings


def _whose(layers: Sequence[CapturedLayer], own: Sequence[CapturedLayer], site: int) -> tuple[int, ...]:
    """Of each layer of a body the one that caches what a site reads; none where that is the layer itself."""
    found = [next(x.index for x in layers if layer.caches[site] in x.own) for layer in own]
    return () if found == [layer.index for layer in own] else tuple(found)


def check_vocabulary(graph: fx.GraphModule, plan: HelixPlan, captured: CapturedGraph) -> list[Finding]:
    """Embedding and head cut by rows over all ranks, or whole, as the options say: in the plan, and by collectives in the graph.

    What the rows are is for the comparison of parameters, which words the logits are of for that of the logits.
    """
    N, shard = plan.layout.world_size, plan.options.head == "shard"
    wanted = Counter({("all_reduce", "world"): 1, ("all_gather_into_tensor", "world"): 1}) if shard else Counter()
    got = Counter((str(n.target).split(".")[1], str(n.args[-1])) for n in calls(graph.graph, *COLLECTIVES))
    planned = Counter((c.op, c.axis) for c in plan.outer.collectives)
    findings = []
    if got != wanted:
        findings.append(Finding("HX105", "outer graph", _counts(got), _counts(wanted), 10))
    if planned != wanted:
        findings.append(Finding("HX302", "plan, outer graph: collectives", _counts(planned), _counts(wanted), 9))
    if not shard:
        return findings
    vocabulary = find_vocabulary(captured)
    sizes = {vocabulary.rows: vocabulary.embedding_shape[0], vocabulary.weight: vocabulary.weight_shape[0]}
    for name, rows in sizes.items():
        axes = [(c.dim, c.axis, c.total) for s in plan.outer.param_shards if s.name == name for c in s.cuts]
        if axes != [(0, "world", rows)]:
            where = f"plan, outer graph, parameter {name}: cuts (dim, axis, rows)"
            findings.append(Finding("HX302", where, str(axes), str([(0, "world", rows)]), 2))
        if not plan.options.pad_heads and rows % N:
            where = f"plan, outer graph, parameter {name}: rows % ranks without pad_heads"
            findings.append(Finding("HX302", where, str(rows % N), "0", 12))
    return findings


def _zero_heads(body: BodyPlan, found: AttentionMatch, places: list[int | None], where: str) -> list[Finding]:
    """What is cut by query heads has its zero heads where the contract puts them."""
    findings = []
    names = [part.name for side, part in found.cuts if side != "kv"] + [found.o_weight]
    if found.gate and found.gate.linear:
        names += [rows.name for rows in found.gate.linear.params]
    for shard in filter(None, map(body.shard, names)):
        for cut in shard.cuts:
            p = cut.padding
            got = places_of(p.groups, p.group, p.padded_groups, p.padded_group) if p else list(range(cut.total))
            if got != places:
                text, wanted = (reprlib.repr(["-" if h is None else h for h in x]) for x in (got, places))
                findings.append(Finding("HX302", f"{where}: heads of {shard.name}", text, wanted, 2))
    return findings


def _top_k(match: AttentionMatch) -> int:
    """Keys that a site chooses for each query; 0 where it chooses none."""
    return match.selection.top_k if isinstance(match.selection, Selection) else 0


def _shard_axes(body: BodyPlan, match: LayerMatch, plan: HelixPlan) -> list[Finding]:
    """Options that only move weights must have moved them: W_UV over all ranks if it is applied after the exchange."""
    findings = []
    for site, found in zip(body.attentions, match.attentions, strict=False):
        own_query = site.ring and all(uncut.what != "q" for uncut in found.uncut)
        moved = {"q": plan.options.q_proj == "gather" or own_query, "v_up": site.v_up == "after"}
        wanted = {part.name: "world" if moved.get(side) else "tpa" for side, part in found.cuts}
        wanted[found.o_weight] = "world"
        if found.sinks:
            wanted[found.sinks.name] = "tpa" if plan.options.merge == "ag_rs" and not site.ring else "world"
        for name, axis in wanted.items():
            shard = body.shard(name)
            axes = None if shard is None else tuple(c.axis for c in shard.cuts)
            if axes != (axis,):
                where = f"plan, {body.name}, parameter {name}: axes of its cuts"
                findings.append(Finding("HX302", where, str(axes), str((axis,)), 9))
    return findings


def _cuts(body: BodyPlan) -> list[Finding]:
    """A cut's total is the size of the dim that it cuts, or the tail of the weight is in no shard."""
    findings = []
    for shard in body.param_shards:
        sizes = list(shard.view)
        if shard.window is not None:
            sizes[shard.window[0]] = shard.window[2]
        for cut in shard.cuts:
            where = f"plan, {body.name}, parameter {shard.name}, dim {cut.dim}"
            if cut.total != sizes[cut.dim]:
                findings.append(Finding("HX302", where, f"cut of {cut.total}", f"{sizes[cut.dim]}", 2))
    return findings


def matched_bodies(
    graph: fx.GraphModule, matches: dict[str, LayerMatch]
) -> Iterator[tuple[str, fx.GraphModule, LayerMatch]]:
    """Name, graph and match of each body."""
    for name, body in bodies_of(graph).items():
        if name in matches:
            yield name, body, matches[name]


def _parts(site: AttentionPlan, plan: HelixPlan) -> int:
    """In how many parts a site must attend and exchange, by the options."""
    return parts_of_batch(plan.options.overlap, alone=bool(site.ring))


def expected_collectives(match: LayerMatch, plan: HelixPlan) -> Counter[tuple[str, str]]:
    """(op, axis) -> how many a body must have, by the options (helix-algorithm, sections 6 and 8)."""
    options, layout, count = plan.options, plan.layout, Counter[tuple[str, str]]()
    planned = plan.body(match.body).attentions
    sites = sum(not site.ring for site in planned)  # of the others a rank has all that it needs
    exchanges = sum(_parts(site, plan) for site in planned if not site.ring)
    if layout.kvp > 1:
        if options.merge == "a2a":
            count[("all_to_all_single", "kvp")] += exchanges
        else:
            count[("all_gather_into_tensor", "kvp")] += exchanges
            count[("reduce_scatter_tensor", "kvp")] += exchanges
        if options.q_proj == "gather":
            count[("all_gather_into_tensor", "kvp")] += sites
        for attention, site in zip(match.attentions, plan.body(match.body).attentions, strict=False):
            if _top_k(attention):  # every rank gets the candidates of all, or an owner does and tells the k-th
                count[("all_to_all_single", "kvp")] += site.topk_exchange == "owner"
                count[("all_gather_into_tensor", "kvp")] += 1
        count = +count
    if layout.world_size > 1:
        shared = {m.shared for m in match.moes}
        sums = sum(f.down not in shared for f in match.dense_ffns) + len(match.moes)
        count[("all_reduce", "world")] += len(match.attentions) + sums
    return count


def check_collectives(graph: fx.GraphModule, plan: HelixPlan, matches: dict[str, LayerMatch]) -> list[Finding]:
    """Each body has the collectives of its options, and the plan lists the same."""
    findings = []
    for name, body, match in matched_bodies(graph, matches):
        expected = expected_collectives(match, plan)
        got = Counter((str(n.target).split(".")[1], str(n.args[-1])) for n in calls(body.graph, *COLLECTIVES))
        planned = Counter((c.op, c.axis) for c in plan.body(name).collectives for _ in range(c.parts))
        if got != expected:
            findings.append(Finding("HX105", name, _counts(got), _counts(expected), 10))
        if planned != expected:
            findings.append(Finding("HX302", f"plan, {name}: collectives", _counts(planned), _counts(expected), 9))
    return findings


def check_overlap(graph: fx.GraphModule, plan: HelixPlan, matches: dict[str, LayerMatch]) -> list[Finding]:
    """Where the plan has a site in parts: the exchange of each is started before the next part attends, and waited for behind that."""
    findings = []
    for name, body, _ in matched_bodies(graph, matches):
        place = {node: i for i, node in enumerate(body.graph.nodes)}
        for site, decodes in zip(plan.body(name).attentions, decodes_by_site(body.graph), strict=False):
            if len(decodes) != (parts := _parts(site, plan)):
                got = f"attention {site.site} attends in {len(decodes)} parts"
                findings.append(Finding("HX111", name, got, f"{parts}", 10))
                continue
            for decode, following in pairwise(decodes):
                start = next((n for n in _behind(decode, place) if is_call(n, *COLLECTIVES)), None)
                waits = [place[n] for n in start.users if is_call(n, WAIT)] if start else []
                if start is None or not waits or not place[start] < place[following] < min(waits):
                    where = f"{name}, node `{decode.name}`"
                    got = f"nothing of it is on its way while `{following.name}` attends"
                    findings.append(Finding("HX111", where, got, "start, attention of the next part, wait", 10))
    return findings


def _behind(node: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    """All that hangs on a node, in the order of the graph."""
    return sorted(follow([node], lambda n: n.users), key=place.__getitem__)


def _counts(count: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{n} {op} over {axis}" for (op, axis), n in sorted(count.items())) or "none"


def check_work(
    typed: fx.GraphModule,
    plan: HelixPlan,
    matches: dict[str, LayerMatch],
    originals: dict[str, Tensor],
    captured: CapturedGraph,
) -> list[Finding]:
    """Multiplications a rank does for each token against those of the planned shards; attention once for each head.

    Args:
        typed: the graph with shapes propagated from what the ranks hold.
        captured: the model: what reads a weight twice there may do so.
    """
    findings = []
    for name, body, match in matched_bodies(typed, matches):
        got, expected = _macs(body.graph), _planned_macs(typed, name, match, plan, originals, captured)
        if got > expected * (1 + WORK_SLACK):
            work = f"{got:,.0f} multiplications a token a rank"
            findings.append(Finding("HX107", name, work, f"{expected:,.0f}", 13))
        rows = hint_of(placeholders(body.graph)[0].meta["val"].shape[0])
        attended = sum(  # a part of the batch counts as what it is of all
            Fraction(math.prod(map(hint_of, n.args[0].meta["val"].shape[0:3:2])), rows)
            for decodes in decodes_by_site(body.graph)
            for n in decodes
            if "val" in n.args[0].meta
        )
        heads = sum(
            len(head_places(a.num_heads, a.cache.heads, plan.layout))
            // (plan.layout.tpa * (plan.layout.kvp if p.ring else 1))
            for a, p in zip(match.attentions, plan.body(name).attentions, strict=True)
        )
        if attended != heads:
            got_text = f"attention over the cache for {attended} heads a rank"
            findings.append(Finding("HX107", name, got_text, f"{heads}", 13))
        scored = sum(helix_op(n) == "index_scores" for n in body.graph.nodes)
        sites = sum(map(bool, map(_top_k, match.attentions)))
        if scored != sites:
            findings.append(Finding("HX107", name, f"keys are scored {scored} times", f"{sites}", 13))
    return findings


def _numel(node: Any) -> int:
    return math.prod(hint_of(s) for s in node.meta["val"].shape)


def _macs(graph: fx.Graph) -> float:
    """Multiplications with a weight for each token, at the sizes the graph was captured with."""
    hidden = placeholders(graph)[0]
    tokens = math.prod(hint_of(s) for s in hidden.meta["val"].shape[:2])
    total = 0
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in (aten.linear.default, aten.mm.default, aten.bmm.default):
            total += _numel(node) * hint_of(node.args[0].meta["val"].shape[-1])
        elif node.target is aten.einsum.default:
            total += _einsum_macs(node)
        elif helix_op(node) == "moe_experts":
            # an upper bound that the plan counts alike: every local expert once for each token
            total += tokens * (_numel(node.args[3]) + _numel(node.args[4]))
    return total / tokens


def _einsum_macs(node: fx.Node) -> int:
    terms = str(node.args[0]).split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, node.args[1], strict=True):
        shape = operand.meta["val"].shape
        sizes.update({letter: hint_of(s) for letter, s in zip(term, shape, strict=True)})
    return math.prod(sizes.values())


def _planned_macs(
    typed: fx.GraphModule,
    name: str,
    match: LayerMatch,
    plan: HelixPlan,
    originals: dict[str, Tensor],
    captured: CapturedGraph,
) -> float:
    """One multiplication for each element of the planned shard of each weight matrix, and of a whole one as often as the model has it."""
    readers = {input_ref(n).name: _linears_of(n) for n in placeholders(captured.bodies[name].graph) if is_param(n)}
    call = next(n for n in typed.graph.nodes if n.op == "call_module" and n.target == name)
    raised = {  # before the exchange W_UV meets as many rows in each part as there are in all
        found.kind.v_up.name: _parts(site, plan)
        for found, site in zip(match.attentions, plan.body(name).attentions, strict=True)
        if found.kind.v_up is not None and site.v_up == "before"
    }
    total = 0.0
    for node, argument in zip(placeholders(body_of(typed, name).graph), call.args, strict=False):
        if not is_param(node):
            continue
        shard = plan.body(name).shard(input_ref(node).name)
        if shard is not None:
            total += math.prod(shard.shape) * raised.get(shard.name, 1) if len(shard.shape) > 1 else 0
        else:
            whole = originals.get(input_ref(argument).name)
            times = max(1, readers.get(input_ref(node).name, 1))
            total += times * whole.numel() if whole is not None and whole.dim() > 1 else 0
    return total


def _linears_of(weight: fx.Node) -> int:
    """How many linears read a weight."""
    return sum(is_call(user, aten.linear.default) for user in weight.users)
