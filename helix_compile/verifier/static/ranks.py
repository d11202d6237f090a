"""Who owns which token, and which heads reach whom: run the graph's own ops on numbers and see where they end up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from helix_compile.ir.dataflow import ancestors, follow
from helix_compile.ir.graph import InputRef, all_rows, helix_op, input_ref, placeholders
from helix_compile.ir.stage import body_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import AttentionMatch, LayerMatch
from helix_compile.verifier.contract import OTHER_AXIS, coordinate, deal, head_places
from helix_compile.verifier.decodes import decodes_by_site
from helix_compile.verifier.numeric.site_terms import seen_by
from helix_compile.verifier.report import Finding
from helix_compile.verifier.static.plan import matched_bodies


def check_scales(ranks: Sequence[Any], plan: HelixPlan, sites: int) -> list[Finding]:
    """Every rank has the scales of its FP8 caches that the options state, rounded to float32."""
    stated = plan.options.cache_scale
    wanted = list(stated) if isinstance(stated, tuple) else [stated] * sites
    wanted = torch.tensor(wanted, dtype=torch.float32).tolist() if plan.options.cache_dtype == "fp8_e4m3" else []
    return [
        Finding("HX302", f"rank {rank.rank}: scales of its caches", str(got), str(wanted), 4)
        for rank in ranks
        if (got := [float(scale) for scale in rank.scales]) != wanted
    ]


def check_ledger(graph: fx.GraphModule, plan: HelixPlan) -> list[Finding]:
    """Run the graph's own shard_index on three turns of positions: the owner and slot of each must be as dealt."""
    nodes = [n for n in graph.graph.nodes if helix_op(n) == "shard_index"]
    cached = plan.cached
    wanted = [1] * any(site.ring for site in cached) + [plan.layout.kvp] * any(not site.ring for site in cached)
    if (got := sorted(int(n.args[2]) for n in nodes)) != wanted:
        return [Finding("HX301", "outer graph", f"shard_index over {got} ranks", f"over {wanted}", 7)]
    if findings := [
        Finding("HX301", f"`{n.name}`", f"slots of `{n.args[0]}`", "of positions", 7)
        for n in nodes
        if input_ref(n.args[0]) != InputRef("input", "positions")
    ]:
        return findings
    return [finding for node in nodes for finding in _dealt(node, int(node.args[2]), plan.options.tokens_per_block)]


def _dealt(node: fx.Node, cp: int, tpb: int) -> list[Finding]:
    length = 3 * cp * tpb + 1
    hands = deal(length, cp, tpb)
    positions = torch.arange(-1, length)[None]
    for rank, mine in enumerate(hands):
        slot_of = {p: slot for slot, p in enumerate(mine)}
        expected_slots = torch.tensor([[slot_of.get(p, -1) for p in range(-1, length)]])
        seen = torch.zeros(length + 1, dtype=torch.int64)
        seen[[p + 1 for p in mine]] = 1
        try:
            slots, visible = node.target(positions, torch.tensor(rank), *node.args[2:])
        except Exception as error:  # an op under test may do anything
            return [Finding("HX301", f"`{node.name}`, rank {rank}", str(error), "slots and visible", 7)]
        for what, got, expected in (("slot", slots, expected_slots), ("visible", visible, seen.cumsum(0)[None])):
            wrong = (got.cpu() != expected).nonzero()
            if len(wrong):
                column = int(wrong[0, 1])
                where = f"`{node.name}`, CP rank {rank}, position {column - 1}: {what}"
                return [Finding("HX301", where, str(int(got[0, column])), str(int(expected[0, column])), 7)]
    return []


def check_reach(graph: fx.GraphModule, plan: HelixPlan, matches: dict[str, LayerMatch]) -> list[Finding]:
    """What each body is told of windows and chunks: the first slot that a query sees, against keys counted one by one."""
    tpb, findings = plan.options.tokens_per_block, []
    for call in [n for n in graph.graph.nodes if n.op == "call_module" and n.target in matches]:
        given = dict(zip(placeholders(body_of(graph, call.target).graph), call.args, strict=True))
        decodes = decodes_by_site(body_of(graph, call.target).graph)
        planned = plan.body(call.target).attentions
        each = zip(decodes, matches[call.target].attentions, planned, strict=False)
        for decode, site, held in ((part, site, held) for parts, site, held in each for part in parts):
            cp = 1 if held.ring else plan.layout.kvp
            first, where = all_rows(decode.kwargs.get("first")), f"`{decode.name}` of layer {call.meta['layer']}"
            reach = site.window or site.chunk
            if not reach or first is None:
                if reach or first is not None:
                    findings.append(
                        Finding("HX301", where, "no bound" if reach else "a bound", str(reach or "none"), 7)
                    )
                continue
            node = given.get(first)
            if node is None or helix_op(node) != "first_visible":
                findings.append(Finding("HX301", where, f"`{node}` as first visible slots", "first_visible", 7))
                continue
            if node.args[2] != cp:
                findings.append(Finding("HX301", where, f"`{node}` of {node.args[2]} ranks", f"of {cp}", 7))
                continue
            findings += _first_slots(node, site, where, cp, tpb, 2 * reach + 2 * cp * tpb + 1)
    return findings


def _first_slots(node: fx.Node, site: AttentionMatch, where: str, cp: int, tpb: int, length: int) -> list[Finding]:
    """Run the graph's own op at the first positions, and around two windows or two chunks."""
    reach = site.window or site.chunk
    near = {
        *range(-1, min(length, 64)),
        *range(max(0, reach - 3), reach + 4),
        *range(length - 2 * cp * tpb - 4, length),
    }
    queries = sorted(p for p in near if p >= -1)
    for rank, mine in enumerate(deal(length, cp, tpb)):
        held = torch.tensor(mine, dtype=torch.int64)
        expected = [
            0 if p < 0 else int((seen_by(site, torch.tensor([p]), held)[0] | (held > p)).logical_not().sum())
            for p in queries
        ]
        try:
            got = node.target(torch.tensor([queries]), torch.tensor(rank), *node.args[2:])[0].tolist()
        except Exception as error:  # an op under test may do anything
            return [Finding("HX301", f"{where}, `{node.name}`", str(error), "first visible slots", 7)]
        for query, found, wanted in zip(queries, got, expected, strict=True):
            if found != wanted:
                at = f"{where}, `{node.name}`, CP rank {rank}, position {query}: first visible slot"
                return [Finding("HX301", at, str(found), str(wanted), 7)]
    return []


def check_mesh(groups: dict[str, tuple[tuple[int, ...], ...]], layout: HelixLayout) -> list[Finding]:
    """The groups of ranks along each axis, members in the order of their coordinate."""
    findings = []
    for axis, other in OTHER_AXIS.items():
        in_order = sorted(range(layout.world_size), key=lambda r: coordinate(axis, r, layout))
        lines = range(layout.size(other))
        expected = {tuple(r for r in in_order if coordinate(other, r, layout) == i) for i in lines}
        got = set(groups[axis])
        if got != expected:
            findings.append(Finding("HX106", f"groups of {axis}", str(sorted(got)), str(sorted(expected)), 1))
    if groups["world"] != (tuple(range(layout.world_size)),):
        findings.append(Finding("HX106", "group world", str(groups["world"]), "all ranks in order", 1))
    return findings


def check_rank_order(
    graph: fx.GraphModule, plan: HelixPlan, matches: dict[str, LayerMatch], world: Any, device: torch.device
) -> list[Finding]:
    """Send head numbers through the real exchange: each rank must get the block whose o_proj columns it holds."""
    if plan.layout.kvp == 1:
        return []
    findings = []
    for name, body, match in matched_bodies(graph, matches):
        packs = [n for n in body.graph.nodes if helix_op(n) == "pack_heads"]
        sites = zip(match.attentions, plan.body(name).attentions, strict=False)
        exchanging = [a for a, p in sites if not p.ring for _ in range(p.parts)]
        for pack, found in zip(packs, exchanging, strict=False):
            exchange = _exchange_of(body.graph, pack)
            if exchange is None:
                got = "no unpack_heads and merge_lse behind it"
                findings.append(Finding("HX106", f"{name}, `{pack.name}`", got, "them", 1))
                continue
            places = len(head_places(found.num_heads, found.cache.heads, plan.layout))
            run = partial(_run_on, device, world, exchange)
            findings += _owned_heads(name, exchange, places, plan.layout, run)
    return findings


def _exchange_of(graph: fx.Graph, pack: fx.Node) -> fx.GraphModule | None:
    """pack_heads ... merge_lse as a graph of its own with inputs partial_o and lse.

    Where unpack_heads takes shape and dtype from elsewhere (a fused pack reads the parts of splits), whole_o
    stands for that.
    """
    behind = set(follow([pack], lambda n: n.users))
    in_order = [n for n in graph.nodes if n in behind]
    merge = next((n for n in in_order if helix_op(n) == "merge_lse"), None)
    if merge is None:
        return None
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for operand, name in zip(pack.args[:2], ("partial_o", "lse"), strict=True):
        assert isinstance(operand, fx.Node)
        env[operand] = copy.placeholder(name)
    unpack = next((n for n in in_order if helix_op(n) == "unpack_heads"), None)
    likes = unpack.args[1:2] if unpack is not None else ()
    for operand in likes:
        if isinstance(operand, fx.Node) and operand not in env:
            env[operand] = copy.placeholder("whole_o")
    before = ancestors([merge])
    for node in in_order:
        if node in before:
            env[node] = copy.node_copy(node, lambda n: env[n])
    copy.output(env[merge])
    return fx.GraphModule(torch.nn.Module(), copy)


def _run_on(device: torch.device, world: Any, graph: fx.GraphModule, inputs: Any) -> Any:
    return world.run(graph, [[t.to(device) for t in given] for given in inputs])


def _owned_heads(
    name: str, exchange: fx.GraphModule, heads: int, layout: HelixLayout, run: Callable[[Any], Any]
) -> list[Finding]:
    computed = heads // layout.tpa
    inputs = []
    for rank in range(layout.world_size):
        first = coordinate("tpa", rank, layout) * computed
        inputs.append(_head_numbers(exchange, torch.arange(first, first + computed)))
    try:
        results = run(inputs)
    except Exception as error:  # the graph under test may do anything
        return [Finding("HX106", f"{name}, exchange", str(error), "an exchange that runs", 1)]
    block = heads // layout.world_size
    for rank, owned in enumerate(results):
        got = owned.reshape(-1).tolist()
        expected = [float(h) for h in range(rank * block, (rank + 1) * block)]
        if not torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-3):
            text = [round(h, 3) for h in got]
            where = f"{name}, rank {rank} after the exchange"
            return [Finding("HX106", where, f"heads {text}", f"heads {expected}", 1)]
    return []


def _head_numbers(exchange: fx.GraphModule, heads: torch.Tensor) -> list[torch.Tensor]:
    """One token whose every head holds its number, exact in any float dtype up to 256; one split where parts are split."""
    names = [n.name for n in exchange.graph.nodes if n.op == "placeholder"]
    pack = next(n for n in exchange.graph.nodes if helix_op(n) == "pack_heads")
    split = len(pack.args) > 3
    numbers = heads.float().view(1, 1, -1, 1)
    lse = torch.zeros(1, 1, len(heads))
    values = {
        "partial_o": numbers.unsqueeze(3) if split else numbers,
        "lse": lse.unsqueeze(3) if split else lse,
        "whole_o": numbers.to(pack.args[3]) if split else numbers,
    }
    return [values[name].clone() for name in names]
