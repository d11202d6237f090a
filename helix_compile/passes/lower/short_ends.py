"""A lowered graph whose head is cut, ended earlier, for a caller that does not want all logits on every rank.

    lastK  linear of the last K columns -> all_gather -> what the model does to their logits
    best   linear of the last column alone -> what the model does to them, on each rank's words -> best_word -> all_gather
           of one candidate a rank -> best_of_words: [B, 1, 2], the largest logit and its word
    topM   the same with top_words: the M largest of each rank, [B, 1, N M, 2]; and the rank's own logits, not gathered

All are copies of the outer graph around the same bodies. What the passes made, or the user edited, is read off the graph: where
the logits are not made by a linear, a gather and ops on each element alone, there is no shorter end.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_compile.ir.collectives import ALL_GATHER, WAIT
from helix_compile.ir.graph import aten, erase_unused, input_named, is_call, named, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.passes.lower.collectives import lower_moves
from helix_compile.passes.typing.aten_rules import ELEMENTWISE

LAST, BEST, TOP = "last", "best", "top"


def short_end(lowered: fx.GraphModule, what: str, words: int) -> fx.GraphModule | None:
    """The graph that ends with BEST, or LAST or TOP and a number; None where the end of `lowered` is not what the passes make.

    Args:
        what: a graph of the last K columns takes steps of K tokens or more.
        words: of the vocabulary, rows of zeros not counted.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(lowered.graph, copies)
    if not isinstance(returned, fx.Node):
        return None
    after = _elementwise_before(returned)
    linear, gathered, peers = _gathered(after[0].args[0] if after else returned)
    if linear is None or gathered is None:
        return None
    is_last = what.startswith(LAST)
    with made_from(graph, linear), graph.inserting_before(linear):
        columns = _last_columns(graph, linear.args[0], int(what.removeprefix(LAST)) if is_last else 1)
    linear.replace_input_with(linear.args[0], columns)
    end = graph.output(returned)
    if not is_last:
        with made_from(graph, linear), graph.inserting_before(end):
            end.args = (_candidates(graph, linear, gathered, after, peers, words, what),)
    module = fx.GraphModule(lowered, graph)
    erase_unused(graph, keep=placeholders(graph))  # the gather of all logits
    propagate_shapes(graph)
    lower_moves(module)
    module.recompile()
    return module


def _last_columns(graph: fx.Graph, hidden: Any, count: int) -> fx.Node:
    """Of hidden [B, T, D]. Counted from T, so that no size of the graph hangs on whether `count` fits the T it was traced with."""
    if count == 1:  # side by side: a linear of rows that lie apart would be a product for each sequence
        column = named(graph, "column", aten.slice.Tensor, hidden, 1, -1, torch.iinfo(torch.int64).max)
        return named(graph, "last_column", aten.contiguous.default, column)
    T = named(graph, "new_tokens", aten.sym_size.int, hidden, 1)
    first = named(graph, "first_column", operator.sub, T, count)
    like = {"dtype": torch.int64, "device": hidden.meta["val"].device}
    kept = graph.create_node("call_function", aten.arange.start, (first, T), like, name="kept_columns")
    return named(graph, "last_columns", aten.index_select.default, hidden, 1, kept)


def _candidates(
    graph: fx.Graph, linear: fx.Node, gathered: fx.Node, after: list[fx.Node], peers: int, words: int, what: str
) -> Any:
    """The largest logits of all ranks, each of which does to its own words what the model does to all."""
    own = {gathered: linear}
    for node in after:
        own[node] = graph.node_copy(node, lambda n: own.get(n, n))
    logits = own[after[-1]] if after else linear
    rank = input_named(graph, "input", "world_rank")
    first = named(graph, "first_word", aten.mul.Tensor, rank, int(linear.args[1].meta["val"].shape[0]))
    if what != BEST:
        top = named(graph, "top_of_rank", helix.top_words.default, logits, first, words, int(what.removeprefix(TOP)))
        return named(graph, "candidates", helix.reshard.default, top, "world:S(2)", "R", peers), logits
    best = named(graph, "best_of_rank", helix.best_word.default, logits, first, words)
    best = named(graph, "candidates", helix.reshard.default, best, "world:S(2)", "R", peers)
    return named(graph, "best", helix.best_of_words.default, best)


def gather_of(logits: Tensor, peers: int, words: int) -> fx.GraphModule:
    """A graph that gathers what each rank has kept of its own logits [B, 1, v]: [B, 1, words]."""
    graph = fx.Graph()
    own = graph.placeholder("logits")
    with FakeTensorMode() as mode:
        own.meta["val"] = mode.from_tensor(logits)
    whole = named(graph, "logits_gathered", helix.reshard.default, own, "world:S(2)", "R", peers)
    graph.output(named(graph, "logits_of_words", aten.slice.Tensor, whole, 2, 0, words))
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_moves(module)
    return module


def _elementwise_before(node: Any) -> list[fx.Node]:
    """What works on each logit alone, from the first to `node`."""
    found: list[fx.Node] = []
    while is_call(node, *ELEMENTWISE) and _tensors(node) == [node.args[0]]:
        found.insert(0, node)
        node = node.args[0]
    return found


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _gathered(node: Any) -> tuple[fx.Node | None, fx.Node | None, int]:
    """(linear, its logits of all words, peers) where `node` is these, gathered over the world and cut to the vocabulary."""
    whole = node
    if is_call(node, aten.slice.Tensor) and node.args[1:3] == (2, 0):
        node = node.args[0]
    for target in (aten.flatten.using_ints, aten.movedim.int, aten.unflatten.int, WAIT):
        if not is_call(node, target):
            return None, None, 0
        node = node.args[0]
    if not is_call(node, ALL_GATHER.target) or node.args[2] != "world":
        return None, None, 0
    peers, linear = int(node.args[1]), node.args[0]
    if is_call(linear, aten.contiguous.default):
        linear = linear.args[0]
    alone = is_call(linear, aten.linear.default) and len(linear.users) == 1
    return (linear, whole, peers) if alone else (None, None, 0)
