"""Dense FFNs and shared experts, found by dataflow."""

from __future__ import annotations

import torch
from torch import fx

from helix_compile.ir.graph import aten, calls, node_named
from helix_compile.ir.stage import copy_graph
from helix_compile.passes.match.ffn import find_dense_ffns
from helix_compile.plan.matches import DenseFFNMatch
from tests.support.graphs import BodyValues, captured_tiny


def body(name: str, variant: str = "plain") -> fx.Graph:
    return copy_graph(captured_tiny(variant).bodies[name].graph)


def only_match(graph: fx.Graph) -> DenseFFNMatch:
    (match,) = find_dense_ffns(graph)
    return match


def test_dense_layer_by_size_and_value() -> None:
    graph = body("body_0")
    match, values = only_match(graph), BodyValues(graph)
    assert (match.width, match.input_size, match.hidden_size) == (112, 72, 72)
    x = values[node_named(graph, match.gate).args[0].name]
    gate, up, down = (values.param(n) for n in (match.gate_weight, match.up_weight, match.down_weight))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(values[match.down], expected, rtol=1e-12, atol=1e-12)
    assert (match.gate_bias, match.up_bias, match.down_bias) == (None, None, None)


def test_two_shared_experts_are_one_wide_ffn() -> None:
    assert only_match(body("body_1", "two_shared")).width == 2 * 40
    assert only_match(body("body_1")).width == 40


def test_gate_and_up_of_different_inputs_are_no_ffn() -> None:
    graph = body("body_0")
    up = node_named(graph, only_match(graph).up)
    with graph.inserting_before(up):
        other = graph.call_function(aten.neg.default, (up.args[0],))
    other.meta["val"] = up.args[0].meta["val"]
    up.update_arg(0, other)
    assert find_dense_ffns(graph) == []


def test_an_activation_outside_the_list_is_no_ffn() -> None:
    """A shard is padded with zeros, so the activation must be one of a list known to be harmless there."""
    graph = body("body_0")
    (silu,) = calls(graph, aten.silu.default)
    silu.target = aten.sigmoid.default
    assert find_dense_ffns(graph) == []


def test_a_product_that_is_read_twice_is_no_ffn() -> None:
    graph = body("body_0")
    product = node_named(graph, only_match(graph).product)
    with graph.inserting_after(product):
        graph.call_function(aten.neg.default, (product,))
    assert find_dense_ffns(graph) == []
