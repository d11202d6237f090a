"""Steps of a compiled module on caches of the verifier's own, laid out so that faults show.

Pages of a sequence are not in a row. Pages that no sequence has are NaN, unused slots of a page in use hold a large
finite value (a kernel may read them, and must then ignore them); memory that an op allocates and does not write is NaN.

Caches and parameters are where the module is. Everything else of the verifier is on the CPU, which the original is moved
to: what goes in is moved, and what comes out comes back.
"""

from __future__ import annotations

import math
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
        dtype = getattr(torch, self.compiled.plan.dtype)
        self.leaves = [leaf_states(self.graph.graph) for _ in self.params]
        self.caches = []
        for _ in self.params:
            mine = []
            for row in self.compiled.facts.caches:
                shape = (total, PAGE_SIZE, *row.tail(layout.tpa))
                cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
                cache[shuffled.to(device)] = STALE
                mine.append(cache)
            self.caches.append(mine)

    @property
    def slots(self) -> int:
        """Slots of a sequence on one rank."""
        return self.page_table.shape[1] * PAGE_SIZE

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
            caches[site][pages, slots % PAGE_SIZE] = rows.to(caches[site])
        self.lengths[row] = len(entries)

    def shard(self, site: int, row: int, rank: int, count: int) -> Tensor:
        """The first `count` local slots of a sequence on one rank: entries [count, *] of its heads."""
        slots = torch.arange(count)
        pages = self.page_table[row][slots // PAGE_SIZE]
        rows = self.caches[rank][site][pages, slots % PAGE_SIZE].cpu()
        return side_by_side(rows, self.compiled.facts.caches[site])

    def gathered(self, site: int, row: int, length: int, tpa_rank: int = 0) -> Tensor:
        """What the ranks of one tpa coordinate hold of a sequence, in order of position: [length, *]."""
        layout, options = self.compiled.plan.layout, self.compiled.plan.options
        width = math.prod(self.caches[0][site].shape[2:])
        whole = self.caches[0][site].new_empty((length, width), device="cpu")
        for kvp, mine in enumerate(deal(length, layout.kvp, options.tokens_per_block)):
            whole[mine] = self.shard(site, row, tpa_rank * layout.kvp + kvp, len(mine))
        return whole

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
