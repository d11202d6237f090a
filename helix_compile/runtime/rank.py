"""What a rank holds, cut out of the original weights, and what is kept of the original model: a HelixModule's data.

A shard is a view of the original wherever no padding (and no gather of rows) is needed; replicated parameters are the
original tensors themselves. So four virtual ranks cost what one model costs.

What reads a model or a checkpoint imports transformers, so it is imported where one is read: who steps what was exported has neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from helix_compile.cache.pages import allocate_caches, scales_of_caches
from helix_compile.errors import CaptureError, RuntimeFault
from helix_compile.ir.graph import input_ref, is_param, placeholders
from helix_compile.ir.leaves import LeafState, leaf_states, leaves_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.helix_plan import HelixPlan, ParamShard
from helix_compile.plan.matches import LayerMatch
from helix_compile.plan.shard import cut_param

if TYPE_CHECKING:
    from helix_compile.capture.captured import CapturedGraph
    from helix_compile.runtime.watch import ModelWatch
    from helix_compile.worlds.world import World


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and plain tensor attribute by full name; a tied one under each of its names."""
    from helix_compile.capture.structure import tensors_of

    return {name: tensor.detach() for name, tensor in tensors_of(model).items()}


def shard_of_name(plan: HelixPlan, prefixes: list[tuple[str, str]]) -> dict[str, tuple[str, ParamShard]]:
    """Full local name -> (full name of the original, shard), for (layer prefix, body) pairs."""
    return {
        prefix + shard.name: (prefix + shard.source, shard)
        for prefix, body in prefixes
        for shard in plan.body(body).param_shards
    } | {shard.name: (shard.source, shard) for shard in plan.outer.param_shards}


def params_of_stage(
    stage: fx.GraphModule,
    whole: Mapping[str, Tensor],
    shards: dict[str, tuple[str, ParamShard]],
    layout: HelixLayout,
    rank: int,
) -> Iterator[tuple[str, Tensor]]:
    """(full local name, tensor) of every parameter that a stage reads: cut only where the stage has it cut.

    From a checkpoint only that part is read, now.
    """
    from helix_compile.checkpoint.weights import CheckpointWeights

    for name, source, shard in wanted_by_stage(stage, shards):
        if shard is None:
            yield name, whole[source]
        elif isinstance(whole, CheckpointWeights):
            yield name, whole.part(source, shard, layout, rank)
        else:
            yield name, cut_param(whole[source], shard, layout, rank)


def wanted_by_stage(
    stage: fx.GraphModule, shards: Mapping[str, tuple[str, ParamShard]]
) -> Iterator[tuple[str, str, ParamShard | None]]:
    """(full local name, full name of the original, its cut or None where it stays whole) of a stage's parameters."""
    for node in placeholders(stage.graph):
        if is_param(node):
            name = input_ref(node).name
            source, shard = shards[name] if node.meta.get("sharded") else (name, None)
            yield name, source, shard


@dataclass
class Rank:
    """What one rank holds.

    Attributes:
        rank: its number.
        params: full name -> local tensor; assigning an item changes this rank only.
        cache: one [num_pages, page_size, R + r] tensor per cached attention; where K and V are cached,
            [num_pages, page_size, K / tpa, Dk + Dv]. In FP8 a token may be bytes (CacheRow.stored).
        scales: of caches in fp8_e4m3, one float32 scalar each; else none.
        leaves: state of each layer that stays the user's own module.
        cut: what `params` held at birth and its version then: what was assigned or edited since is the user's.
    """

    rank: int
    params: MutableMapping[str, Tensor]
    cache: list[Tensor]
    scales: list[Tensor] = field(default_factory=list)
    leaves: dict[str, LeafState] = field(default_factory=dict)
    cut: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What a module needs to know of the model it was made from.

    Attributes:
        caches: what a token leaves in the cache of each cached attention.
        originals: full name -> original tensor, read on demand where the model is a checkpoint folder; empty in a
            reloaded module, which runs `lowered` only.
        shards: full local name -> (full name of the original, its cut).
        watch: is the model still what it was? None: there is none in memory.
        limits: see CapturedGraph.
        converted: the originals are those of a copy in another dtype.
    """

    vocab_size: int
    caches: tuple[CacheRow, ...]
    originals: Mapping[str, Tensor]
    device: torch.device
    shards: dict[str, tuple[str, ParamShard]] = field(default_factory=dict)
    config: Any = None
    generation_config: Any = None
    watch: ModelWatch | None = None
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    converted: bool = False

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers that a token leaves in each cached attention, all heads together: R + r, or K (Dk + Dv)."""
        return tuple(sum(row.widths) for row in self.caches)

    @property
    def latent_widths(self) -> tuple[int, ...]:
        """Those of the first part: R, or K Dk."""
        return tuple(row.widths[0] for row in self.caches)


def build_ranks(plan: HelixPlan, lowered: fx.GraphModule, facts: ModelFacts, world: World) -> list[Rank]:
    """Cut (from a checkpoint: read) parameters and allocate caches for the ranks of this process, and for no other."""
    from helix_compile.checkpoint.weights import CheckpointWeights
    from helix_compile.runtime.watch import state_of

    dtype = getattr(torch, plan.dtype)
    ranks, whole = [], facts.originals
    bar: AbstractContextManager[None] = nullcontext()
    if isinstance(whole, CheckpointWeights):
        wanted = [(source, shard) for _, source, shard in wanted_by_stage(lowered, facts.shards)]
        bar = whole.progress(wanted, plan.layout, world.ranks)
    with bar:
        for rank in world.ranks:
            params = params_of_rank(plan, lowered, facts, world, rank)
            cache = allocate_caches(facts.caches, plan, dtype, facts.device)
            cut = {n: (t, state_of(t)[1]) for n, t in params.items()} if facts.watch else {}
            scales = scales_of_caches(len(facts.caches), plan.options, facts.device)
            ranks.append(Rank(rank, params, cache, scales, leaf_states(lowered.graph), cut))
    if facts.watch is not None:
        facts.watch.sample({source for rank in ranks for _, source, _, _ in _copies(rank, lowered, facts)})
    return ranks


def _copies(
    rank: Rank, stage: fx.GraphModule, facts: ModelFacts
) -> Iterator[tuple[str, str, ParamShard | None, Tensor]]:
    """(full local name, full name of the original, cut, tensor) of what a rank holds as a copy, as it was cut."""
    for name, source, shard in wanted_by_stage(stage, facts.shards):
        held, whole = rank.params.get(name), facts.originals[source]
        if name in rank.cut and held is rank.cut[name][0] and not _shares(held, whole):
            yield name, source, shard, held


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def follow_edits(plan: HelixPlan, lowered: fx.GraphModule, ranks: Sequence[Rank], facts: ModelFacts) -> None:
    """Before a step: what was edited in place in the model is cut again where a rank holds a copy of it.

    Raises:
        RuntimeFault: names parameters or modules that were replaced, or edits that can't be followed.
    """
    if facts.watch is None or not (edited := facts.watch.edited()):
        return
    from helix_compile.runtime.watch import not_followed, state_of

    stale = [n for n in edited if n in facts.originals and not facts.watch.is_live(n, facts.originals[n])]
    if facts.converted:  # a constant in a list has another name there
        stale += [n for n in edited if n not in facts.originals]
    for rank in ranks:
        for name, source, _, held in _copies(rank, lowered, facts):
            if source in edited and state_of(held)[1] != rank.cut[name][1]:
                stale.append(source)
    if stale:
        raise not_followed(sorted(set(stale)))
    for rank in ranks:
        for name, source, shard, held in _copies(rank, lowered, facts):
            if source in edited:
                whole = facts.originals[source]
                fresh = whole if shard is None else cut_param(whole, shard, plan.layout, rank.rank)
                with torch.no_grad():
                    held.copy_(fresh)
                rank.cut[name] = (held, state_of(held)[1])
    facts.watch.seen(edited)


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


def facts_of(
    captured: CapturedGraph, matches: dict[str, LayerMatch], plan: HelixPlan, device: torch.device | None, world: World
) -> ModelFacts:
    """Original tensors (of a folder: read on demand), their cuts, cache widths and configurations.

    Where all ranks live here the originals go to `device` whole, and shards are views of them; a rank of its own
    process takes its cuts there alone.
    """
    from helix_compile.capture.source import device_of

    model = captured.model
    assert model is not None
    if captured.leaves and captured.weights is not None:
        raise CaptureError(
            f"{', '.join(x.name for x in captured.leaves)} stay the model's own modules, which a folder that is read "
            "shard by shard does not hold; load the model first: AutoModelForCausalLM.from_pretrained(folder).eval()"
        )
    here = next(model.parameters()).device
    if captured.leaves and device is not None and device != here:
        raise CaptureError(
            f"device={str(device)!r}: {', '.join(x.name for x in captured.leaves)} stay the model's own modules, which "
            f"are on {here}; move the model there first"
        )
    tensors: Mapping[str, Tensor] = captured.weights or {**originals(model), **captured.constants}
    everyone = len(world.ranks) == world.mesh.world_size
    if device is not None and everyone and captured.weights is None:
        tensors = {n: t.to(device) for n, t in tensors.items()}
    sites = [a for layer in captured.layers for a in matches[layer.body].attentions if not a.shared]
    return ModelFacts(
        vocab_size=captured.vocab_size,
        caches=tuple(a.cache for a in sites),
        originals=tensors,
        shards=shard_of_name(plan, [(layer.prefix, layer.body) for layer in captured.layers]),
        config=model.config,
        limits=captured.limits,
        generation_config=getattr(model, "generation_config", None),
        device=device or device_of(captured),
    )
