"""Routed experts in both forms: what was matched computes the original's sum; near misses say why."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from helix_compile.ir.graph import aten, calls, is_call, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.stage import copy_graph
from helix_compile.passes.match.ffn import find_dense_ffns, find_moes
from helix_compile.plan.matches import MatchFailure, MoEMatch
from tests.support.graphs import BodyValues, captured_tiny

FORMS = [("batched_mm", torch.float64), ("grouped_mm", torch.float32)]
E, K, F, D = 8, 3, 40, 72


def moe_body(form: str = "batched_mm", dtype: torch.dtype = torch.float64) -> fx.Graph:
    return copy_graph(captured_tiny(dtype=dtype, experts=form).bodies["body_1"].graph)


def only_match(graph: fx.Graph) -> MoEMatch:
    (match,) = find_moes(graph)
    assert isinstance(match, MoEMatch)
    return match


def only_failure(graph: fx.Graph) -> MatchFailure:
    (failure,) = find_moes(graph)
    assert isinstance(failure, MatchFailure)
    return failure


def activation(graph: fx.Graph) -> fx.Node:
    """The silu between the two expert products (the other silu is the shared expert's)."""
    return next(n for n in calls(graph, aten.silu.default) if not is_call(n.args[0], aten.linear.default))


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=[f[0] for f in FORMS])
def test_sizes_names_and_seam(form: str, dtype: torch.dtype) -> None:
    graph = moe_body(form, dtype)
    match = only_match(graph)
    assert match.form == form
    assert (match.num_experts, match.top_k, match.width, match.hidden_size) == (E, K, F, D)
    assert match.gate_up.endswith("experts.gate_up_proj")
    assert match.down.endswith("experts.down_proj")
    assert match.shared == find_dense_ffns(graph)[0].down
    assert is_call(node_named(graph, match.seam), aten.add.Tensor)


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=[f[0] for f in FORMS])
def test_the_matched_values_give_the_original_sum(form: str, dtype: torch.dtype) -> None:
    """x, ids and weights through helix::moe_experts, all experts on one rank, is the node that goes."""
    graph = moe_body(form, dtype)
    match, values = only_match(graph), BodyValues(graph)
    x, ids, weights = (values[n] for n in (match.x, match.expert_ids, match.weights))
    assert ids.dtype is torch.int64 and ids.shape == weights.shape == (6, K)
    gate_up, down = (values.param(n) for n in (match.gate_up, match.down))
    got = helix.moe_experts(x, ids, weights, gate_up.view(E, 2, F, D), down, torch.tensor(0))
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    expected = values[match.output]
    assert (got - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=[f[0] for f in FORMS])
def test_another_activation_is_refused(form: str, dtype: torch.dtype) -> None:
    graph = moe_body(form, dtype)
    activation(graph).target = aten.gelu.default
    assert "activation `aten.gelu.default`; expected silu" in only_failure(graph).reason


def test_weights_chosen_by_other_ids_are_refused() -> None:
    graph = moe_body()
    chosen = [
        n for n in calls(graph, aten.index.Tensor) if n.args[0].meta.get("input", ["", ""])[1].endswith("down_proj")
    ]
    ids = chosen[0].args[1][0]
    with graph.inserting_before(chosen[0]):
        other = graph.call_function(aten.neg.default, (ids,))
    other.meta["val"] = ids.meta["val"]
    chosen[0].args = (chosen[0].args[0], [other])
    assert "gate_up and down are chosen by different ids" in only_failure(graph).reason


def test_a_second_reader_of_the_product_is_refused() -> None:
    graph = moe_body()
    product = next(iter(activation(graph).users))
    with graph.inserting_after(product):
        graph.call_function(aten.neg.default, (product,))
    failure = only_failure(graph)
    assert failure.reason.startswith(f"`{product.name}` is used by") and failure.node == product.name


def test_rows_that_are_not_put_back_are_refused() -> None:
    graph = moe_body("grouped_mm", torch.float32)
    (inverse,) = calls(graph, aten.index_put.default)
    order = inverse.args[1][0]
    with graph.inserting_before(inverse):
        other = graph.call_function(aten.neg.default, (order,))
    other.meta["val"] = order.meta["val"]
    inverse.args = (inverse.args[0], [other], *inverse.args[2:])
    assert "rows are not put back by the inverse of order" in only_failure(graph).reason


def test_a_dense_body_has_no_routed_experts() -> None:
    assert find_moes(captured_tiny().bodies["body_0"].graph) == []
