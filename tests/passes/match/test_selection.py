"""What chooses the keys that a query sees: found by what it computes, and each near miss is refused with its reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from helix_compile import HelixError
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.stage import copy_module
from helix_compile.passes.match.layers import match_layers
from helix_compile.plan.matches import HandedSelection, Selection
from tests.support.families import tiny_family

aten = torch.ops.aten


@cache
def _captured(name: str) -> CapturedGraph:
    return capture(tiny_family(name))


def _edited(edit: Callable[[fx.Graph], None]) -> CapturedGraph:
    """The first body of deepseek_v32 with an edit."""
    captured = _captured("deepseek_v32")
    graph = copy_module(captured.graph)
    body = graph.get_submodule("body_0")
    edit(body.graph)
    body.graph.lint()
    body.recompile()
    return replace(captured, graph=graph)


def _only(graph: fx.Graph, target: Any) -> fx.Node:
    (node,) = [n for n in graph.nodes if n.target is target]
    return node


def _put_before(node: fx.Node, place: int, target: Any, *args: Any) -> fx.Node:
    """Argument `place` of a node goes through another op first, of which it is the first argument."""
    old = node.args[place]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, (old, *args))
    new.meta = dict(old.meta)
    node.args = (*node.args[:place], new, *node.args[place + 1 :])
    return new


def _no_relu(graph: fx.Graph) -> None:
    _only(graph, aten.relu.default).target = aten.sigmoid.default


def _smallest(graph: fx.Graph) -> None:
    topk = _only(graph, aten.topk.default)
    topk.args = (*topk.args[:2], -1, False)


def _fixed_k(graph: fx.Graph) -> None:
    topk = _only(graph, aten.topk.default)
    topk.args = (topk.args[0], 4, *topk.args[2:])


def _values_are_read(graph: fx.Graph) -> None:
    topk = _only(graph, aten.topk.default)
    with graph.inserting_after(topk):
        values = graph.call_function(operator.getitem, (topk, 0))
    values.meta = {"val": topk.meta["val"][0]}
    with graph.inserting_after(values):
        graph.call_function(aten.exp.default, (values,)).meta = dict(values.meta)


def _scores_unmasked(graph: fx.Graph) -> None:
    topk = _only(graph, aten.topk.default)
    topk.args = (topk.args[0].args[0], *topk.args[1:])


def _first_token_always_scored(graph: fx.Graph) -> None:
    hidden = _only(graph, aten.topk.default).args[0].args[1]  # of masked_fill(raw, hidden, -inf)
    fill = _only(graph, aten.topk.default).args[0]
    with graph.inserting_before(fill):
        column = graph.call_function(aten.slice.Tensor, (hidden, 2, 0, 1))
        column.meta = {"val": hidden.meta["val"][:, :, :1]}
        seen = graph.call_function(aten.zeros_like.default, (column,))
        seen.meta = dict(column.meta)
        opened = graph.call_function(aten.slice_scatter.default, (hidden, seen, 2, 0, 1))
        opened.meta = dict(hidden.meta)
    fill.args = (fill.args[0], opened, *fill.args[2:])


def _biased_scores(graph: fx.Graph) -> None:
    _put_before(_only(graph, aten.topk.default), 0, aten.add.Tensor, 1.0)


def _not_causal(graph: fx.Graph) -> None:
    attend = _only(graph, aten.scaled_dot_product_attention.default)
    attend.args = (*attend.args[:3], attend.args[3].args[1])


def _scaled_keys(graph: fx.Graph) -> None:
    keys = next(n for n in graph.nodes if n.target is aten.cat.default and n.args[0][0].name == "past_index_0")
    (user,) = keys.users
    with graph.inserting_after(keys):
        scaled = graph.call_function(aten.mul.Tensor, (keys, 2.0))
    scaled.meta = dict(keys.meta)
    user.replace_input_with(keys, scaled)


def _chosen_read_elsewhere(graph: fx.Graph) -> None:
    indices = next(n for n in graph.nodes if n.target is operator.getitem and n.args[0].target is aten.topk.default)
    output = next(n for n in graph.nodes if n.op == "output")
    hidden = output.args[0][0]
    with graph.inserting_before(output):
        mean = graph.call_function(aten.amax.default, (indices, [2], True))
        mean.meta = {"val": indices.meta["val"][..., :1]}
        added = graph.call_function(aten.add.Tensor, (hidden, mean))
        added.meta = dict(hidden.meta)
    output.args = ((added, *output.args[0][1:]),)


NEAR_MISSES = [
    (_no_relu, "pass 0 relu, expected one"),
    (_smallest, "takes the smallest along dim -1"),
    (_fixed_k, r"chooses 4 of .* keys, expected min\(k,"),
    (_values_are_read, "the values of the top-k are read"),
    (_scores_unmasked, "hidden elsewhere than where causal"),
    (_first_token_always_scored, "hidden elsewhere than where causal"),
    (_biased_scores, "hidden elsewhere than where causal"),
    (_not_causal, "it differs from causal"),
    (_scaled_keys, "not the sum over heads of w"),
    (_chosen_read_elsewhere, "amax_default.* outside of attention"),
]


@pytest.mark.parametrize(("edit", "reason"), NEAR_MISSES, ids=[e.__name__.strip("_") for e, _ in NEAR_MISSES])
def test_a_near_miss_says_why(edit: Callable[[fx.Graph], None], reason: str) -> None:
    with pytest.raises(HelixError, match=reason):
        match_layers(_edited(edit), 64)


def test_a_layer_that_takes_some_of_what_it_is_handed_is_refused() -> None:
    """Fewer columns than an earlier layer chose: wide enough a slice would look whole to a check of few indices."""
    captured = _captured("glm_moe_dsa")
    graph = copy_module(captured.graph)
    body = graph.get_submodule("body_1")
    handed = next(n for n in body.graph.nodes if n.op == "placeholder" and "topk" in n.name)
    users = list(handed.users)
    with body.graph.inserting_before(users[0]):
        some = body.graph.call_function(aten.slice.Tensor, (handed, 2, 0, 30))
    some.meta = {"val": handed.meta["val"]}
    for user in users:
        user.replace_input_with(handed, some)
    body.recompile()
    with pytest.raises(HelixError, match="it differs from causal"):
        match_layers(replace(captured, graph=graph), 64)


def test_the_graph_itself_matches() -> None:
    """What the near misses are near to."""
    (site,) = match_layers(_edited(lambda graph: None), 64)["body_0"].attentions
    selection = site.selection
    assert isinstance(selection, Selection)
    assert (selection.top_k, selection.heads, selection.width, selection.scale) == (4, 8, 16, 16**-0.5)
    assert site.cache.index == 16 and site.cache.widths == (20, 6 + 16)


def test_what_an_earlier_layer_chose_is_handed_on() -> None:
    matches = match_layers(_captured("glm_moe_dsa"), 64)
    kinds = [type(m.attentions[0].selection) for m in matches.values()]
    assert kinds == [Selection, HandedSelection, Selection]  # layers 1 and 3 share a body, whose sources are two
    assert all(m.attentions[0].selection.top_k == 4 for m in matches.values())
