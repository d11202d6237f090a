"""What a rank holds, and what is kept of the original model: the data of a HelixModule."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.checkpoint_weights import CheckpointWeights
from helix_compile.errors import RuntimeFault
from helix_compile.kv_cache import allocate_caches
from helix_compile.leaves import LeafState, leaf_states, leaves_of
from helix_compile.matches import CacheRow
from helix_compile.params import params_of_stage, wanted_by_stage
from helix_compile.plan import HelixPlan, ParamShard
from helix_compile.world import World


@dataclass
class Rank:
    """What one rank holds.

    Attributes:
        rank: its number.
        params: full name -> local tensor; assigning an item changes this rank only.
        cache: one [num_pages, page_size, R + r] tensor per cached attention; where K and V are cached,
            [num_pages, page_size, K / tpa, Dk + Dv].
        leaves: state of each layer that stays the user's own module.
    """

    rank: int
    params: MutableMapping[str, Tensor]
    cache: list[Tensor]
    leaves: dict[str, LeafState] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What a module needs to know of the model it was made from.

    Attributes:
        caches: what a token leaves in the cache of each cached attention.
        originals: full name -> original tensor, read on demand where the model is a checkpoint folder; empty in a
            reloaded module, which runs `lowered` only.
        shards: full local name -> (full name of the original, its cut).
    """

    vocab_size: int
    caches: tuple[CacheRow, ...]
    originals: Mapping[str, Tensor]
    device: torch.device
    shards: dict[str, tuple[str, ParamShard]] = field(default_factory=dict)
    config: Any = None
    generation_config: Any = None

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers that a token leaves in each cached attention, all heads together: R + r, or K (Dk + Dv)."""
        return tuple(sum(row.widths) for row in self.caches)

    @property
    def latent_widths(self) -> tuple[int, ...]:
        """Those of the first part: R, or K Dk."""
        return tuple(row.widths[0] for row in self.caches)


def build_ranks(
    plan: HelixPlan, lowered: fx.GraphModule, facts: ModelFacts, world: World
) -> list[Rank]:
    """Cut (from a checkpoint: read) parameters and allocate caches for the ranks of this process, and for no other."""
    dtype = getattr(torch, plan.dtype)
    ranks, whole = [], facts.originals
    bar: AbstractContextManager[None] = nullcontext()
    if isinstance(whole, CheckpointWeights):
        wanted = [(source, shard) for _, source, shard in wanted_by_stage(lowered, facts.shards)]
        bar = whole.progress(wanted, plan.layout, world.ranks)
    with bar:
        for rank in world.ranks:
            params = params_of_rank(plan, lowered, facts, world, rank)
            cache = allocate_caches(facts.caches, plan.options, plan.layout, dtype, facts.device)
            ranks.append(Rank(rank, params, cache, leaf_states(lowered.graph)))
    return ranks


def params_of_rank(
    plan: HelixPlan, stage: fx.GraphModule, facts: ModelFacts, world: World, rank: int
) -> dict[str, Tensor]:
    """Full local name -> tensor of every parameter that a stage reads, on the device.

    Views of the originals where all ranks live in this process. A process with one rank holds what is cut across
    rows compactly: a view would drag the whole original through its caches, and into what it saves.
    """
    cut = params_of_stage(stage, facts.originals, facts.shards, plan.layout, rank)
    if len(world.ranks) == plan.layout.world_size:
        return {name: tensor.to(facts.device) for name, tensor in cut}
    return {name: tensor.to(facts.device).contiguous() for name, tensor in cut}


def clear_leaves(ranks: Sequence[Rank], rows: Sequence[int] | None) -> None:
    """Leaf layers forget these sequences, by default all."""
    for rank in ranks:
        for state in rank.leaves.values():
            state.clear(rows)


def refuse_leaves(ranks: Sequence[Rank], graph: fx.GraphModule, call: str) -> None:
    """RuntimeFault where leaf layers keep a state that latents and rope parts do not hold."""
    if any(rank.leaves for rank in ranks):
        names = ", ".join(leaf.name for leaf in leaves_of(graph))
        raise RuntimeFault(
            f"{call}: {names} stay the user's own modules; their state is not in latents and rope parts and can't be "
            "rolled back; run the prompt here instead"
        )
