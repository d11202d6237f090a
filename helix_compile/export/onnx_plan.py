"""plan.onnx: the step of one device, with sharding specs that say how the ranks share it.

Its nodes are those of the same model at cp=1, which are among those of cp=N by name. What the layouts of cp=N say of a weight or a
value becomes a spec. The cache has pages of cp * tokens_per_block slots, so the round robin of tokens is a plain cut of their axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, fx
from torch.distributed.tensor.placement_types import Shard

from helix_compile.errors import ExportError
from helix_compile.export.onnx_graph import RankModel, rank_model
from helix_compile.export.onnx_shardings import CONFIGURATION, spec_of
from helix_compile.ir.graph import input_ref
from helix_compile.ir.stage import bodies_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout
from helix_compile.passes.typing.check_layouts import check_layouts
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.compiled import CompiledModule

Cuts = list[tuple[int, str]]  # (dim, axis of the mesh), ascending by dim


@dataclass(frozen=True)
class LogicalModel:
    """The step of one device.

    Attributes:
        common: the model, without weights.
        not_said: what no spec can say, and why: "body_0.mla_decode: PS over kvp".
    """

    common: RankModel
    not_said: tuple[str, ...]


def logical_model(
    ranks: CompiledModule,
    logical: CompiledModule,
    ranks_graph: fx.GraphModule,
    graph: fx.GraphModule,
    layers: Collection[int] | None,
) -> LogicalModel:
    """The model of `logical`, sharded as `ranks` are.

    Args:
        ranks: at cp=N.
        logical: the same model at cp=1.
        ranks_graph, graph: their lowered stages, without kernels.
        layers: as of rank_model().

    Raises:
        ExportError: `logical` is not one rank of the same model.
    """
    plan, own = ranks.plan, logical.plan
    if (
        own.layout.world_size != 1
        or (own.model, own.dtype) != (plan.model, plan.dtype)
        or [b.layers for b in own.bodies] != [b.layers for b in plan.bodies]
    ):
        raise ExportError(
            f"plan.onnx: logical= must be the same model at cp=1, got {own.model} at {own.layout.world_size} ranks"
        )
    page = plan.layout.kvp * plan.options.tokens_per_block
    pages = -(-plan.options.max_seq_len // page)
    caches = [
        torch.empty((plan.options.max_batch_size * pages, page, *cache.shape[2:]), dtype=cache.dtype, device="meta")
        for cache in logical.ranks[0].cache
    ]
    common = rank_model(graph, own, caches, pages, logical.facts.vocab_size, layers, flat=True)
    shardings, not_said = _shardings(common, ranks, logical, ranks_graph, graph, caches)
    _annotate(common.model, shardings, plan.layout)
    return LogicalModel(common, tuple(not_said))


def _shardings(
    common: RankModel,
    ranks: CompiledModule,
    logical: CompiledModule,
    ranks_graph: fx.GraphModule,
    graph: fx.GraphModule,
    caches: list[Tensor],
) -> tuple[dict[str, Cuts], list[str]]:
    """Tensor -> how it is cut; and what can't be said."""
    plan, layout = ranks.plan, ranks.plan.layout
    found: dict[str, Cuts] = {}
    not_said = dict[str, None]()
    theirs = {name: _typed_nodes(body, name, plan) for name, body in bodies_of(ranks_graph).items()}
    ours = {name: {n.name: n for n in body.graph.nodes} for name, body in bodies_of(graph).items()}
    for (_, body), names in common.values.items():
        for name, value in names.items():
            there, here = theirs[body].get(name), ours[body][name]
            if there is None or input_ref(here).kind == "cache" or value in found:
                continue
            lies, whole, part = there.meta.get("layout"), here.meta.get("val"), there.meta.get("val")
            if not isinstance(lies, dict) or not lies or not isinstance(whole, Tensor) or not isinstance(part, Tensor):
                continue
            cuts, why = _cuts_of(lies, whole, part, layout)
            if why:
                not_said[f"{body}.{name}: {why}"] = None
            elif cuts:
                found[value] = cuts
    for name, cuts, why in _outer_weights(plan, logical):
        if why:
            not_said[f"outer.{name}: {why}"] = None
        elif name in common.weights:
            found[name] = cuts
    for site in common.caches:
        row = ranks.facts.caches[site]
        cuts = [(1, "kvp")] if layout.kvp > 1 else []
        if row.heads and layout.tpa > 1:
            if caches[site].shape[2] % layout.tpa:
                not_said[f"cache_{site}: {row.heads} heads over {layout.tpa} ranks of tpa"] = None
                continue
            cuts.append((2, "tpa"))
        found[f"cache_{site}"] = found[f"cache_{site}_out"] = cuts
    return found, list(not_said)


def _typed_nodes(body: fx.GraphModule, name: str, plan: HelixPlan) -> dict[str, fx.Node]:
    """Nodes of a body by name, with their layouts: a reloaded module has none until it is asked."""
    if not any("layout" in node.meta for node in body.graph.nodes):
        check_layouts(body, plan=plan.body(name), degrees=plan.layout)
    return {node.name: node for node in body.graph.nodes}


def _cuts_of(lies: Layout, whole: Tensor, part: Tensor, layout: HelixLayout) -> tuple[Cuts, str]:
    """How a value is cut, or why no spec says it."""
    cuts: Cuts = []
    for axis, placement in lies.items():
        if layout.size(axis) == 1:
            continue
        if not isinstance(placement, Shard):
            return [], f"{placement} over {axis}"
        cuts.append((placement.dim, axis))
    if len({dim for dim, _ in cuts}) != len(cuts):
        return [], "one dim is cut over two axes"
    factor = {dim: layout.size(axis) for dim, axis in cuts}
    for dim, (of_whole, of_part) in enumerate(zip(whole.shape, part.shape, strict=True)):
        known = isinstance(of_whole, int) and isinstance(of_part, int)
        if known and of_whole != of_part * factor.get(dim, 1):
            return [], f"dim {dim} of size {of_whole} is padded to {factor.get(dim, 1)} x {of_part}"
    return sorted(cuts), ""


def _outer_weights(plan: HelixPlan, logical: CompiledModule) -> list[tuple[str, Cuts, str]]:
    """(name, cuts, why not) of embedding and head, where they are cut."""
    found = []
    for shard in plan.outer.param_shards:
        cuts = [(cut.dim, cut.axis) for cut in shard.cuts if plan.layout.size(cut.axis) > 1]
        is_plain = shard.view == shard.source_shape and shard.window is None and shard.index is None
        even = all(cut.total % plan.layout.size(cut.axis) == 0 and cut.padding is None for cut in shard.cuts)
        found.append((shard.source, cuts, "" if is_plain and even else "rows are padded"))
    return found


def _annotate(model: ModelProto, shardings: Mapping[str, Cuts], layout: HelixLayout) -> None:
    """Each spec at the node that makes its tensor, and at those that read it."""
    configuration: Any = model.configuration.add(name=CONFIGURATION, num_devices=layout.world_size)
    configuration.device.extend(f"rank{rank}" for rank in range(layout.world_size))
    specs = {name: spec_of(name, cuts, layout) for name, cuts in shardings.items() if cuts}
    for node in model.graph.node:
        named = [name for name in dict.fromkeys((*node.input, *node.output)) if name in specs]
        if named:
            node.device_configurations.add(configuration_id=CONFIGURATION, sharding_spec=[specs[n] for n in named])
