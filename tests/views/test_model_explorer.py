"""model_explorer.json by the rules of its format; what breaks one shows as a blank canvas there."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx
import pytest

from helix_compile import HelixModule
from helix_compile.views.model_explorer import format_model_explorer
from tests.support.graphs import compiled_tiny


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return compiled_tiny()


@pytest.fixture(scope="module")
def graphs(compiled: HelixModule) -> list[dict[str, Any]]:
    return json.loads(format_model_explorer(compiled.plan, compiled.stages))["graphs"]


def test_two_graphs(compiled: HelixModule, graphs: list[dict[str, Any]]) -> None:
    whole = json.loads(format_model_explorer(compiled.plan, compiled.stages))
    assert list(whole) == ["label", "graphs"]  # without a label: "Unsupported JSON format"
    assert [g["id"] for g in graphs] == ["DeepseekV3ForCausalLM before", "DeepseekV3ForCausalLM after"]


def test_fields_are_never_absent_and_hold_text(graphs: list[dict[str, Any]]) -> None:
    for node in (n for g in graphs for n in g["nodes"]):
        assert {"id", "label", "namespace", "attrs", "incomingEdges", "outputsMetadata"} <= set(node)
        assert node["id"]
        assert node["label"]
        pairs = [*node["attrs"], *(a for o in node["outputsMetadata"] for a in o["attrs"])]
        assert all(set(p) == {"key", "value"} and isinstance(p["value"], str) for p in pairs)


def test_namespaces_nest_without_a_leading_slash(graphs: list[dict[str, Any]]) -> None:
    names = {n["namespace"] for g in graphs for n in g["nodes"]}
    assert not [n for n in names if n.startswith("/") or n.endswith("/") or "//" in n or "." in n]
    assert {"", "layers/0/self_attn", "layers/1", "layers/2/mlp/gate", "layers/3"} <= names
    # the first layer of each body is drawn in full, later ones are one node each
    after = [n for n in graphs[1]["nodes"] if n["namespace"].startswith("layers/")]
    sizes = [sum(n["namespace"].split("/")[1] == str(i) for n in after) for i in range(4)]
    assert sizes[1] == sizes[3] == 2  # and its cache
    assert not [n for n in graphs[1]["nodes"] if "cache_" in n["id"] and not n["namespace"]]
    assert min(sizes[0], sizes[2]) > 50


def test_edges_point_at_nodes_and_make_no_cycle(graphs: list[dict[str, Any]]) -> None:
    for graph in graphs:
        ids = [n["id"] for n in graph["nodes"]]
        assert len(ids) == len(set(ids))
        flow = nx.DiGraph()
        flow.add_nodes_from(ids)
        for node in graph["nodes"]:
            for edge in node["incomingEdges"]:
                assert set(edge) == {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}
                flow.add_edge(edge["sourceNodeId"], node["id"])
        assert set(flow) == set(ids)
        assert nx.is_directed_acyclic_graph(flow)
        above = nx.ancestors(flow, "output")
        assert "input_ids" in above
        # a body's inputs come from the outer graph: no part of a layer hangs loose
        loose = [n for n in ids if n.startswith("layers/") and not flow.in_degree(n)]
        assert [n.rsplit("/", 1)[-1] for n in loose] in ([], ["arange"])


def test_no_guards_and_no_parameters_as_nodes(graphs: list[dict[str, Any]]) -> None:
    ids = {n["id"].rsplit("/")[-1] for g in graphs for n in g["nodes"]}
    assert not [n for n in ids if n.startswith(("sym_", "_assert", "get_attr")) or n.endswith("weight")]


def test_collectives_stand_out_and_carry_bytes(graphs: list[dict[str, Any]]) -> None:
    exchanges = [n for n in graphs[1]["nodes"] if n["label"] == "all_to_all_single"]
    assert len(exchanges) == 2
    for node in exchanges:
        assert node["style"]["backgroundColor"]
        attributes = {a["key"]: a["value"] for a in node["attrs"]}
        assert attributes["bytes sent per rank and token"] == "504"
