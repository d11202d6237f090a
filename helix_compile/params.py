"""Weights change together with the graph: cut one rank's parameters out of the original ones.

A shard is a view of the original wherever no padding (and no gather of rows) is needed; replicated parameters are the
original tensors themselves. So four virtual ranks cost what one model costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from helix_compile.checkpoint_weights import CheckpointWeights
from helix_compile.errors import PlanError
from helix_compile.layout import HelixLayout
from helix_compile.passes.fx_edit import is_param, placeholders
from helix_compile.plan import HelixPlan, ParamShard


def cut_param(whole: Tensor, shard: ParamShard, layout: HelixLayout, rank: int) -> Tensor:
    """`rank`'s part of `whole`, zero-padded to the common width.

    Raises:
        PlanError: `whole` does not have the shape that the plan was made for.
    """
    if tuple(whole.shape) != shard.source_shape:
        raise PlanError(
            f"parameter {shard.source}: got shape {tuple(whole.shape)}, the plan expects "
            f"{shard.source_shape}"
        )
    if shard.index is not None:
        whole = whole[torch.tensor(shard.index, device=whole.device)]
    part = whole.view(shard.view)
    if shard.window is not None:
        part = part.narrow(*shard.window)
    for cut in shard.cuts:
        start, stop = cut.bounds(layout, rank)
        part = part.narrow(cut.dim, start, stop - start)
        missing = cut.width(layout) - (stop - start)
        if missing:
            zeros = part.new_zeros(
                [missing if d == cut.dim else s for d, s in enumerate(part.shape)]
            )
            part = torch.cat([part, zeros], dim=cut.dim)
    return part.view(shard.shape)


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by full name; a tied one under each of its names."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach() for name, tensor in named}


def shard_of_name(
    plan: HelixPlan, prefixes: list[tuple[str, str]]
) -> dict[str, tuple[str, ParamShard]]:
    """Full local name -> (full name of the original, shard), for (layer prefix, body) pairs."""
    return {
        prefix + shard.name: (prefix + shard.source, shard)
        for prefix, body in prefixes
        for shard in plan.body(body).param_shards
    }


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
            name = node.meta["input"][1]
            source, shard = shards[name] if node.meta.get("sharded") else (name, None)
            yield name, source, shard
