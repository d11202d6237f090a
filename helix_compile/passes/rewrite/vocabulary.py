"""The graph around the layers, its two ends cut over all ranks by rows of the vocabulary.

    embedding(table, ids)   embed_rows(ids, this rank's rows, world_rank * rows) -> reshard(P -> R)
    linear(x, weight)       linear(x, this rank's rows) -> reshard(S(2) -> R) -> slice of the vocabulary, where rows are padded

The logits are gathered right behind the linear: what the model does to them (a softcap, a cast to float32) every rank does to
all of them, as before.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from helix_compile.errors import PassError
from helix_compile.ir.graph import add_input, aten, named, node_named, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.passes.match.vocabulary import find_vocabulary
from helix_compile.passes.rewrite.parts import cut_input
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import VocabularyMatch


@dataclass(frozen=True)
class VocabularyPass:
    """The stage `head`, where embedding and head are cut. See Pass."""

    stage: str = "head"

    def requires(self, stage: fx.GraphModule, context: PassContext) -> None:
        """The plan has cut what the outer graph holds whole."""
        if not context.plan.outer.param_shards:
            raise PassError("pass 'head': the plan cuts no parameter of the outer graph")

    def run(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Rewrite the outer graph; the bodies stay as they are."""
        match, graph = find_vocabulary(context.captured), stage.graph
        for shard in context.plan.outer.param_shards:
            cut_input(graph, shard.name, context.plan.outer)
        _embed(graph, match, context)
        _head(graph, match, context)
        graph.eliminate_dead_code()
        propagate_shapes(graph)

    def ensures(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Each cut parameter is read once for each end, and only there."""
        left = [n.name for n in placeholders(stage.graph) if n.meta.get("sharded") and not n.users]
        if left:
            raise PassError(f"pass 'head': nothing reads {', '.join(left)} any more")


def _embed(graph: fx.Graph, match: VocabularyMatch, context: PassContext) -> None:
    old, layout = node_named(graph, match.embedding), context.plan.layout
    table, ids = old.args[:2]
    assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
    shard = context.plan.outer.shard(match.rows)
    assert shard is not None
    with made_from(graph, old):
        rank = add_input(graph, "input", "world_rank", ids.meta["val"].new_empty(()))
    with made_from(graph, old), graph.inserting_before(old):
        first = named(graph, "first_row", aten.mul.Tensor, rank, shard.shape[0])
        rows = named(graph, "embedded_rows", helix.embed_rows.default, ids, table, first)
        whole = named(graph, "embedded", helix.reshard.default, rows, "world:P(sum)", "R", layout.world_size)
    old.replace_all_uses_with(whole)


def _head(graph: fx.Graph, match: VocabularyMatch, context: PassContext) -> None:
    linear, size = node_named(graph, match.linear), context.plan.layout.world_size
    shard = context.plan.outer.shard(match.weight)
    assert shard is not None
    users = list(linear.users)
    with made_from(graph, linear), graph.inserting_after(linear):
        whole = named(graph, "logits_gathered", helix.reshard.default, linear, "world:S(2)", "R", size)
    if shard.shape[0] * size > match.weight_shape[0]:
        with made_from(graph, linear), graph.inserting_after(whole):
            whole = named(graph, "logits_of_words", aten.slice.Tensor, whole, 2, 0, match.weight_shape[0])
    for user in users:
        user.replace_input_with(linear, whole)
