"""What steps prepare once shows every edit in the next step, and nothing is looked up again where there was none."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.layout.degrees import HelixLayout
from helix_compile.runtime.ends import ShortEnds
from helix_compile.runtime.prepared import PreparedSteps
from helix_compile.runtime.rank import Rank

IDS = torch.zeros(1, 1, dtype=torch.int64)


def outer() -> fx.GraphModule:
    graph = fx.Graph()
    for kind, name in (("input", "input_ids"), ("param", "a.weight"), ("input", "kvp_rank"), ("cache", "cache_0")):
        graph.placeholder(name.replace(".", "_")).meta["input"] = [kind, name]
    first = next(iter(graph.nodes))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (first, 1)))
    return fx.GraphModule(torch.nn.Module(), graph)


class Steps:
    """Two ranks and one graph."""

    def __init__(self) -> None:
        self.prepared = PreparedSteps(HelixLayout(kvp=2, tpa=1, ep=1, tpf=2), torch.device("cpu"))
        self.graph = outer()
        self.ranks = [Rank(r, {"a.weight": torch.full((2,), float(r))}, [torch.zeros(1)]) for r in range(2)]

    def lists(self) -> list[list[Any]]:
        step = {"input_ids": IDS}
        return self.prepared.inputs(self.graph, self.ranks, [rank.params for rank in self.ranks], step)


def is_for(given: list[Any], rank: Rank, weight: Tensor) -> bool:
    ids, held, number, cache = given
    return ids is IDS and held is weight and int(number) == rank.rank and cache is rank.cache[0]


def test_each_rank_gets_its_own() -> None:
    steps = Steps()
    for _ in range(2):
        assert all(is_for(g, rank, rank.params["a.weight"]) for g, rank in zip(steps.lists(), steps.ranks, strict=True))


def test_an_assigned_parameter_a_replaced_dict_and_a_replaced_cache_show_in_the_next_step() -> None:
    steps = Steps()
    steps.lists()
    mine = torch.ones(2)
    steps.ranks[0].params["a.weight"] = mine
    assert is_for(steps.lists()[0], steps.ranks[0], mine)
    other = torch.ones(2)
    steps.ranks[0].params = {"a.weight": other}
    steps.ranks[1].cache[0] = torch.ones(1)
    lists = steps.lists()
    assert is_for(lists[0], steps.ranks[0], other)
    assert is_for(lists[1], steps.ranks[1], steps.ranks[1].params["a.weight"])


def test_a_parameter_that_is_gone_is_named() -> None:
    steps = Steps()
    steps.lists()
    steps.ranks[1].params["b.weight"] = steps.ranks[1].params.pop("a.weight")  # the same tensor under another name
    with pytest.raises(RuntimeFault, match=r"rank 1 has no parameter 'a\.weight'"):
        steps.lists()


def test_an_edited_graph_shows_in_the_next_step() -> None:
    steps = Steps()
    steps.lists()
    weight = next(n for n in steps.graph.graph.nodes if n.name == "a_weight")
    weight.meta["input"][1] = "b.weight"  # as it stands, without another node
    bias = steps.ranks[0].params["b.weight"] = steps.ranks[1].params["b.weight"] = torch.ones(3)
    assert all(given[1] is bias for given in steps.lists())
    with steps.graph.graph.inserting_after(weight):
        steps.graph.graph.placeholder("again").meta["input"] = ["cache", "cache_0"]
    assert [given[2] is rank.cache[0] for given, rank in zip(steps.lists(), steps.ranks, strict=True)] == [True, True]


def test_whether_tokens_are_mixed_is_asked_again_after_an_edit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    module = importlib.import_module("helix_compile.runtime.prepared")
    monkeypatch.setattr(module, "mixing_node", lambda graph, padding: asked.append(padding))
    steps = Steps()
    for _ in range(3):
        steps.prepared.mixing(steps.graph)
        steps.prepared.mixing(steps.graph, padding=True)
    assert asked == [False, True]
    next(n for n in steps.graph.graph.nodes if n.op == "call_function").args = (2, 1)
    steps.prepared.mixing(steps.graph)
    assert asked == [False, True, False]


def test_a_constant_that_is_replaced_is_an_edit_of_every_end() -> None:
    """The copy of an outer graph that ends earlier holds the constant that there was."""
    graph = outer()
    graph.register_buffer("factor", torch.ones(1))
    returned = next(n for n in graph.graph.nodes if n.op == "output")
    with graph.graph.inserting_before(returned):
        scaled = graph.graph.call_function(
            torch.ops.aten.mul.Tensor, (returned.args[0], graph.graph.get_attr("factor"))
        )
    returned.args = (scaled,)
    ends = ShortEnds(lambda lowered, what: fx.GraphModule(lowered, lowered.graph))
    first = ends.graph(graph, "best")
    assert first is ends.graph(graph, "best")
    graph.factor = torch.zeros(1)
    second = ends.graph(graph, "best")
    assert second is not first and second is not None and second.factor is graph.factor
