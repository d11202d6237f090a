"""What each pass leaves of the graph, with its shapes, and what it refuses.

That every stage still computes the original's numbers is test_exact.test_every_stage_runs_and_is_equal.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import fx

from helix_compile import HelixModule, LoweringError, PassError, helix_compile
from helix_compile.ir.graph import aten, calls, input_named, is_call, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.sizes import shape_of
from helix_compile.ir.stage import copy_module
from helix_compile.passes.lower.collectives import lower_moves, no_moves_left
from helix_compile.passes.match.layers import match_layers
from helix_compile.passes.pipeline import STAGES
from helix_compile.passes.rewrite.ffn import shard_ffn_pass
from helix_compile.passes.rewrite.reshard import reshard_pass
from helix_compile.passes.runner import BodyPass, PassContext, run_passes
from helix_compile.plan.matches import LayerMatch
from tests.support.graphs import captured_tiny, key_ops
from tests.support.models import tiny_model


@cache
def compiled_tiny(variant: str = "plain", **options: Any) -> HelixModule:
    return helix_compile(tiny_model(variant), max_seq_len=64, **{"cp": 4, **options})


def body(stage: str, name: str = "body_0", **options: Any) -> fx.GraphModule:
    """A copy of one body of a stage, free to edit."""
    copied = copy_module(compiled_tiny(**options).stages[stage]).get_submodule(name)
    assert isinstance(copied, fx.GraphModule)
    return copied


HEAD = ["linear", "linear", "linear"]  # q_a, q_b, kv_a
FFN = ["linear", "linear", "linear"]  # gate, up, down
ABSORBED = [*HEAD, "einsum", "cache_append", "mla_decode"]


def test_order_of_the_stages() -> None:
    assert tuple(compiled_tiny().stages) == STAGES


def test_attention() -> None:
    """8 sequences at most, V=14 < R=20: W_UV goes before the exchange; the gather before o_proj is still there."""
    ops = [*ABSORBED, "einsum", "all_to_all_heads", "merge_lse", "reshard", "linear", *FFN]
    assert key_ops(body("attention")) == ops
    graph = body("attention").graph
    assert shape_of(calls(graph, helix.merge_lse.default)[0]) == (2, 3, 6, 14)
    assert shape_of(node_named(graph, "o_whole")) == (2, 3, 24, 14)
    assert shape_of(input_named(graph, "param", "self_attn.o_proj.weight")) == (72, 24 * 14)


def test_attention_with_v_up_after_merges_latents() -> None:
    graph = body("attention", v_up="after").graph
    assert shape_of(calls(graph, helix.merge_lse.default)[0]) == (2, 3, 6, 20)
    assert shape_of(node_named(graph, "o_up")) == (2, 3, 6, 14)
    w_uv = input_named(graph, "param", "self_attn.kv_b_proj.weight.w_uv")
    assert shape_of(w_uv) == (6, 14, 20)


def test_attention_with_gathered_queries() -> None:
    """Each rank computes q of its own 6 heads, then all 24 are gathered."""
    ops = [*HEAD, "einsum", "reshard", "cache_append", "mla_decode"]
    gm = body("attention", q_proj="gather")
    assert key_ops(gm)[: len(ops)] == ops
    assert shape_of(input_named(gm.graph, "param", "self_attn.q_b_proj.weight")) == (6 * 16, 28)
    assert shape_of(node_named(gm.graph, "q_gathered")) == (2, 3, 24, 26)


def test_attention_by_all_gather_and_reduce_scatter() -> None:
    ops = [*ABSORBED, "einsum", "reshard", "rescale_by_lse", "reshard", "reshard", "linear", *FFN]
    assert key_ops(body("attention", merge="ag_rs")) == ops


def test_attention_on_one_rank_exchanges_nothing() -> None:
    assert key_ops(body("lowered", cp=1)) == [*ABSORBED, "einsum", "linear", *FFN]


def test_reshard() -> None:
    """The gather of heads is gone, o_proj holds the columns of 6 heads, one sum follows."""
    gm = body("reshard")
    ops = [*ABSORBED, "einsum", "all_to_all_heads", "merge_lse", "linear", "reshard", *FFN]
    assert key_ops(gm) == ops
    assert shape_of(input_named(gm.graph, "param", "self_attn.o_proj.weight")) == (72, 6 * 14)


def test_reshard_adds_a_bias_once_behind_the_sum() -> None:
    gm = body("reshard", variant="attention_bias")
    bias = input_named(gm.graph, "param", "self_attn.o_proj.bias")
    (user,) = bias.users
    assert is_call(user, aten.add.Tensor) and is_call(user.args[0], helix.reshard.default)
    o_proj = user.args[0].args[0]
    assert is_call(o_proj, aten.linear.default) and len(o_proj.args) == 2


def test_ffn_dense() -> None:
    gm = body("ffn")
    assert key_ops(gm)[-5:] == ["reshard", *FFN, "reshard"]
    shapes = [shape_of(input_named(gm.graph, "param", f"mlp.{n}_proj.weight")) for n in ("gate", "up", "down")]
    assert shapes == [(28, 72), (28, 72), (72, 28)]


def test_ffn_routed_and_shared_are_added_before_one_sum() -> None:
    """ep=2 x tpf=2: 4 experts of half width, the shared expert over all 4 ranks."""
    gm = body("ffn", "body_1", ep=2)
    assert key_ops(gm)[-6:] == ["linear", "moe_experts", *FFN, "reshard"]
    (total,) = [n for n in calls(gm.graph, helix.reshard.default) if n.name.endswith("_sum")][1:]
    assert is_call(total.args[0], aten.add.Tensor)
    weights = calls(gm.graph, helix.moe_experts.default)[0].args[3:5]
    assert [shape_of(w) for w in weights] == [(4, 2, 20, 72), (4, 72, 20)]
    assert shape_of(input_named(gm.graph, "param", "mlp.shared_experts.up_proj.weight")) == (10, 72)


def test_lowered() -> None:
    exchange = ["pack_heads", "all_to_all_single", "wait_tensor", "unpack_heads", "merge_lse"]
    total = ["all_reduce", "wait_tensor"]
    expected = [*ABSORBED, "einsum", *exchange, "linear", *total, *FFN, *total]
    assert key_ops(body("lowered")) == expected


def matched(variant: str = "plain") -> Any:
    return match_layers(captured_tiny(variant), 64)["body_0"]


def context(stage: str = "captured", **matches: Any) -> PassContext:
    """What passes look at, as if `stage` were what was captured; matches by body, of body_0 alone where none are given."""
    captured = replace(captured_tiny(), graph=compiled_tiny().stages[stage])
    return PassContext(captured, matches or {"body_0": matched()}, compiled_tiny().plan)


def one(*given: Any) -> int:
    return 1


def test_a_pass_that_does_not_find_its_node_is_named() -> None:
    attention = replace(matched().attentions[0], o_proj="gone")
    broken = context("attention", body_0=replace(matched(), attentions=(attention,)))
    with pytest.raises(PassError, match=r"pass 'reshard' failed after captured: KeyError.*'gone'"):
        run_passes([BodyPass("reshard", reshard_pass, one)], broken)


def test_fewer_rewrites_than_planned_is_an_error() -> None:
    with pytest.raises(PassError, match="body_0: 0 sites rewritten, the plan has 1"):
        run_passes([BodyPass("idle", lambda *given: 0, one)], context())


def test_a_broken_promise_is_an_error_and_the_input_is_untouched() -> None:
    captured = compiled_tiny().stages["captured"]
    before = str(captured.get_submodule("body_0").graph)

    def drop_all(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        output.args = (next(iter(gm.graph.nodes)),)
        return 1

    def no_moves(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> None:
        no_moves_left(gm)

    run_passes([BodyPass("drop", drop_all, one, promises=no_moves)], context())
    assert str(captured.get_submodule("body_0").graph) == before
    for broken in ({"promises": no_moves}, {"needs": no_moves}):
        with pytest.raises(LoweringError, match="moves not lowered: `exchanged`"):
            run_passes([BodyPass("none", one, one, **broken)], context("ffn"))


def test_what_a_pass_needs_is_asked_before_it_runs() -> None:
    def refuse(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> None:
        raise PassError("not yet")

    def run(*given: Any) -> int:
        raise AssertionError("the pass ran")

    with pytest.raises(PassError, match="not yet"):
        run_passes([BodyPass("late", run, one, needs=refuse)], context())


def test_a_biased_shared_expert_is_refused() -> None:
    match = match_layers(captured_tiny(), 64)["body_1"]
    ffn = replace(match.dense_ffns[0], down_bias="mlp.shared_experts.down_proj.bias")
    with pytest.raises(PassError, match="has a bias"):
        shard_ffn_pass(body("reshard", "body_1"), replace(match, dense_ffns=(ffn,)), context())


def test_a_move_that_no_collective_does_is_refused() -> None:
    gm = body("ffn")
    total = calls(gm.graph, helix.reshard.default)[0]
    total.args = (total.args[0], "world:S(2)", "world:S(1)", 4)
    with pytest.raises(LoweringError, match=r"no collective turns 'world:S\(2\)' into 'world:S\(1\)'"):
        lower_moves(gm)
