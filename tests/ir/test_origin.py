"""Which pass made a node, from which captured node and which line: for every node, through save() and load()."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

from helix_compile import HelixError, HelixModule, helix_compile
from helix_compile.ir.graph import aten, source_line
from helix_compile.ir.origin import made_from, mark_captured, mark_pass
from helix_compile.ir.stage import copy_graph, graphs_of
from helix_compile.passes.pipeline import STAGES
from tests.support.models import tiny_model

PLANS = {
    "cp4": {"cp": 4},
    "ag_rs": {"cp": 2, "tpa": 2, "merge": "ag_rs", "v_up": "after", "q_proj": "gather"},
    "one_rank": {"cp": 1},
}


SLOW = [pytest.param(plan, marks=pytest.mark.slow) for plan in ("cp4", "one_rank")]


@pytest.fixture(scope="module", params=["ag_rs", *SLOW], ids=str)
def compiled(request: pytest.FixtureRequest) -> HelixModule:
    return helix_compile(tiny_model("attention_bias"), max_seq_len=64, **PLANS[request.param])


def test_every_node_says_where_it_comes_from(compiled: HelixModule) -> None:
    captured = {g: {n.name for n in gm.graph.nodes} for g, gm in graphs_of(compiled.stages["captured"])}
    seen: dict[str, set[str]] = {}
    for stage, module in compiled.stages.items():
        allowed = STAGES[: STAGES.index(stage) + 1]
        for name, gm in graphs_of(module):
            for node in gm.graph.nodes:
                made_by = node.meta["helix_stage"]
                assert made_by in allowed
                # new exactly where the graph before does not have it
                assert (made_by == stage) == (node.name not in seen.get(name, set())), node
                assert node.meta["helix_origin"] and set(node.meta["helix_origin"]) <= captured[name]
                if made_by == "captured":
                    assert node.meta["helix_origin"] == [node.name]
                assert ".py:" in node.meta["helix_source"], node
                assert not node.meta["helix_source"].startswith(("linear.py", "capture"))
            seen[name] = {n.name for n in gm.graph.nodes}


def test_origins_of_the_nodes_that_matter() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    body = compiled.graph.get_submodule("body_1").graph
    by_name = {n.name: n for n in body.nodes}
    first = compiled.stages["captured"].get_submodule("body_1").graph
    kv_up = next(
        n.name
        for n in first.nodes
        if n.target is aten.linear.default and n.args[1].meta["input"][1].endswith("kv_b_proj.weight")
    )
    attention = next(n.name for n in first.nodes if "scaled_dot_product" in str(n.target))
    assert by_name["q_latent"].meta["helix_origin"] == [kv_up]
    assert by_name["mla_decode"].meta["helix_origin"] == [attention]
    assert by_name["all_to_all_single"].meta["helix_origin"] == [attention]
    assert by_name["all_to_all_single"].meta["helix_via"] == [["attention", "exchanged"]]
    reduced = by_name["all_reduce"]
    assert reduced.meta["helix_stage"] == "lowered"
    assert reduced.meta["helix_origin"] == [reduced.args[0].name]
    assert reduced.meta["helix_via"] == [["reshard", f"{reduced.args[0].name}_sum"]]


def test_it_survives_copies_and_a_reload(tmp_path: Path) -> None:
    compiled = helix_compile(tiny_model(dtype=torch.float32), cp=2, max_seq_len=64)
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    for (name, mine), (_, theirs) in zip(graphs_of(compiled.graph), graphs_of(loaded.graph), strict=True):
        kept = [
            [(n.name, {k: v for k, v in n.meta.items() if k.startswith("helix_")}) for n in g.nodes]
            for g in (mine.graph, theirs.graph, copy_graph(theirs.graph))
        ]
        assert kept[0] == kept[1] == kept[2], name
        assert all(len(meta) == 4 for _, meta in kept[0])
    told = str(loaded.explain_node("body_0.all_reduce"))
    assert "pass lowered" in told and "modeling_deepseek_v3.py:" in told


def test_explain_node_prints_the_chain() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    lines = str(compiled.explain_node("all_to_all_single", body="body_1")).splitlines()
    assert lines[0].startswith("body_1.all_to_all_single = _c10d_functional.all_to_all_single  [4,")
    assert lines[1:3] == ["  made by   pass lowered", "  was       exchanged  (stage attention)"]
    assert lines[3].startswith("  from      scaled_dot_product_attention = aten.scaled_dot")
    assert "kvp:PS" in lines[5] and lines[5].startswith("  reads     packed")
    o_proj = compiled.explain_node("body_1.linear_4")
    assert o_proj.made_by == "captured"
    assert [(s, v.layout) for s, v in o_proj.history] == [
        ("captured", "-"),
        ("attention", "R"),
        ("reshard", "world:P(sum)"),
    ]
    gone = compiled.explain_node("body_1.linear_3")
    assert gone.in_stage == "captured"
    assert {"q_latent", "partial_o_up"} <= set(gone.became)
    move = compiled.explain_node("body_1.exchanged")
    assert move.in_stage == "ffn" and "all_to_all_single" in move.became
    assert json.loads(json.dumps(move.to_json()))["made_by"] == "attention"


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("linear_4", None, "say which: body_0.linear_4, body_1.linear_4"),
        ("body_0.linaer_4", None, "close: body_0.linear_4"),
        ("linear_4", "body_7", "expected one of outer, body_0, body_1"),
        ("zz", "outer", "no node 'zz' in outer"),
    ],
)
def test_explain_node_refuses(name: str, body: str | None, said: str) -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    with pytest.raises(HelixError, match=said):
        compiled.explain_node(name, body)


def small_graph() -> fx.Graph:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(torch.mul, (x, w))
    graph.output(graph.call_function(torch.relu, (y,)))
    return graph


def test_what_a_pass_says_wins_and_dataflow_says_the_rest() -> None:
    graph = small_graph()
    mark_captured(graph)
    x, w, mul, relu, _ = graph.nodes
    before = set(graph.nodes)
    with graph.inserting_before(relu):
        unsaid = graph.call_function(torch.neg, (mul,))
        with made_from(graph, w):
            said = graph.call_function(torch.abs, (unsaid,))
    with graph.inserting_before(mul):
        late = graph.placeholder("late")
    mul.args = (x, late)
    graph.erase_node(w)  # what it was made from may be gone when the pass is over
    mark_pass(graph, before, "edit")
    assert unsaid.meta["helix_origin"] == ["mul"] and said.meta["helix_origin"] == ["w"]
    assert late.meta["helix_origin"] == ["mul"]  # an input: its readers'
    assert {n.meta["helix_stage"] for n in (unsaid, said, late)} == {"edit"}
    assert {n.meta["helix_stage"] for n in (x, mul, relu)} == {"captured"}


def test_source_line_is_the_users() -> None:
    node = next(iter(small_graph().nodes))
    inside = f'File "{torch.__path__[0]}/nn/modules/linear.py", line 134, in forward'
    node.meta["stack_trace"] = f'File "somebody/model.py", line 7, in forward\n  x\n  {inside}\n  y'
    assert source_line(node) == "model.py:7"
    node.meta["stack_trace"] = inside
    assert source_line(node) == ""
