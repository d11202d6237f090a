"""Is what the ranks choose the top-k over all of them? Run the graph's own ops on scores where every fault shows.

From the scores of a rank's slots to its chosen slots: candidates, exchange, the k-th key, selection. Each query has scores
of its own: random ones; all alike, so that positions decide; the best all on one rank; zeros of both signs; a NaN, which
must not be dropped; fewer keys than k, exactly k, shards without a key, and shards with more than k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import helix_op, input_ref
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import LayerMatch, Selection
from helix_compile.verifier.contract import coordinate, deal
from helix_compile.verifier.numeric.choice_check import SELECTION, ChoiceNodes, best, choice_nodes
from helix_compile.verifier.report import Finding
from helix_compile.verifier.static.plan import matched_bodies


def check_choices(
    graph: fx.GraphModule, plan: HelixPlan, matches: dict[str, LayerMatch], world: object, device: torch.device
) -> list[Finding]:
    """Every site that chooses its keys, in every body."""
    findings = []
    for name, body, match in matched_bodies(graph, matches):
        found = choice_nodes(body.graph)
        for number, attention in enumerate(match.attentions):
            if not isinstance(attention.selection, Selection):
                continue
            nodes = found.get(number)
            where = f"{name}, attention {number}"
            if nodes is None or nodes.scores is None:
                got = "no scores of keys behind the slots that it attends to"
                findings.append(Finding("HX303", where, got, "a choice by index_scores", SELECTION))
                continue
            findings += _check(where, nodes, attention.selection.top_k, plan, world, device)
    return findings


def _check(
    where: str, nodes: ChoiceNodes, top_k: int, plan: HelixPlan, world: object, device: torch.device
) -> list[Finding]:
    assert nodes.scores is not None
    part, inputs = _part(nodes)
    scores_node = nodes.scores
    layout, tpb = plan.layout, plan.options.tokens_per_block
    # the lengths of the sequences, and scores [B, T, n] by position; T = 2: the second query sees one key more
    beyond = layout.kvp * (top_k + tpb) + 1  # every rank holds back some of its own
    lengths = list(dict.fromkeys([1, max(2, top_k // 2), top_k, top_k + 1, 3 * top_k, beyond]))
    room = int(scores_node.meta["val"].shape[-1])
    fullest = [n for n in lengths if len(deal(n, layout.kvp, tpb)[0]) <= room]
    for what, scores in _tried(fullest, layout, tpb):
        seen = torch.stack([torch.arange(scores.shape[-1]) < n - 1 + t for n in fullest for t in range(2)])
        seen = seen.view(len(fullest), 2, -1)
        given = []
        for rank in range(layout.world_size):
            local, visible = _on_rank(scores, seen, fullest, coordinate("kvp", rank, layout), layout.kvp, tpb, room)
            known = {"scores": local, "visible": visible, "rank": torch.tensor(coordinate("kvp", rank, layout))}
            given.append([known[kind].to(device) for kind in inputs])
        try:
            results = world.run(part, given)  # type: ignore[attr-defined] # a World
        except Exception as error:  # the graph under test may do anything
            return [
                Finding(
                    "HX303", f"{where}, {what}", f"{type(error).__name__}: {error}", "a choice that runs", SELECTION
                )
            ]
        keys = torch.zeros_like(seen, dtype=torch.int64)
        for rank in range(layout.kvp):
            slots, count = (x.cpu().long() for x in results[rank])
            for b, n in enumerate(fullest):
                hand = deal(n, layout.kvp, tpb)[rank]
                for t in range(2):
                    chosen = slots[b, t, : max(0, int(count[b, t]))].tolist()
                    if any(not 0 <= s < len(hand) for s in chosen):
                        at = f"{where}, `{nodes.name}`, {what}, rank {rank}"
                        return [Finding("HX303", at, f"slots {chosen[:8]}", f"slots below {len(hand)}", SELECTION)]
                    for s in chosen:
                        keys[b, t, hand[s]] += 1
        wanted = best(scores, seen, top_k)
        wrong = (keys != wanted.long()).any(dim=-1)
        if bool(wrong.any()):
            b, t = wrong.nonzero()[0].tolist()
            at = f"{where}, `{nodes.name}`, {what}, {int(seen[b, t].sum())} visible keys"
            got, expected = (x[b, t].nonzero().flatten().tolist() for x in (keys, wanted))
            return [Finding("HX303", at, f"keys {_short(got)}", f"keys {_short(expected)}", SELECTION)]
    return []


def _short(keys: list[int]) -> str:
    return f"{keys}" if len(keys) <= 12 else f"{keys[:12]} and {len(keys) - 12} more"


def _tried(lengths: list[int], layout: HelixLayout, tokens_per_block: int) -> Iterator[tuple[str, Tensor]]:
    """(what is tried, scores [B, 2, n] by position)."""
    B, n = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(0)
    yield "random scores", torch.randn(B, 2, n, generator=generator)
    yield "scores that all tie", torch.full((B, 2, n), 0.5)
    few = torch.randint(-1, 2, (B, 2, n), generator=generator).float()
    yield "scores with many ties", few
    yield "zeros of both signs", torch.where(torch.arange(n) % 2 > 0, -0.0, 0.0).expand(B, 2, n).contiguous()
    last = torch.zeros(n)
    last[deal(n, layout.kvp, tokens_per_block)[-1]] = 1.0
    yield "the best keys all on the last rank", (last + torch.rand(B, 2, n, generator=generator) / 2)
    holes = torch.randn(B, 2, n, generator=generator)
    holes[..., :: max(2, n // 3)] = torch.nan
    yield "a score that is NaN", holes
    yield "negative scores", -torch.rand(B, 2, n, generator=generator) - 1


def _on_rank(
    scores: Tensor, seen: Tensor, lengths: list[int], rank: int, cp: int, tokens_per_block: int, room: int
) -> tuple[Tensor, Tensor]:
    """A rank's scores [B, 2, room] and what each query sees of them [B, 2]."""
    local = scores.new_full((len(lengths), 2, room), -torch.inf)
    visible = torch.zeros(len(lengths), 2, dtype=torch.int32)
    for b, n in enumerate(lengths):
        hand = deal(n, cp, tokens_per_block)[rank]
        mine = scores[b][:, hand].masked_fill(~seen[b][:, hand], -torch.inf)
        local[b, :, : len(hand)] = mine
        visible[b] = seen[b][:, hand].sum(dim=-1).to(torch.int32)
    return local, visible


def _part(nodes: ChoiceNodes) -> tuple[fx.GraphModule, list[str]]:
    """What lies between a rank's scores and its slots, as a graph of its own; and what its inputs are."""
    graph = nodes.slots.graph
    scores = nodes.scores
    assert scores is not None
    visible = scores.args[4]
    roots: dict[fx.Node, str] = {scores: "scores"}
    if isinstance(visible, fx.Node):
        roots[visible] = "visible"
    before = ancestors([nodes.slots, nodes.count], until=list(roots))
    for node in graph.nodes:
        if node in before and node.op == "placeholder":
            roots[node] = "rank" if input_ref(node).name == "kvp_rank" else "visible"
        elif node in before and helix_op(node) in ("cache_append", "shard_index"):
            roots[node] = "visible"
    before = ancestors([nodes.slots, nodes.count], until=list(roots))
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    for node, kind in roots.items():
        env[node] = copy.placeholder(node.name)
        inputs.append(kind)
    look: Callable[[fx.Node], fx.Node] = env.__getitem__
    for node in graph.nodes:
        if node in before and node not in env:
            env[node] = copy.node_copy(node, look)
    copy.output((env[nodes.slots], env[nodes.count]))
    return fx.GraphModule(torch.nn.Module(), copy), inputs
