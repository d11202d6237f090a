"""Faults of layers that read what an earlier layer caches: whose cache it is, and when."""

from __future__ import annotations

from functools import partial

from torch import fx

from helix_compile.ir.graph import aten, helix_op, input_named, input_ref, inputs_of, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.stage import body_of
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.mutant import MIXED, SHARED_CATALOGUE, mutant

_shared = partial(mutant, catalogue=SHARED_CATALOGUE)


def _readers(compiled: HelixModule) -> list[tuple[fx.Node, dict[str, int]]]:
    """(a layer's call, kind of input -> its place) of the layers that read another's cache."""
    found = []
    for call in [n for n in compiled.graph.graph.nodes if n.op == "call_module"]:
        inputs = placeholders(body_of(compiled.graph, call.target).graph)
        kinds = {input_ref(n).kind: i for i, n in enumerate(inputs) if input_ref(n).kind in ("cache", "written")}
        if "written" in kinds:
            found.append((call, kinds))
    return found


@_shared("a shared layer reads its neighbour's cache", 4, "graph")
def neighbours_cache(compiled: HelixModule) -> None:
    caches = inputs_of(compiled.graph.graph, "cache")
    for call, at in _readers(compiled):
        own = call.args[at["cache"]]
        call.update_arg(
            at["cache"], next(n for n in caches if n is not own and n.meta["val"].shape == own.meta["val"].shape)
        )


@_shared("a shared layer reads before the new tokens are in", 7, "graph", MIXED)
def read_before_the_append(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    rank, positions = (input_named(graph, "input", name) for name in ("kvp_rank", "positions"))
    indexed = next(n for n in graph.nodes if helix_op(n) == "shard_index")
    with graph.inserting_after(indexed):
        first = graph.call_function(aten.slice.Tensor, (positions, 1, 0, 1))
    with graph.inserting_after(first):
        before = graph.call_function(aten.sub.Tensor, (first, 1))
    with graph.inserting_after(before):
        spread = graph.call_function(aten.expand_as.default, (before, positions))
    with graph.inserting_after(spread):
        slots = graph.call_function(helix.shard_index.default, (spread, rank, *indexed.args[2:]))
    with graph.inserting_after(slots):
        visible = graph.call_function(next(iter(indexed.users)).target, (slots, 1))
    for call, at in _readers(compiled):
        call.update_arg(at["written"], visible)


@_shared("what a layer hands on does not wait for its append", 7, "graph")
def does_not_wait(compiled: HelixModule) -> None:
    for call, at in _readers(compiled):
        source = call.args[at["written"]].args[0]
        body = body_of(compiled.graph, source.target).graph
        output = next(n for n in body.nodes if n.op == "output")
        hidden, *handed = output.args[0]
        output.args = ((hidden, *(input_named(body, "step", "visible") for _ in handed)),)
