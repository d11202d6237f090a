"""Steps of a compiled module on caches of the verifier's own, laid out so that faults show.

Pages of a sequence are not in a row. Pages that no sequence has are NaN, unused slots of a page in use hold a large
finite value (a kernel may read them, and must then ignore them); memory that an op allocates and does not write is NaN.

Caches and parameters are where the module is. Everything else of the verifier is on the CPU, which the original is moved
to: what goes in is moved, and what comes out comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from helix_compile.config.options import PAGE_SIZE
from helix_compile.ir.graph import input_ref, placeholders
from helix_compile.ir.leaves import LeafState, leaf_states
from helix_compile.module import HelixModule
from helix_compile.verifier.contract import deal
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
    caches: list[list[Tensor]] = field(init=False)
    leaves: list[dict[str, LeafState]] = field(init=False)
    format: CacheFormat = field(init=False)

    def __post_init__(self) -> None:
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        self.lengths = [0] * self.rows
        fullest = len(deal(self.capacity, layout.kvp, options.tokens_per_block)[0])
        pages = max(1, -(-fullest // PAGE_SIZE))
        total = self.rows * pages + 3  # three that no sequence has
        generator = torch.Generator().manual_seed(self.seed)
        shuffled = torch.randperm(total, generator=generator)[: self.rows * pages]
        device = self.compiled.device
        self.page_table = shuffled.view(self.rows, pages)
        self.format = CacheFormat.of(self.compiled)
        self.leaves = [leaf_states(self.graph.graph) for _ in self.params]
        self.caches = []
        for _ in self.params:
            mine = []
            for site in range(len(self.compiled.facts.caches)):
                cache = self.format.empty(site, (total, PAGE_SIZE), layout.tpa)
                cache[shuffled] = self._stale(site)
                mine.append(cache.to(device))
            self.caches.append(mine)

    @property
    def slots(self) -> int:
        """Slots of a sequence on one rank."""
        return self.page_table.shape[1] * PAGE_SIZE

    def _stale(self, site: int) -> Tensor:
        row = self.compiled.facts.caches[site]
        tail = row.tail(self.compiled.plan.layout.tpa)
        return self.format.encode(site, torch.full((1, *tail), STALE))[0]

    def stale_entry(self, site: int) -> Tensor:
        """What a slot stands for that nobody has written."""
        return self.format.decode(site, self._stale(site)[None])[0].double()

    def fill(self, site: int, row: int, entries: Tensor) -> None:
        """Lay out a whole sequence's entries [length, first + second] of one site on every rank."""
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        hands = deal(len(entries), layout.kvp, options.tokens_per_block)
        for rank, caches in enumerate(self.caches):
            mine = hands[rank % layout.kvp]
            slots = torch.arange(len(mine))
            pages = self.page_table[row][slots // PAGE_SIZE]
            kind = self.compiled.facts.caches[site]
            rows = on_rank(entries[mine], kind, rank // layout.kvp, layout.tpa)
            caches[site][pages, slots % PAGE_SIZE] = self.format.encode(site, rows).to(caches[site])
        self.lengths[row] = len(entries)

    def shard(self, site: int, row: int, rank: int, count: int) -> Tensor:
        """The first `count` local slots of a sequence on one rank: entries [count, *] of its heads, in float64 where they are FP8."""
        slots = torch.arange(count)
        pages = self.page_table[row][slots // PAGE_SIZE]
        rows = self.caches[rank][site][pages, slots % PAGE_SIZE].cpu()
        return side_by_side(self.format.decode(site, rows), self.compiled.facts.caches[site])

    def gathered(self, site: int, row: int, length: int, tpa_rank: int = 0) -> Tensor:
        """What the ranks of one tpa coordinate hold of a sequence, in order of position: [length, *]."""
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        hands = deal(length, layout.kvp, options.tokens_per_block)
        held = [self.shard(site, row, tpa_rank * layout.kvp + kvp, len(mine)) for kvp, mine in enumerate(hands)]
        whole = held[0].new_empty((length, held[0].shape[1]))
        for mine, entries in zip(hands, held, strict=True):
            whole[mine] = entries
        return whole

    def entries(self, site: int, row: int, length: int) -> Tensor:
        """The whole entries of a sequence, of all the model's KV heads, in order of position: [length, first + second] in float64."""
        kind, layout = self.compiled.facts.caches[site], self.compiled.plan.layout
        if not kind.heads:
            return self.gathered(site, row, length).double()
        parts = [self.gathered(site, row, length, tpa).double() for tpa in range(layout.tpa)]
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
        known = {"input_ids": ids.to(torch.int64), "positions": self.positions(mask), "page_table": self.page_table}
        inputs = [self.inputs_of(rank, known) for rank in range(len(self.params))]
        with running(self.compiled):
            logits = self.run(self.graph, inputs, hook)
        self.lengths = [n + int(new) for n, new in zip(self.lengths, mask.sum(dim=1), strict=True)]
        return logits

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
