"""Steps of a compiled module on caches of the verifier's own, laid out so that faults show.

Pages of a sequence are not in a row. Pages that no sequence has are NaN, unused slots of a page in use hold a large
finite value (a kernel may read them, and must then ignore them); memory that an op allocates and does not write is NaN.

Caches and parameters are where the module is. Everything else of the verifier is on the CPU, which the original is moved
to: what goes in is moved, and what comes out comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from helix_compile.config.options import PAGE_SIZE
from helix_compile.ir.graph import input_ref, placeholders, ring_name
from helix_compile.ir.leaves import LeafState, leaf_states
from helix_compile.module import HelixModule
from helix_compile.plan.helix_plan import AttentionPlan
from helix_compile.verifier.contract import deal, kept_in_ring, kv_share
from helix_compile.verifier.numeric.cache_format import CacheFormat
from helix_compile.verifier.numeric.reference import WidenedIslands
from helix_compile.verifier.numeric.site_terms import on_rank, side_by_side
from helix_compile.worlds.walk import Hook

STALE = 1.0e3  # finite in every dtype, and far from anything that a model computes


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Torch fills what torch.empty returns with NaN while this is open."""
    was, warn = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # a module property
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass
class Scratch:
    """A batch of `rows` sequences with room for `capacity` tokens each.

    Attributes:
        graph: the stage that runs.
        sites: how the plan holds each cached attention.
        rings: pages of a ring -> its page table [rows, pages of a sequence].
        params: per rank, name -> tensor.
        caches: per rank, one tensor per cached attention.
        leaves: per rank, the state of each leaf layer.
        lengths: tokens of each sequence so far.
    """

    compiled: HelixModule
    graph: fx.GraphModule
    params: list[dict[str, Tensor]]
    rows: int
    capacity: int
    seed: int = 0
    lengths: list[int] = field(init=False)
    page_table: Tensor = field(init=False)
    rings: dict[int, Tensor] = field(init=False)
    sites: tuple[AttentionPlan, ...] = field(init=False)
    caches: list[list[Tensor]] = field(init=False)
    leaves: list[dict[str, LeafState]] = field(init=False)
    format: CacheFormat = field(init=False)

    def __post_init__(self) -> None:
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        self.lengths = [0] * self.rows
        fullest = len(deal(self.capacity, layout.kvp, options.tokens_per_block)[0])
        pages = max(1, -(-fullest // PAGE_SIZE))
        generator = torch.Generator().manual_seed(self.seed)
        device, self.sites = self.compiled.device, self.compiled.plan.cached
        self.page_table = self._dealt(pages, generator)
        self.rings = {}
        whole = torch.arange(max(1, -(-self.capacity // PAGE_SIZE)))
        for ring in sorted({site.ring for site in self.sites if site.ring}):
            self.rings[ring] = self._dealt(ring, generator)[:, whole % ring]
        self.format = CacheFormat.of(self.compiled)
        self.leaves = [leaf_states(self.graph.graph) for _ in self.params]
        self.caches = []
        for _ in self.params:
            mine = []
            for site in range(len(self.compiled.facts.caches)):
                pages_here = self.table(site).unique()
                total = self.rows * (self.sites[site].ring or pages) + 3
                cache = self.format.empty(site, (total, PAGE_SIZE), self.share(site, 0)[1])
                cache[pages_here] = self._stale(site)
                mine.append(cache.to(device))
            self.caches.append(mine)

    def _dealt(self, pages: int, generator: torch.Generator) -> Tensor:
        """Pages of each sequence [rows, pages], in no order; three more belong to none."""
        shuffled = torch.randperm(self.rows * pages + 3, generator=generator)
        return shuffled[: self.rows * pages].view(self.rows, pages)

    def table(self, site: int) -> Tensor:
        """The page table of a site's cache."""
        return self.rings[self.sites[site].ring] if self.sites[site].ring else self.page_table

    def share(self, site: int, rank: int) -> tuple[int, int]:
        """(part, parts) of a site's KV heads that a rank caches."""
        plan = self.sites[site]
        return kv_share(plan.heads, plan.kv_heads, rank, self.compiled.plan.layout, bool(plan.ring))

    def hand(self, site: int, length: int, rank: int) -> dict[int, int]:
        """Position -> slot of what a rank holds of a sequence, in order."""
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        if ring := self.sites[site].ring:
            return {p: p for p in kept_in_ring(length, ring)}
        mine = deal(length, layout.kvp, options.tokens_per_block)[rank % layout.kvp]
        return {p: slot for slot, p in enumerate(mine)}

    def places(self, site: int, row: int, slots: Iterable[int]) -> tuple[Tensor, Tensor]:
        """(pages, slots in a page) of slots of a sequence."""
        at = torch.tensor([*slots], dtype=torch.int64)
        return self.table(site)[row][at // PAGE_SIZE], at % PAGE_SIZE

    @property
    def slots(self) -> int:
        """Slots of a sequence on one rank."""
        return self.page_table.shape[1] * PAGE_SIZE

    def _stale(self, site: int) -> Tensor:
        row = self.compiled.facts.caches[site]
        tail = row.tail(self.share(site, 0)[1])
        return self.format.encode(site, torch.full((1, *tail), STALE))[0]

    def stale_entry(self, site: int) -> Tensor:
        """What a slot stands for that nobody has written."""
        return self.format.decode(site, self._stale(site)[None])[0].double()

    def fill(self, site: int, row: int, entries: Tensor) -> None:
        """Lay out a whole sequence's entries [length, first + second] of one site on every rank."""
        for rank, caches in enumerate(self.caches):
            hand = self.hand(site, len(entries), rank)
            kind = self.compiled.facts.caches[site]
            rows = on_rank(entries[[*hand]], kind, *self.share(site, rank))
            caches[site][self.places(site, row, hand.values())] = self.format.encode(site, rows).to(caches[site])
        self.lengths[row] = len(entries)

    def shard(self, site: int, row: int, rank: int, length: int) -> Tensor:
        """What a rank holds of a sequence, in order: entries [n, *] of its heads, in float64 where they are FP8."""
        rows = self.caches[rank][site][self.places(site, row, self.hand(site, length, rank).values())].cpu()
        return side_by_side(self.format.decode(site, rows), self.compiled.facts.caches[site])

    def gathered(self, site: int, row: int, length: int, rank: int = 0) -> Tensor:
        """What the ranks that share KV heads with one hold of a sequence, in order of position: [length, *]. 0: it is forgotten."""
        layout = self.compiled.plan.layout
        first = rank - rank % layout.kvp
        ranks = [rank] if self.sites[site].ring else range(first, first + layout.kvp)
        whole: Tensor | None = None
        for other in ranks:
            entries = self.shard(site, row, other, length)
            whole = entries.new_zeros((length, entries.shape[1])) if whole is None else whole
            whole[[*self.hand(site, length, other)]] = entries
        assert whole is not None
        return whole

    def entries(self, site: int, row: int, length: int) -> Tensor:
        """The whole entries of a sequence, of all the model's KV heads, in order of position: [length, first + second] in float64."""
        kind = self.compiled.facts.caches[site]
        if not kind.heads:
            return self.gathered(site, row, length).double()
        having = {self.share(site, rank)[0]: rank for rank in reversed(range(len(self.caches)))}
        parts = [self.gathered(site, row, length, having[part]).double() for part in sorted(having)]
        share = kind.first + kind.second
        cut = [p.split([p.shape[1] * width // share for width in (kind.first, kind.second)], dim=1) for p in parts]
        first, second = (torch.cat([c[i] for c in cut], dim=1) for i in range(2))
        return torch.cat([first[:, : kind.widths[0]], second[:, : kind.widths[1]]], dim=1)

    def positions(self, mask: Tensor) -> Tensor:
        """Absolute positions [B, T] of a step's tokens, -1 for padding, counted one by one."""
        places = torch.full(mask.shape, -1, dtype=torch.int64)
        for row, length in enumerate(self.lengths):
            kept = mask[row].nonzero().flatten()
            places[row, kept] = torch.arange(len(kept)) + length
        return places

    def step(self, ids: Tensor, mask: Tensor, hook: Hook | None = None) -> list[Tensor]:
        """Append a step; logits [B, T, vocab] of every rank."""
        known = self.known(ids.to(torch.int64), mask)
        inputs = [self.inputs_of(rank, known) for rank in range(len(self.params))]
        with running(self.compiled):
            logits = self.run(self.graph, inputs, hook)
        self.lengths = [n + int(new) for n, new in zip(self.lengths, mask.sum(dim=1), strict=True)]
        return logits

    def known(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs of a step that are alike for all ranks, by name."""
        tables = {ring_name(f"table_{ring}"): table for ring, table in self.rings.items()}
        return {"input_ids": ids, "positions": self.positions(mask), "page_table": self.page_table, **tables}

    def run(self, graph: fx.GraphModule, inputs: list[list[Any]], hook: Hook | None = None) -> list[Tensor]:
        """Output of every rank, on the CPU; `hook` sees values there too."""
        if self.compiled.device.type == "cpu":  # a step has thousands of values, and nothing to move
            return self.compiled.world.run(graph, inputs, hook)
        placed = [tree_map_only(Tensor, lambda t: t.to(self.compiled.device), x) for x in inputs]

        def shown(rank: int, node: fx.Node, value: Any) -> None:
            assert hook is not None
            hook(rank, node, _on_cpu(value))

        return _on_cpu(self.compiled.world.run(graph, placed, shown if hook else None))

    def inputs_of(self, rank: int, known: dict[str, Any]) -> list[Any]:
        """Values of the outer graph's placeholders on one rank."""
        layout = self.compiled.plan.layout
        ranks = {
            "kvp_rank": torch.tensor(rank % layout.kvp),
            "ep_rank": torch.tensor(rank // layout.tpf),
            "world_rank": torch.tensor(rank),
        }
        values: list[Any] = []
        for node in placeholders(self.graph.graph):
            ref = input_ref(node)
            kind, name = ref
            if kind == "param":
                values.append(self.params[rank][name])
            elif kind == "cache":
                values.append(self.caches[rank][ref.site])
            elif kind == "scale":
                values.append(self.compiled.ranks[rank].scales[ref.site])
            elif kind == "leaf":
                values.append(self.leaves[rank][name])
            else:
                values.append(known[name] if name in known else ranks[name])
        return values


def _on_cpu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.cpu(), value)


@contextmanager
def running(compiled: HelixModule) -> Iterator[None]:
    """No gradients, poisoned memory, and in fp64 the fp32 islands widened."""
    with torch.no_grad(), poisoned_memory():
        if compiled.plan.dtype == "float64":
            with WidenedIslands():
                yield
        else:
            yield
