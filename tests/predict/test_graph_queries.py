"""networkx queries on graphs whose answers are known by hand, and on a real body."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from helix_compile import helix_compile
from helix_compile.ir.collectives import is_collective
from helix_compile.ir.graph import c10d
from helix_compile.predict.schedule import critical_path, is_convex, reduced_edges, to_networkx
from tests.support.models import tiny_model


def diamond() -> fx.Graph:
    """`x` -> a -> b -> d, x -> c (a collective) -> w -> d, a -> d."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.create_node("call_function", torch.neg, (x,), name="a")
    c = graph.create_node("call_function", c10d.all_reduce.default, (x, "sum", "world"), name="c")
    b = graph.create_node("call_function", torch.abs, (a,), name="b")
    w = graph.create_node("call_function", c10d.wait_tensor.default, (c,), name="w")
    d = graph.create_node("call_function", operator.add, ((a, b), w), name="d")
    graph.output(d)
    return graph


COST = {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0}


def test_view_has_the_edges_and_attributes() -> None:
    view = to_networkx(diamond())
    assert set(view.edges) == {
        ("x", "a"),
        ("x", "c"),
        ("a", "b"),
        ("c", "w"),
        ("a", "d"),
        ("b", "d"),
        ("w", "d"),
        ("d", "output"),
    }
    assert view.nodes["c"]["target"] == "_c10d_functional.all_reduce.default"
    assert view.nodes["x"]["op"] == "placeholder" and view.nodes["x"]["stage"] == "captured"


def test_critical_path_and_slack() -> None:
    path = critical_path(diamond(), COST)
    assert path.total == 6.0 and path.nodes == ("a", "b", "d")
    assert path.collective_slack() == {"c": 1.0}
    assert path.slack["a"] == path.slack["b"] == path.slack["d"] == 0.0
    slower = critical_path(diamond(), {**COST, "c": 7.0})
    assert slower.total == 8.0 and slower.nodes == ("c", "d")
    assert slower.collective_slack() == {"c": 0.0} and slower.slack["b"] == 2.0


def test_critical_path_of_queues() -> None:
    """One queue for all runs them one after the other; two let the collective hide behind a and b."""
    one = critical_path(diamond(), COST, lambda n: "all")
    assert one.total == 10.0 and one.nodes == ("a", "c", "b", "d")
    two = critical_path(diamond(), COST, lambda n: "link" if is_collective(n) else "compute")
    assert two.total == 6.0
    blocked = critical_path(diamond(), {**COST, "c": 7.0}, lambda n: "link" if is_collective(n) else "compute")
    assert blocked.total == 8.0


@pytest.mark.parametrize(
    ("nodes", "convex"),
    [
        ({"a", "b"}, True),
        ({"a", "d"}, False),
        ({"a", "b", "d"}, True),
        ({"x", "d"}, False),
        ({"b", "c"}, True),
        ({"a", "b", "c", "w", "d"}, True),
    ],
)
def test_convexity(nodes: set[str], convex: bool) -> None:
    assert is_convex(diamond(), nodes) is convex


def test_convexity_refuses_unknown_names() -> None:
    with pytest.raises(KeyError, match="nope"):
        is_convex(diamond(), {"a", "nope"})


def test_reduced_edges_drop_what_a_longer_path_says() -> None:
    edges = reduced_edges(diamond())
    assert ("a", "d") not in edges
    assert edges == [("x", "a"), ("x", "c"), ("a", "b"), ("c", "w"), ("b", "d"), ("w", "d"), ("d", "output")]


def test_a_real_body() -> None:
    graph = helix_compile(tiny_model(), cp=4, max_seq_len=64).graph.get_submodule("body_1").graph
    view = to_networkx(graph)
    assert set(view) == {n.name for n in graph.nodes}
    assert view.nodes["all_to_all_single"]["stage"] == "lowered"
    reduced = reduced_edges(graph)
    assert set(reduced) < set(view.edges)
    path = critical_path(graph, {n.name: 1.0 for n in graph.nodes if n.op == "call_function"})
    assert set(path.collectives) == {"all_to_all_single", "all_reduce", "all_reduce_1"}
    assert all(view.has_edge(a, b) for a, b in zip(path.nodes, path.nodes[1:], strict=False))
    assert path.total == len(path.nodes)
