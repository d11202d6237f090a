"""Embedding and head cut by rows of the vocabulary over all ranks: who holds which rows, and what is sent.

A vocabulary that does not divide is refused, or padded with rows of zeros behind the last: no token has their ids, and their
logits are cut off behind the gather.
"""

from __future__ import annotations

import torch

from helix_compile.config.options import HelixOptions
from helix_compile.errors import LayoutError
from helix_compile.ir.collectives import ALL_GATHER, ALL_REDUCE
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import Collective, Cut, Decision, OuterPlan, ParamShard
from helix_compile.plan.matches import VocabularyMatch

LOGITS = "logits"  # what a plan calls what ranks gather of the head


def plan_vocabulary(
    match: VocabularyMatch, options: HelixOptions, layout: HelixLayout, dtype: torch.dtype
) -> tuple[OuterPlan, Decision]:
    """Shards and collectives of the outer graph.

    Raises:
        LayoutError: rows that do not divide over the ranks, and may not be padded.
    """
    N, (V, D) = layout.world_size, match.weight_shape
    for what, rows in (("the embedding's", match.embedding_shape[0]), ("the head's", V)):
        if rows % N and not options.pad_heads:
            fits = [n for n in range(1, min(rows, 512) + 1) if rows % n == 0]
            raise LayoutError(
                f"head='shard': {what} {rows} rows can't be divided over N = cp*tpa = {layout.kvp}*{layout.tpa} = {N} ranks "
                f"({rows} % {N} = {rows % N}); choose cp*tpa from {fits}, or head='replicate'; or pad_heads=True, {rows} -> "
                f"{-(-rows // N) * N} rows, the new ones zeros that no token has"
            )
    shapes = {match.rows: match.embedding_shape, match.weight: match.weight_shape}
    if match.bias:
        shapes[match.bias] = (V,)
    shards = tuple(_rows(name, shape, layout) for name, shape in shapes.items())
    width = -(-V // N)
    collectives = (
        Collective(ALL_REDUCE.name, "world", "token embeddings", ALL_REDUCE.egress(N, D * dtype.itemsize)),
        Collective(ALL_GATHER.name, "world", LOGITS, ALL_GATHER.egress(N, width * dtype.itemsize)),
    )
    decision = Decision(
        "head",
        "as asked; each rank holds an N-th of the rows, embeddings are summed and logits gathered behind the linear",
        (("V", V), ("N", N), ("rows of zeros", width * N - V)),
        options.head,
    )
    return OuterPlan(shards, collectives), decision


def _rows(name: str, shape: tuple[int, ...], layout: HelixLayout) -> ParamShard:
    cut = Cut(0, "world", shape[0])
    return ParamShard(name, name, shape, shape, (cut,), (cut.width(layout), *shape[1:]), "world:S(0)")
