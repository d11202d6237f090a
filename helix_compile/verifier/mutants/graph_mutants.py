"""Faults in the rewritten graph: collectives, order, positions, duplicated work."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.ir.graph import aten, calls, input_named, input_ref, is_param
from helix_compile.ir.stage import bodies_of
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.mutant import (
    A2A,
    FFN,
    MIXED,
    WAIT,
    c10d,
    collectives,
    helix_nodes,
    mutant,
    shard_names,
    wait_of,
)

ALL_REDUCE = c10d.all_reduce.default


def _drop(node: fx.Node) -> None:
    """Take a collective out: what read its result reads its operand."""
    wait = wait_of(node)
    wait.replace_all_uses_with(node.args[0])
    node.graph.erase_node(wait)
    node.graph.erase_node(node)


def _after(node: fx.Node, target: object, *args: object) -> fx.Node:
    """A node behind `node` that everything that read `node` reads instead."""
    new = _beside(node, target, node, *args)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _beside(node: fx.Node, target: object, *args: object) -> fx.Node:
    """A node behind `node` that nobody reads yet."""
    with node.graph.inserting_after(node):
        return node.graph.call_function(target, args)


@mutant("no all_reduce behind o_proj", 10, "graph")
def no_attention_sum(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        _drop(calls(body.graph, ALL_REDUCE)[0])


@mutant("no all_reduce behind the FFN", 10, "graph")
def no_ffn_sum(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        _drop(calls(body.graph, ALL_REDUCE)[1])


@mutant("all_reduce twice", 10, "graph")
def summed_twice(compiled: HelixModule) -> None:
    for node in collectives(compiled, ALL_REDUCE)[:1]:
        again = _after(wait_of(node), ALL_REDUCE, "sum", "world")
        _after(again, WAIT)


@mutant("all_reduce over kvp only", 10, "graph", MIXED)
def wrong_axis(compiled: HelixModule) -> None:
    for node in collectives(compiled, ALL_REDUCE):
        node.update_arg(2, "kvp")


@mutant("all_reduce takes the maximum", 10, "graph")
def maximum(compiled: HelixModule) -> None:
    for node in collectives(compiled, ALL_REDUCE):
        node.update_arg(1, "max")


@mutant("a collective is not waited for", 10, "graph")
def no_wait(compiled: HelixModule) -> None:
    wait = wait_of(collectives(compiled, ALL_REDUCE)[-1])
    wait.replace_all_uses_with(wait.args[0])
    wait.graph.erase_node(wait)


@mutant("a collective is waited for twice", 10, "graph")
def two_waits(compiled: HelixModule) -> None:
    wait = wait_of(collectives(compiled, ALL_REDUCE)[0])
    second = _beside(wait, WAIT, wait.args[0])
    user = next(u for u in wait.users if u is not second)
    user.replace_input_with(wait, second)


@mutant("a collective is started and its result thrown away", 10, "graph")
def thrown_away(compiled: HelixModule) -> None:
    node = collectives(compiled, ALL_REDUCE)[0]
    wait_of(node).replace_all_uses_with(node.args[0])


@mutant("the exchange is left out: each rank merges its own parts", 10, "graph")
def no_exchange(compiled: HelixModule) -> None:
    for node in collectives(compiled, c10d.all_to_all_single.default):
        _drop(node)


@mutant("peers are merged in rotated order with the statistics left behind", 1, "graph")
def rotated_peers(compiled: HelixModule) -> None:
    for merge in helix_nodes(compiled, "merge_lse"):
        with merge.graph.inserting_before(merge):
            rolled = merge.graph.call_function(aten.roll.default, (merge.args[0], [1], [0]))
        merge.update_arg(0, rolled)


@mutant("owned heads reach o_proj in reverse", 1, "graph")
def reversed_heads(compiled: HelixModule) -> None:
    for merge in helix_nodes(compiled, "merge_lse"):
        _after(merge, aten.flip.default, [2])


@mutant("attention reads the cache before the new token is written", 7, "graph")
def reads_too_early(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "mla_decode"):
        append = decode.args[4]
        decode.update_arg(4, append.args[3])
        last = next(n for n in decode.graph.nodes if n.op == "output")
        last.prepend(append)


def _tables_read(compiled: HelixModule) -> fx.Node:
    """The positions that RoPE reads: clamped, in the outer graph."""
    graph = compiled.graph.graph
    positions = input_named(graph, "input", "positions")
    return next(u for u in positions.users if u.target is aten.clamp.default)


@mutant("query and key positions one too large", 8, "positions")
def off_by_one(compiled: HelixModule) -> None:
    # relative positions among new tokens hold; a context that was imported shows it, and the cache does
    _after(_tables_read(compiled), aten.add.Tensor, 1)


@mutant("RoPE at the local position", 8, "positions")
def local_position(compiled: HelixModule) -> None:
    _after(_tables_read(compiled), aten.floor_divide.default, compiled.plan.layout.kvp)


@mutant("RoPE position repeated within a step", 8, "positions")
def repeated_position(compiled: HelixModule) -> None:
    clamped = _tables_read(compiled)
    first = _beside(clamped, aten.slice.Tensor, clamped, 1, 0, 1)
    same = _beside(first, aten.expand_as.default, first, clamped)
    clamped.replace_all_uses_with(same, delete_user_cb=lambda u: u not in (first, same))


@mutant("scores without the model's scale", 8, "graph")
def no_scale(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "mla_decode"):
        decode.update_arg(5, float(decode.args[5]) * 0.97)


@mutant("every rank computes the whole FFN and takes its part of the sum", 13, "parameters")
def whole_ffn(compiled: HelixModule) -> None:
    size = compiled.plan.layout.world_size
    whole = compiled.facts.originals
    for rank in compiled.ranks:
        rank.params.update({name: whole[name] for name in shard_names(compiled, FFN)})
    body = next(iter(bodies_of(compiled.graph).values()))
    node = calls(body.graph, ALL_REDUCE)[1]
    with node.graph.inserting_before(node):
        part = node.graph.call_function(aten.div.Tensor, (node.args[0], size))
    node.update_arg(0, part)


@mutant("a projection is computed twice and averaged", 13, "graph")
def twice_the_work(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        linear = next(n for n in calls(body.graph, aten.linear.default) if is_param(n.args[1]))
        again = _beside(linear, aten.linear.default, *linear.args)
        both = _beside(again, aten.add.Tensor, linear, again)
        half = _beside(both, aten.mul.Tensor, both, 0.5)
        linear.replace_all_uses_with(half, delete_user_cb=lambda u, own=(again, both): u not in own)


@mutant("attention over the cache is computed twice", 13, "graph")
def attends_twice(compiled: HelixModule) -> None:
    for decode in (*helix_nodes(compiled, "mla_decode"), *helix_nodes(compiled, "gqa_decode")):
        _beside(decode, decode.target, *decode.args)


@mutant("the layers of a model share one layer's cache", 4, "cache")
def one_cache(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    first = input_named(graph, "cache", "cache_0")
    second = input_named(graph, "cache", "cache_1")
    for call in [n for n in graph.nodes if n.op == "call_module" and second in n.args]:
        call.args = tuple(first if a is second else a for a in call.args)


@mutant("a layer is called with the norm of another", 2, "graph")
def foreign_norm(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    layers = [n for n in graph.nodes if n.op == "call_module" and n.target == "body_0"][:2]
    place = next(i for i, a in enumerate(layers[0].args) if input_ref(a).name.endswith("input_layernorm.weight"))
    other = layers[0].args[place]
    layers[1].args = tuple(other if i == place else a for i, a in enumerate(layers[1].args))


@mutant("an op of unknown meaning stands in the graph", 10, "graph", A2A)
def unknown_op(compiled: HelixModule) -> None:
    body = next(iter(bodies_of(compiled.graph).values()))
    node = calls(body.graph, ALL_REDUCE)[0]
    _after(wait_of(node), torch.ops.aten.rand_like.default)
