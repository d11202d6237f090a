"""The typing of layouts catches what a faulty rewrite leaves: each edit here computes something else, and is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from helix_compile import HelixModule, PassError, helix_compile
from helix_compile.ir.graph import aten, calls, input_named
from helix_compile.ir.ops import helix
from helix_compile.ir.stage import copy_module
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import PartialSoftmax, PerRank, format_layout, normal_form, parse_layout
from helix_compile.passes.typing.check_layouts import check_layouts
from tests.support.models import tiny_model

c10d = torch.ops._c10d_functional


@cache
def compiled_tiny(**options: Any) -> HelixModule:
    return helix_compile(tiny_model("attention_bias"), max_seq_len=64, **options)


def check(stage: str, edit: Callable[[fx.Graph], None], name: str = "body_0", **options: Any) -> None:
    compiled = compiled_tiny(**(options or {"cp": 4}))
    body = copy_module(compiled.stages[stage]).get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    edit(body.graph)
    body.graph.lint()
    check_layouts(body, plan=compiled.plan.body(name), degrees=compiled.plan.layout)


def drop_first_sum(graph: fx.Graph) -> None:
    wait = next(n for n in calls(graph, c10d.wait_tensor.default) if n.args[0].target is c10d.all_reduce.default)
    wait.replace_all_uses_with(wait.args[0].args[0])


def drop_last_sum(graph: fx.Graph) -> None:
    wait = calls(graph, c10d.wait_tensor.default)[-1]
    wait.replace_all_uses_with(wait.args[0].args[0])


def double_the_sum(graph: fx.Graph) -> None:
    wait = calls(graph, c10d.wait_tensor.default)[-1]
    with graph.inserting_after(wait):
        again = graph.call_function(c10d.all_reduce.default, (wait, "sum", "world"))
    again.meta = dict(wait.meta)
    wait.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def forget_a_wait(graph: fx.Graph) -> None:
    wait = calls(graph, c10d.wait_tensor.default)[-1]
    wait.replace_all_uses_with(wait.args[0])


def sum_over_kvp_only(graph: fx.Graph) -> None:
    reduced = calls(graph, c10d.all_reduce.default)[0]
    reduced.args = (reduced.args[0], "sum", "kvp")


def maximum(graph: fx.Graph) -> None:
    reduced = calls(graph, c10d.all_reduce.default)[0]
    reduced.args = (reduced.args[0], "max", "world")


def bias_before_the_sum(graph: fx.Graph) -> None:
    bias = input_named(graph, "param", "self_attn.o_proj.bias")
    weight = input_named(graph, "param", "self_attn.o_proj.weight")
    (o_proj,) = weight.users
    o_proj.args = (*o_proj.args, bias)


def skip_the_merge(graph: fx.Graph) -> None:
    (merge,) = calls(graph, helix.merge_lse.default)
    with graph.inserting_before(merge):
        plain = graph.call_function(aten.sum.dim_IntList, (merge.args[0], [0]))
    plain.meta = dict(merge.meta)
    merge.replace_all_uses_with(plain)


def nonlinear_on_a_partial_sum(graph: fx.Graph) -> None:
    reduced = calls(graph, c10d.all_reduce.default)[0]
    with graph.inserting_before(reduced):
        squashed = graph.call_function(aten.silu.default, (reduced.args[0],))
    squashed.meta = dict(reduced.args[0].meta)
    reduced.update_arg(0, squashed)


def gate_with_whole_up(graph: fx.Graph) -> None:
    input_named(graph, "param", "mlp.up_proj.weight").meta["sharded"] = False


EDITS: list[tuple[Callable[[fx.Graph], None], str]] = [
    (drop_first_sum, "world:P|P\\(sum\\)|[Pp]artial"),
    (drop_last_sum, r"[Pp]artial|P\(sum\)"),
    (double_the_sum, r"all_reduce\(sum\) over world of R"),
    (forget_a_wait, "before wait_tensor"),
    (sum_over_kvp_only, r"all_reduce\(sum\) over kvp of world:P\(sum\)"),
    (maximum, r"all_reduce\(max\) over world"),
    (bias_before_the_sum, "a bias is added to a partial sum"),
    (skip_the_merge, r"partial_o_P`, which is world:S\(3\)"),
    (nonlinear_on_a_partial_sum, "a partial sum over world reaches aten.silu.default"),
    (gate_with_whole_up, "one operand is cut along dim 2 over world, the other is whole"),
]


@pytest.mark.parametrize(("edit", "reason"), EDITS, ids=[e[0].__name__ for e in EDITS])
def test_faults_are_named(edit: Callable[[fx.Graph], None], reason: str) -> None:
    options = {"cp": 2, "tpa": 2} if edit is sum_over_kvp_only else {"cp": 4}
    with pytest.raises(PassError, match=reason) as caught:
        check("lowered", edit, **options)
    assert str(caught.value).startswith("body_0, node `")


def test_routed_experts_of_another_rank() -> None:
    """first_expert must differ by rank: a constant would make every rank compute the same experts."""

    def constant(graph: fx.Graph) -> None:
        (experts,) = calls(graph, helix.moe_experts.default)
        first = experts.args[5]
        with graph.inserting_before(experts):
            zero = graph.call_function(aten.zeros_like.default, (graph_whole(graph),))
        zero.meta["val"] = first.meta["val"]
        experts.update_arg(5, zero)

    with pytest.raises(PassError, match="first_expert is R, expected ep:L"):
        check("ffn", constant, "body_1")


def graph_whole(graph: fx.Graph) -> fx.Node:
    """Some value that is the same on every rank."""
    return next(n for n in graph.nodes if n.op == "placeholder")


@pytest.mark.parametrize("stage", ["attention", "reshard", "ffn", "lowered"])
def test_unedited_stages_pass(stage: str) -> None:
    for name in ("body_0", "body_1"):
        check(stage, lambda graph: None, name)
        check(stage, lambda graph: None, name, cp=2, tpa=2, merge="ag_rs", q_proj="gather")


@pytest.mark.parametrize("text", ["R", "world:S(2)", "kvp:PS, tpa:S(2)", "ep:L", "world:P(sum)"])
def test_layouts_as_text(text: str) -> None:
    assert format_layout(parse_layout(text)) == text


def test_normal_form() -> None:
    square = HelixLayout(kvp=2, tpa=2, ep=4, tpf=1)
    assert normal_form({"kvp": Shard(1), "tpa": Shard(1)}, square) == {"world": Shard(1)}
    assert normal_form({"kvp": Shard(1), "tpa": Shard(0)}, square) == {"kvp": Shard(1), "tpa": Shard(0)}
    assert normal_form({"ep": Partial("sum")}, square) == {"world": Partial("sum")}
    assert normal_form({"tpf": Shard(1), "kvp": Replicate()}, square) == {}
    line = HelixLayout(kvp=4, tpa=1, ep=1, tpf=4)
    assert normal_form({"kvp": PartialSoftmax()}, line) == {"kvp": PartialSoftmax()}
    assert normal_form({"kvp": PerRank()}, line) == {"kvp": PerRank()}
    with pytest.raises(ValueError, match="unknown placement 'X'"):
        parse_layout("kvp:X")
