"""MLA sites: the tables are right row by row and as numbers, whatever the form; broken sites say where they break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from helix_compile.ir.graph import aten, calls, is_call, node_named
from helix_compile.ir.stage import copy_graph
from helix_compile.passes.match.attention import find_attention
from helix_compile.plan.matches import AttentionMatch, Latent, MatchFailure
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.graphs import BodyValues, captured_tiny
from tests.support.models import SIZES

H, R, NOPE, ROPE, V = (
    SIZES[k] for k in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
)


def dense_body(variant: str = "plain", attention: str = "sdpa") -> fx.Graph:
    return copy_graph(captured_tiny(variant, attention=attention).bodies["body_0"].graph)


def only_match(graph: fx.Graph) -> AttentionMatch:
    (match,) = find_attention(graph)
    assert isinstance(match, AttentionMatch) and isinstance(match.kind, Latent)
    return match


def only_kind(graph: fx.Graph) -> Latent:
    kind = only_match(graph).kind
    assert isinstance(kind, Latent)
    return kind


def only_failure(graph: fx.Graph) -> MatchFailure:
    (failure,) = find_attention(graph)
    assert isinstance(failure, MatchFailure)
    return failure


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tables_are_the_rows_of_kv_b_proj(attention: str) -> None:
    """Transformers lays kv_b_proj out as [H, nope + v, R] and a query head as [nope, rope]."""
    match, kind = only_match(dense_body(attention=attention)), only_kind(dense_body(attention=attention))
    rows = torch.arange(H * (NOPE + V)).view(H, NOPE + V)
    assert torch.equal(torch.tensor(kind.w_uk.rows), rows[:, :NOPE])
    assert torch.equal(torch.tensor(kind.w_uv.rows), rows[:, NOPE:])
    assert (kind.q_nope, kind.q_rope) == (tuple(range(10)), tuple(range(10, 16)))
    sizes = (match.num_heads, match.q_head_dim, match.v_head_dim)
    assert sizes == (H, NOPE + ROPE, V) and match.cache.widths == (R, ROPE)
    assert kind.w_uk.param == kind.w_uv.param == "self_attn.kv_b_proj.weight"
    assert match.o_weight.endswith("o_proj.weight") and match.q_proj.weight.endswith("q_b_proj.weight")


def absorbed(match: AttentionMatch, values: BodyValues) -> Tensor:
    """Attention [B, H, T, V] written with the match's tables alone; every key is visible."""
    kind = match.kind
    assert isinstance(kind, Latent)
    latent, rope = (
        torch.cat([values[past], values[new]], dim=2)[:, 0] for past, new in zip(match.past, match.new, strict=True)
    )
    q = values[match.q]
    w_uk, w_uv = (values.param(w.param)[torch.tensor(w.rows)] for w in (kind.w_uk, kind.w_uv))
    q_latent = torch.einsum("bhtn,hnr->bhtr", q[..., list(kind.q_nope)], w_uk)
    scores = torch.einsum("bhtr,bsr->bhts", q_latent, latent)
    scores = scores + torch.einsum("bhtj,bsj->bhts", q[..., list(kind.q_rope)], rope)
    weights = torch.softmax(scores * match.scale, dim=-1)
    return torch.einsum("bhts,bsr,hvr->bhtv", weights, latent, w_uv)


@pytest.mark.parametrize(
    ("variant", "attention"),
    [("plain", "sdpa"), ("plain", "eager"), ("no_q_lora", "sdpa"), ("half_rope", "sdpa"), ("yarn_mscale", "sdpa")],
)
def test_absorbed_form_by_tables_is_the_site(variant: str, attention: str) -> None:
    graph = dense_body(variant, attention)
    match, values = only_match(graph), BodyValues(graph)
    if attention == "eager":  # an additive mask
        values.set(match.mask, torch.zeros_like(values[match.mask]))
    with WidenedIslands():
        expected = values[match.anchor]
        torch.testing.assert_close(absorbed(match, values), expected, rtol=0, atol=1e-12)


def test_yarn_scale_is_read_from_the_graph() -> None:
    """Mscale of factor 4: (0.1 ln 4 + 1)^2 / sqrt(16); the plain model's is 1 / 4."""
    assert only_match(dense_body()).scale == 0.25
    expected = 0.25 * (0.1 * float(torch.log(torch.tensor(4.0, dtype=torch.float64))) + 1) ** 2
    assert only_match(dense_body("yarn_mscale")).scale == pytest.approx(expected, rel=1e-12)


def test_biases_are_named() -> None:
    match = only_match(dense_body("attention_bias"))
    assert match.q_proj.bias is None and match.o_bias == "self_attn.o_proj.bias"


def test_v_scaled_is_refused_at_the_multiplication() -> None:
    graph = dense_body()
    (anchor,) = calls(graph, aten.scaled_dot_product_attention.default)
    v = anchor.args[2]
    with graph.inserting_before(anchor):
        scaled = graph.call_function(aten.mul.Tensor, (v, 2.0))
    scaled.meta["val"] = v.meta["val"]
    anchor.update_arg(2, scaled)
    failure = only_failure(graph)
    assert "V does not derive from one linear" in failure.reason
    assert scaled.name in failure.reason


def test_a_bias_on_the_expansion_is_refused() -> None:
    graph = dense_body()
    kv_up = node_named(graph, only_kind(graph).w_uv.product)
    bias = next(n for n in graph.nodes if n.op == "placeholder")
    kv_up.args = (*kv_up.args[:2], bias)
    failure = only_failure(graph)
    assert "has a bias; absorption can't hold it" in failure.reason and failure.node == kv_up.name


@pytest.mark.parametrize("fault", ["new before past", "another dim", "three parts"])
def test_a_cache_that_is_extended_in_another_way_is_refused(fault: str) -> None:
    """Positions would count otherwise: the rewrite appends behind what is cached."""
    graph = dense_body()
    latent = node_named(graph, only_match(graph).new[0])
    (update,) = [n for n in latent.users if is_call(n, aten.cat.default)]
    past, new = update.args[0]
    update.args = {
        "new before past": ([new, past], 2),
        "another dim": ([past, new], 3),
        "three parts": ([past, new, new], 2),
    }[fault]
    failure = only_failure(graph)
    assert "latent: the cache is not extended as cat([past, new], dim=2)" in failure.reason
    assert failure.node == update.name


def test_k_and_v_from_two_linears_over_one_latent_match() -> None:
    graph = dense_body()
    kv_up = node_named(graph, only_kind(graph).w_uv.product)
    (anchor,) = calls(graph, aten.scaled_dot_product_attention.default)
    with graph.inserting_after(kv_up):
        twin = graph.call_function(aten.linear.default, kv_up.args)
    twin.meta["val"] = kv_up.meta["val"]
    with graph.inserting_before(anchor):
        grid = graph.call_function(aten.view.default, (twin, [2, 8, H, NOPE + V]))
        grid.meta["val"] = twin.meta["val"].new_empty(2, 8, H, NOPE + V)
        heads = graph.call_function(aten.transpose.int, (grid, 1, 2))
        heads.meta["val"] = grid.meta["val"].transpose(1, 2)
        v = graph.call_function(aten.slice.Tensor, (heads, 3, NOPE, NOPE + V))
        v.meta["val"] = heads.meta["val"][..., NOPE:]
    anchor.update_arg(2, v)
    kind = only_kind(graph)
    assert (kind.w_uv.product, kind.w_uk.product) == (twin.name, kv_up.name)
    rows = torch.arange(H * (NOPE + V)).view(H, NOPE + V)
    assert torch.equal(torch.tensor(kind.w_uv.rows), rows[:, NOPE:])
    assert torch.equal(torch.tensor(kind.w_uk.rows), rows[:, :NOPE])


def test_two_users_behind_attention_are_refused() -> None:
    graph = dense_body()
    (anchor,) = calls(graph, aten.scaled_dot_product_attention.default)
    with graph.inserting_after(anchor):
        graph.call_function(aten.neg.default, (anchor,))
    failure = only_failure(graph)
    assert "2 users between attention and its output projection" in failure.reason


def test_a_gate_that_is_no_layout_op_is_refused() -> None:
    graph = dense_body()
    (anchor,) = calls(graph, aten.scaled_dot_product_attention.default)
    with graph.inserting_after(anchor):
        gated = graph.call_function(aten.sigmoid.default, (anchor,))
    gated.meta["val"] = anchor.meta["val"]
    anchor.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)
    assert "`aten.sigmoid.default` stands between" in only_failure(graph).reason


def test_a_cap_on_the_scores_is_refused() -> None:
    graph = dense_body(attention="eager")
    softmax = next(n for n in graph.nodes if is_call(n, aten.softmax.int, aten._softmax.default))
    scores = softmax.args[0]
    with graph.inserting_before(softmax):
        capped = graph.call_function(aten.tanh.default, (scores,))
    capped.meta["val"] = scores.meta["val"]
    softmax.update_arg(0, capped)
    assert "the score chain holds `aten.tanh.default`" in only_failure(graph).reason


def test_no_attention_no_match() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(aten.neg.default, (graph.placeholder("x"),)))
    assert find_attention(graph) == []
