"""Which keys the ranks attend to, in three comparisons, none of which trusts the ledger or the passes:

    contract   each query has min(k, visible) keys over all ranks, no slot twice, none that it doesn't see, and all ranks
               cut at the same key
    order      of the scores that the ranks computed these are the best, of equal ones the earlier: exactly, without a limit
    original   the scores are the original's; a key that only one of the two chose lies within a near tie of the k-th score

Attention is then checked with the ranks' own keys (attention_check.py), and so are layers and logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import all_rows, helix_op, input_ref
from helix_compile.ir.stage import bodies_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.contract import deal
from helix_compile.verifier.decodes import decodes_by_site
from helix_compile.verifier.numeric.indexers import SiteChoice
from helix_compile.verifier.numeric.routing import NEAR_TIE
from helix_compile.verifier.report import Finding, numeric_finding

SELECTION = 16  # the family of a wrong choice
TITLE = "min(k, visible) keys of each query, the best over all ranks, of equal ones the earlier"


@dataclass(frozen=True)
class ChoiceNodes:
    """Where a site's choice is in a rank's graph: what its attention reads, and where that comes from.

    `scores` and `cuts` (the k-th key) are None and () of a site that attends to what an earlier layer chose.
    """

    slots: fx.Node
    count: fx.Node
    scores: fx.Node | None
    cuts: tuple[fx.Node, ...]
    choosing: fx.Node | None

    @property
    def chooses(self) -> bool:
        """False where an earlier layer did."""
        return self.choosing is not None

    @property
    def name(self) -> str:
        """Of the node that chooses, or of the input that brings what was chosen."""
        return (self.choosing or self.slots).name

    @property
    def all(self) -> list[fx.Node]:
        """Every node whose value is looked at."""
        return [n for n in (self.slots, self.count, self.scores, *self.cuts) if n is not None]


def choice_nodes(graph: fx.Graph) -> dict[int, ChoiceNodes]:
    """Number of a body's attention -> its choice, of those that attend to chosen keys."""
    found = {}
    for number, decode in enumerate(parts[0] for parts in decodes_by_site(graph)):
        if helix_op(decode) != "mla_decode_slots":
            continue
        slots, count = map(all_rows, decode.args[5:7])
        assert isinstance(slots, fx.Node) and isinstance(count, fx.Node)
        before = ancestors([slots, count])
        select = [n for n in graph.nodes if n in before and helix_op(n) == "select_slots"]
        scores = [n for n in graph.nodes if n in before and helix_op(n) == "index_scores"]
        handed = any(input_ref(n).kind == "chosen" for n in before) and not scores
        found[number] = ChoiceNodes(
            slots,
            count,
            scores[-1] if scores else None,
            tuple(n for n in select[-1].args[2:4] if isinstance(n, fx.Node)) if select else (),
            None if handed else (select or [slots])[-1],
        )
    return found


Values = list[dict[str, Any]]  # per rank, node name -> value


class ChoiceRecorder:
    """Hook of a world: the values of choice_nodes(), by layer and rank. A layer's nodes come before its call."""

    def __init__(self, graph: fx.GraphModule, ranks: int):
        self.sites = sites_in_order(graph)
        self.wanted = {n for site in self.sites for n in site.nodes.all}
        self.outer = set(graph.graph.nodes)
        self.pending: Values = [{} for _ in range(ranks)]
        self.layers: dict[int, Values] = {}

    def __call__(self, rank: int, node: fx.Node, value: Any) -> None:
        if node in self.wanted:
            self.pending[rank][node.name] = value
        elif node in self.outer and node.op == "call_module":
            place = self.layers.setdefault(node.meta["layer"], [{} for _ in self.pending])
            place[rank], self.pending[rank] = self.pending[rank], {}


@dataclass(frozen=True)
class Site:
    """One attention to chosen keys of one layer: layer, body, number among the body's attentions, and its nodes."""

    layer: int
    body: str
    number: int
    nodes: ChoiceNodes


def sites_in_order(graph: fx.GraphModule) -> list[Site]:
    """Every attention to chosen keys of an outer graph, as they run."""
    nodes = {name: choice_nodes(body.graph) for name, body in bodies_of(graph).items()}
    return [
        Site(call.meta["layer"], str(call.target), number, found)
        for call in graph.graph.nodes
        if call.op == "call_module"
        for number, found in nodes.get(str(call.target), {}).items()
    ]


@dataclass(frozen=True)
class Queries:
    """Where a step's tokens stand.

    Attributes:
        before: tokens of each sequence before the step.
        mask: [B, T] of the step's tokens.
    """

    before: tuple[int, ...]
    mask: Tensor
    layout: HelixLayout
    tokens_per_block: int
    positions: Tensor = field(init=False)  # [B, T], -1 for padding

    def __post_init__(self) -> None:
        kept = self.mask.long().cpu()
        places = torch.where(kept > 0, torch.tensor(self.before)[:, None] + kept.cumsum(1) - 1, -1)
        object.__setattr__(self, "positions", places)

    @property
    def after(self) -> list[int]:
        """Tokens of each sequence behind the step."""
        return [n + int(k) for n, k in zip(self.before, self.mask.sum(dim=1), strict=True)]

    @property
    def seen(self) -> Tensor:
        """[B, T, n]: keys that a query may see."""
        return torch.arange(max(self.after)) <= self.positions[..., None]

    def hand(self, row: int, rank: int) -> list[int]:
        """Positions of a rank's slots of a sequence."""
        return deal(self.after[row], self.layout.kvp, self.tokens_per_block)[rank % self.layout.kvp]


@dataclass(frozen=True)
class Chosen:
    """The ranks' choice of one site: keys [B, T, n] by position, their own scores as far as they are known, and faults."""

    keys: Tensor
    scores: Tensor | None
    fault: tuple[str, str, str] | None = None  # where, got, expected

    def finding(self, where: str) -> list[Finding]:
        """The fault as a finding."""
        if self.fault is None:
            return []
        at, got, expected = self.fault
        return [numeric_finding("HX410", f"{where}, {at}", got, expected, SELECTION)]


def ranks_choice(nodes: ChoiceNodes, values: Values, queries: Queries, top_k: int) -> Chosen:
    """Read the keys off slots and counts, and hold them to the contract and to the ranks' own order."""
    layout, seen = queries.layout, queries.seen
    hits = torch.zeros(seen.shape, dtype=torch.int64)
    whole = torch.full(seen.shape, -torch.inf, dtype=torch.float64) if nodes.scores is not None else None
    fault = _unlike_cuts(nodes, values, queries)
    for rank in range(layout.world_size):
        slots, count = (values[rank][n.name].long() for n in (nodes.slots, nodes.count))
        if rank >= layout.kvp:  # another rank of tpa, with the same keys
            twin = values[rank % layout.kvp]
            same = torch.equal(slots, twin[nodes.slots.name].long()) and torch.equal(
                count, twin[nodes.count.name].long()
            )
            if not same and fault is None:
                fault = (
                    f"rank {rank}, node `{nodes.name}`",
                    f"other slots than rank {rank % layout.kvp}'s",
                    "the same",
                )
            continue
        for row in range(len(queries.before)):
            hand = torch.tensor(queries.hand(row, rank), dtype=torch.int64)
            found = _keys_of(slots[row], count[row], hand, queries.positions[row])
            if isinstance(found, Tensor):
                hits[row, :, : found.shape[1]] += found
            elif fault is None:
                t, got = found
                at = f"rank {rank}, sequence {row}, position {int(queries.positions[row, t])}, node `{nodes.name}`"
                fault = (at, got, "slots of keys that the query sees")
            if whole is not None and nodes.scores is not None:
                scores = values[rank][nodes.scores.name].double()
                whole[row][:, hand] = scores[row, :, : len(hand)]
    keys, real = hits > 0, queries.mask.bool().cpu()
    if whole is not None:
        whole.masked_fill_(~seen, -torch.inf)
    if fault is None:
        wanted = seen.sum(dim=-1).clamp(max=top_k)
        number = hits.sum(dim=-1)
        wrong = ((number != wanted) | (hits > 1).any(dim=-1)) & real
        if bool(wrong.any()):
            b, t = wrong.nonzero()[0].tolist()
            at = f"sequence {b}, position {int(queries.positions[b, t])}, node `{nodes.name}`"
            twice = f", {int((hits[b, t] > 1).sum())} of them twice" if bool((hits[b, t] > 1).any()) else ""
            fault = (at, f"{int(number[b, t])} keys over all ranks{twice}", f"{int(wanted[b, t])}: min(k, visible)")
    if fault is None and whole is not None:
        fault = _out_of_order(nodes, keys, whole, queries, top_k)
    return Chosen(keys, whole, fault)


def _unlike_cuts(nodes: ChoiceNodes, values: Values, queries: Queries) -> tuple[str, str, str] | None:
    real = queries.mask.bool().cpu()
    for node in nodes.cuts:
        mine = [v[node.name].cpu()[real].nan_to_num(1e9) for v in values]
        unlike = [rank for rank, cut in enumerate(mine) if not torch.equal(cut, mine[0])]
        if unlike:
            at = f"rank {unlike[0]}, node `{node.name}`, which `{nodes.name}` reads"
            return at, "another k-th key than rank 0's", "the same on every rank"
    return None


def _keys_of(slots: Tensor, count: Tensor, hand: Tensor, positions: Tensor) -> Tensor | tuple[int, str]:
    """How often a rank chose each position [T, n], of one sequence; or (t, what is wrong)."""
    T, m = slots.shape
    n = int(positions.max()) + 1
    chosen = (torch.arange(m) < count[:, None]) & (positions >= 0)[:, None]
    for t in range(T):
        if positions[t] >= 0 and not 0 <= int(count[t]) <= m:
            return t, f"{int(count[t])} of {m} slots"
    outside = chosen & ((slots < 0) | (slots >= len(hand)))
    if bool(outside.any()):
        t, j = outside.nonzero()[0].tolist()
        return t, f"slot {int(slots[t, j])} of a shard of {len(hand)} keys"
    hits = torch.zeros(T, max(n, 0), dtype=torch.int64)
    if not bool(chosen.any()):
        return hits
    query, place = chosen.nonzero(as_tuple=True)
    places = hand[slots[query, place]]
    late = places > positions[query]
    if bool(late.any()):
        first = int(late.nonzero()[0])
        return int(query[first]), f"the key at position {int(places[first])}, which the query does not see"
    return hits.index_put_((query, places), torch.ones_like(places), accumulate=True)


def best(scores: Tensor, seen: Tensor, top_k: int) -> Tensor:
    """The top_k keys of each query by scores [B, T, n]: descending, a NaN first, of equal ones the earlier."""
    order = torch.sort(scores.masked_fill(~seen, -torch.inf) + 0.0, dim=-1, descending=True, stable=True).indices[
        ..., :top_k
    ]
    return torch.zeros_like(seen).scatter_(-1, order, True) & seen


def _out_of_order(
    nodes: ChoiceNodes, keys: Tensor, scores: Tensor, queries: Queries, top_k: int
) -> tuple[str, str, str] | None:
    """The chosen keys against the best by the ranks' own scores."""
    wanted = best(scores, queries.seen, top_k)
    wrong = (keys != wanted).any(dim=-1) & queries.mask.bool().cpu()
    if not bool(wrong.any()):
        return None
    b, t = wrong.nonzero()[0].tolist()
    extra, missing = ((x[b, t] & ~y[b, t]).nonzero().flatten().tolist() for x, y in ((keys, wanted), (wanted, keys)))
    at = f"sequence {b}, position {int(queries.positions[b, t])}, node `{nodes.name}`"
    got = f"keys {extra[:4]} in place of {missing[:4]}, though these come first by the ranks' own scores"
    return at, f"{got} ({int(wrong.sum())} queries)", TITLE


@dataclass(frozen=True)
class Compared:
    """The ranks' keys against the original's.

    Attributes:
        turned: [B, T], queries whose keys are others.
        clear: those of them by a margin that rounding can't explain.
        margin: largest distance of a turned key from the k-th score, over the query's largest score.
        excess: [B, T], by how much that is too far.
        off: [B, T], largest deviation of a score, over its size.
        scores_clear: [B, T], where that is too far.
    """

    turned: Tensor
    clear: Tensor
    margin: float
    excess: Tensor
    off: Tensor
    scores_clear: Tensor
    original: SiteChoice


def compare_with_original(chosen: Chosen, original: SiteChoice, queries: Queries, dtype: torch.dtype) -> Compared:
    """Limits are those of a near-tied router, and what an angle of RoPE adds: it is rounded at its position. They are parts
    of a score's own size where that is known, else of the query's largest score.
    """
    real, seen = queries.mask.bool().cpu(), queries.seen
    scores = original.scores
    largest = scores.masked_fill(~seen, 0).abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    sizes = largest.expand(scores.shape) if original.sizes is None else original.sizes.clamp(min=1e-300)
    angle = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    limit = (NEAR_TIE[dtype] + queries.positions.clamp(min=0) * angle)[..., None]
    kth, last = scores.masked_fill(~original.keys, torch.inf).min(dim=-1, keepdim=True)
    turned = (chosen.keys ^ original.keys) & real[..., None]
    apart = (scores - kth).abs().masked_fill(~turned, 0)
    beyond = apart / torch.maximum(sizes, sizes.gather(-1, last)) - limit
    off = torch.zeros_like(scores)
    if chosen.scores is not None:
        difference = (chosen.scores - scores).abs().nan_to_num(torch.inf)
        off = (difference / sizes).masked_fill(~(seen & real[..., None]), 0)
    return Compared(
        turned=turned.any(dim=-1),
        clear=(beyond > 0).any(dim=-1),
        margin=float((apart / largest).max()),
        excess=beyond.clamp(min=0).amax(dim=-1),
        off=off.amax(dim=-1),
        scores_clear=(off > limit).any(dim=-1),
        original=original,
    )


def turned_finding(compared: Compared, nodes: ChoiceNodes, queries: Queries, where: str) -> list[Finding]:
    """Keys that are not the original's by a clear margin."""
    if not bool(compared.clear.any()):
        return []
    at = f"{where}, {_place(compared.clear, queries)}, node `{nodes.name}`"
    got = f"{int(compared.clear.sum())} queries choose other keys, up to {compared.margin:.1e} of the largest score from the k-th"
    return [numeric_finding("HX410", at, got, "the original's keys, but for near ties of the k-th score", SELECTION)]


def scores_finding(compared: Compared, nodes: ChoiceNodes, queries: Queries, where: str) -> list[Finding]:
    """Scores that are not the original's, on the same inputs."""
    if nodes.scores is None or not bool(compared.scores_clear.any()):
        return []
    at = f"{where}, {_place(compared.scores_clear, queries)}, node `{nodes.scores.name}`"
    got = f"scores of keys off by {float(compared.off.max()):.2e} of their size"
    return [numeric_finding("HX410", at, got, "the original's scores")]


def _place(wrong: Tensor, queries: Queries) -> str:
    b, t = wrong.nonzero()[0].tolist()
    return f"sequence {b}, position {int(queries.positions[b, t])}"


def near_tie_note(where: str, compared: Sequence[Compared]) -> list[str]:
    """What is said of keys that rounding turned."""
    turned = sum(int(c.turned.sum()) for c in compared)
    if not turned:
        return []
    margin = max(c.margin for c in compared)
    return [
        f"{where}: {turned} queries chose other keys than the original within a near tie of the k-th score (at most "
        f"{margin:.1e} of the largest score apart); attention is compared given the keys"
    ]


def handed_finding(
    keys: Tensor, wanted: Tensor, nodes: ChoiceNodes, queries: Queries, where: str, source: str
) -> list[Finding]:
    """A layer that attends to what an earlier one chose must attend to that."""
    wrong = (keys != wanted).any(dim=-1) & queries.mask.bool().cpu()
    if not bool(wrong.any()):
        return []
    at = f"{where}, {_place(wrong, queries)}, node `{nodes.name}`"
    return [
        numeric_finding(
            "HX410", at, f"{int(wrong.sum())} queries attend to other keys than {source}", "the same", SELECTION
        )
    ]


def step_choices(
    sites: Sequence[Site], layers: Mapping[int, Values], queries: Queries, plan: HelixPlan, sources: Mapping[int, int]
) -> list[tuple[Site, Chosen]]:
    """What the ranks chose in a step, site by site.

    Args:
        layers: values of each layer's choice_nodes(), by rank.
        sources: layer -> the layer that chose for it; where it is not known, the last one before it that chooses.
    """
    found: list[tuple[Site, Chosen]] = []
    top_k: dict[int, int] = {}
    for site in sites:
        if site.nodes.chooses:
            top_k[site.layer] = plan.body(site.body).attentions[site.number].top_k
        source = sources.get(site.layer, max((layer for layer in top_k if layer <= site.layer), default=-1))
        k = top_k.get(site.layer if site.nodes.chooses else source, 0)
        found.append((site, ranks_choice(site.nodes, layers[site.layer], queries, k)))
    return found


def step_findings(
    results: Sequence[tuple[Site, Chosen]], queries: Queries, sources: Mapping[int, int], where: str
) -> list[Finding]:
    """Faults of a step's choices that need no original."""
    findings = []
    chosen_by = {site.layer: chosen.keys for site, chosen in results if site.nodes.chooses}
    for site, chosen in results:
        at = f"{where}, layer {site.layer}"
        findings += chosen.finding(at)
        source = sources.get(site.layer)
        if not site.nodes.chooses and source in chosen_by and chosen.fault is None:
            wanted = chosen_by[source]
            findings += handed_finding(chosen.keys, wanted, site.nodes, queries, at, f"layer {source} chose")
    return findings[:1]  # what follows from it is not said again


def joined_values(results: Sequence[tuple[ChoiceNodes, Chosen, Compared]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Node name -> (value of all ranks together, what it should be), for the search for the first value that deviates.

    Scores in order of position; of a choice by how much it is beyond a near tie.
    """
    found = {}
    for nodes, chosen, compared in results:
        if nodes.scores is not None and chosen.scores is not None:
            found[nodes.scores.name] = (chosen.scores, compared.original.scores)
        found[nodes.name] = (compared.excess, torch.zeros_like(compared.excess))
    return found
