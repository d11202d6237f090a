"""The model behind every picture: nothing of a graph is lost, views lie on edges, runs keep it acyclic."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import fx

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.graph import is_param, node_named, placeholders
from helix_compile.ir.stage import copy_graph
from helix_compile.models.presets import build_model, preset_config
from helix_compile.views.bodies import body_views
from helix_compile.views.build_view import build_view, first_stages
from helix_compile.views.folding import fold, is_value
from helix_compile.views.graph_view import GraphView
from tests.support.graphs import compiled_tiny


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return compiled_tiny()


def graphs(compiled: HelixModule) -> list[fx.Graph]:
    """Every body of every stage."""
    return [b.graph for stage in compiled.stages.values() for _, b in stage.named_children()]


def as_networkx(view: GraphView) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(n.name for n in view.nodes)
    graph.add_edges_from((e.source, e.target) for e in view.edges)
    return graph


def test_boxes_of_a_rewritten_layer(compiled: HelixModule) -> None:
    after = body_views(compiled.plan, compiled.stages)[1].after
    assert [n.title for n in after.nodes] == [
        "hidden",
        "input_layernorm",
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "apply_rotary_pos_emb_interleave",
        "apply_rotary_pos_emb_interleave",
        "kv_b_proj.w_uk",
        "cache_append",
        "mla_decode",
        "kv_b_proj.w_uv",
        "pack_heads",
        "all_to_all_single",
        "unpack_heads",
        "merge_lse",
        "o_proj",
        "all_reduce",
        "add",
        "post_attention_layernorm",
        "gate",
        "gate",
        "first_expert",
        "moe_experts",
        "gate_proj",
        "up_proj",
        "shared_experts",
        "down_proj",
        "add",
        "all_reduce",
        "add",
        "output",
    ]
    edges = {(e.source, e.target): e for e in after.edges}
    exchanged = edges["all_to_all_single", "unpacked"]
    assert exchanged.folded == ("_c10d_functional.wait_tensor",)
    partial = edges["mla_decode", "partial_o_up"]
    assert (partial.label, partial.form, partial.folded) == ("[B,T,8,32]", "partial", ("getitem",))
    assert edges["unpacked", "o"].label == "[4,B,T,2,20], [4,B,T,2]"
    assert edges["o", "linear_4"].form == "sharded"
    assert edges["o", "linear_4"].folded == ("aten.flatten.using_ints",)


def test_no_value_and_no_parameter_is_lost(compiled: HelixModule) -> None:
    for graph in graphs(compiled):
        view, folded = build_view(graph, "body"), fold(graph)
        drawn = {m for n in view.nodes for m in [n.name, *(name for name, _ in n.members)]}
        named = {i.name for n in view.nodes for i in (*n.params, *n.step_inputs)}
        for node in graph.nodes:
            if is_value(node) and node.op == "call_function":
                assert (node.name in drawn) != (node in folded.roots), node
            elif is_param(node):
                assert node.meta["input"][1] in named, node
        assert sum(len(n.members) or 1 for n in view.nodes) == len(drawn)


def test_every_view_is_acyclic_and_leads_to_the_output(compiled: HelixModule) -> None:
    for graph in graphs(compiled):
        view = build_view(graph, "body")
        flow = as_networkx(view)
        assert set(flow) == {n.name for n in view.nodes}
        assert nx.is_directed_acyclic_graph(flow)
        assert nx.ancestors(flow, "output") == set(flow) - {"output"}
        place = {n.name: i for i, n in enumerate(view.nodes)}
        assert all(place[e.source] < place[e.target] for e in view.edges)


def test_other_exchanges_are_drawn_too() -> None:
    model = build_model(preset_config("tiny"), meta=True)
    compiled = helix_compile(model, cp=2, tpa=2, merge="ag_rs", q_proj="gather")
    body = body_views(compiled.plan, compiled.stages)[0]
    sent = [(n.title, n.egress) for n in body.after.nodes if n.kind == "collective"]
    assert sent == [(c.op, float(c.egress_bytes_per_rank_per_token)) for c in body.plan.collectives]
    assert len(sent) == 5
    assert nx.is_directed_acyclic_graph(as_networkx(body.after))


def test_collectives_carry_the_bytes_of_the_plan(compiled: HelixModule) -> None:
    for views in body_views(compiled.plan, compiled.stages):
        sent = sum(n.egress or 0 for n in views.after.nodes)
        assert sent == float(views.plan.egress_bytes_per_rank_per_token)
        assert all((n.egress is not None) == (n.kind == "collective") for n in views.after.nodes)


def test_a_plan_that_disagrees_gives_no_bytes(compiled: HelixModule) -> None:
    graph = compiled.graph.get_submodule("body_0").graph
    view = build_view(graph, "body_0", egress=[("all_reduce", 1.0)])
    assert all(n.egress is None for n in view.nodes)


def test_shapes_bytes_and_layouts_of_a_node(compiled: HelixModule) -> None:
    after = body_views(compiled.plan, compiled.stages)[1].after
    linear = after.node("linear_4")
    value = linear.outputs[0]
    assert (value.shape, value.dtype, value.bytes) == ("[B,T,128]", "float32", "512 x B*T")
    assert value.layout == {"world": "P(sum)"}
    assert linear.cluster == "self_attn"
    assert linear.source.startswith("modeling_deepseek_v3.py:")
    packed = after.node("packed").outputs[0]
    assert (packed.shape, packed.bytes) == ("[4,42*B*T]", "672 x B*T")
    reduced = after.node("all_reduce").outputs[0]
    assert reduced.layout == {}  # pending is gone with the wait


def test_stages_by_meta_else_by_first_appearance(compiled: HelixModule) -> None:
    made = first_stages(compiled.stages, "body_1")
    assert (made["linear"], made["mla_decode"], made["routed"]) == ("captured", "attention", "ffn")
    assert made["all_reduce"] == "lowered"
    graph = copy_graph(compiled.graph.get_submodule("body_1").graph)
    node = node_named(graph, "mla_decode")
    node.meta.update(helix_stage="mine", helix_origin=["scaled_dot_product_attention"], helix_source="mla.py:7")
    seen = build_view(graph, "body_1", first_stage=made).node("mla_decode")
    assert (seen.stage, seen.source) == ("mine", "mla.py:7")
    assert seen.origin == ("scaled_dot_product_attention",)


def test_looking_changes_nothing(compiled: HelixModule) -> None:
    def state() -> list[str]:
        return [
            f"{n.format_node()} {sorted(n.meta)} {n.meta.get('layout')}"
            for graph in graphs(compiled)
            for n in graph.nodes
        ]

    before = state()
    body_views(compiled.plan, compiled.stages)
    body_views(compiled.plan, compiled.stages, runs=False)
    assert state() == before


def test_without_runs_every_op_and_input_is_a_node(compiled: HelixModule) -> None:
    graph = compiled.graph.get_submodule("body_1").graph
    view = build_view(graph, "body_1", runs=False)
    assert not [n for n in view.nodes if n.members]
    shown = {n.name for n in view.nodes}
    assert {p.name for p in placeholders(graph) if not is_param(p)} <= shown
    assert {"pow_1", "mean", "rsqrt"} <= shown


def test_guards_are_not_drawn(compiled: HelixModule) -> None:
    graph = copy_graph(compiled.graph.get_submodule("body_1").graph)
    node = node_named(graph, "linear")
    with graph.inserting_after(node):
        guard = graph.call_function(torch.ops.aten._assert_async.default, (node,))
    assert guard.name not in {n.name for n in build_view(graph, "body_1", runs=False).nodes}
