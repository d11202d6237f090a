"""Segments of a lowered graph: cut at collectives, called in its order, and nothing lost or doubled on the way."""

from __future__ import annotations

import operator
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.ir.collectives import WAIT, is_collective
from helix_compile.ir.graph import aten, c10d, is_call, placeholders
from helix_compile.ir.stage import bodies_of, graphs_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.passes.lower.pieces import pieces_of
from helix_compile.passes.lower.segments import cut_graph, is_boundary, segments_of
from helix_compile.predict.schedule import critical_path
from helix_compile.runtime.segments import bound_inputs
from helix_compile.worlds.program import Program
from tests.support.driver import left_padded, random_ids
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa
from tests.support.models import tiny_model

STYLES = {
    "a2a": {"cp": 2, "tpa": 2},
    "ag_rs": {"cp": 4, "merge": "ag_rs", "q_proj": "gather", "v_up": "after", "tokens_per_block": 3},
    "cp1": {"cp": 1},
}


def wire(graph: fx.Graph) -> list[str]:
    """Collectives and waits in order, with axis and sizes."""
    return [f"{n.target} {n.args[1:]}" for n in graph.nodes if is_collective(n) or is_call(n, WAIT)]


def uncompiled(compiled: HelixModule) -> list[Program]:
    """Programs whose segments are their graphs."""
    stage = segments_of(compiled.graph)
    layout: HelixLayout = compiled.plan.layout
    return [
        Program(r.rank, stage, bound_inputs(stage, r, layout, compiled.device), lambda call: call.segment)
        for r in compiled.ranks
    ]


def models() -> dict[str, Any]:
    return {
        **{f"mla {name}": (lambda: tiny_model("short", torch.float32), options) for name, options in STYLES.items()},
        "gqa": (lambda: fresh_gqa("qwen3", torch.float32), {"cp": 2, "tpa": 2}),
        "dsa": (lambda: fresh_family("deepseek_v32", dtype=torch.float32), {"cp": 2, "topk_exchange": "owner"}),
    }


@pytest.mark.parametrize("case", models())
def test_a_cut_step_is_the_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and caches bit for bit, over a ragged prompt and steps; the wire is that of the lowered graph."""
    make, options = models()[case]
    model = make()
    whole, cut = (helix_compile(model, **options) for _ in range(2))
    stage = segments_of(cut.graph)
    for name, body in bodies_of(whole.graph).items():
        assert wire(stage.get_submodule(name).graph) == wire(body.graph)
    programs = uncompiled(cut)
    monkeypatch.setattr(cut, "programs", lambda *_: programs)
    mask = left_padded([5, 2, 7])
    for tokens in (7, 1, 3):
        ids = random_ids(model, 3, tokens)
        now = mask if tokens == 7 else torch.ones_like(ids)
        assert torch.equal(cut(ids, now)[now.bool()], whole(ids, now)[now.bool()])
    for mine, theirs in zip(cut.ranks, whole.ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.cache, theirs.cache, strict=True))
    assert cut.world.num_collectives == whole.world.num_collectives
    assert cut.world.sent_bytes == whole.world.sent_bytes


def test_segments_are_convex_and_hold_no_collective() -> None:
    """No value leaves a segment and comes back; contracted, the graph has no circle."""
    lowered = helix_compile(tiny_model("short", torch.float32), cp=2, tpa=2).graph
    for name, graph in graphs_of(segments_of(lowered)):
        nodes = list(graph.graph.nodes)
        if "_segment_" in name:
            assert not [n for n in nodes if is_boundary(n, inside=True)]
            assert all(p.users or p.meta["input"] for p in placeholders(graph.graph))
            continue
        arrows = nx.DiGraph((source, node) for node in nodes for source in node.all_input_nodes)
        assert nx.is_directed_acyclic_graph(arrows)
        left = [n for n in nodes if not is_boundary(n) and n.meta.get("segment") is None]
        assert all(len(n.all_input_nodes) <= 2 for n in left)  # what is taken out of tuples, and single ops


def longest(graph: fx.Graph, parts: dict[str, int]) -> float:
    """Of a step whose ops cost 1 (a segment: as many as it has) and whose collectives cost 5, beside the ops that follow them."""
    cost = {n.name: parts.get(n.name, 1.0) for n in graph.nodes if n.op in ("call_function", "call_module")}
    cost |= {n.name: 5.0 for n in graph.nodes if is_collective(n)}
    cost |= {n.name: 0.0 for n in graph.nodes if is_call(n, WAIT, operator.getitem) or n.target is aten.sym_size.int}
    return critical_path(graph, cost, lambda n: None if is_collective(n) else "compute").total


@pytest.mark.parametrize("cut", [segments_of, pieces_of], ids=["segments", "pieces"])
def test_a_cut_delays_no_collective(cut: Any) -> None:
    """What is one call gives all its values at its end: a collective would wait for ops that it does not need, if a cut were made so."""
    lowered = helix_compile(tiny_model("short", torch.float32), cp=2, tpa=2).graph
    stage = cut(lowered)
    for name, body in bodies_of(lowered).items():
        inside = {
            f"segment_{called.rpartition('_')[2]}": sum(
                n.op == "call_function" and not is_call(n, operator.getitem) and n.target is not aten.sym_size.int
                for n in segment.graph.nodes
            )
            for called, segment in bodies_of(stage.get_submodule(name)).items()
        }
        assert inside and longest(stage.get_submodule(name).graph, inside) == longest(body.graph, {})


def test_a_collective_that_a_cut_would_delay_is_seen() -> None:
    """The measure itself: an op that the collective does not need, run before it starts."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.relu.default, (x,))
    other = graph.call_function(aten.neg.default, (x,))
    started = graph.call_function(c10d.all_reduce.default, (first, "sum", "world"))
    graph.output((graph.call_function(WAIT, (started,)), other))
    assert longest(graph, {}) == 6.0
    started.update_arg(0, other)
    assert longest(graph, {}) == 7.0


def test_what_a_collective_computes_is_not_read_before_its_wait() -> None:
    compiled = helix_compile(tiny_model("short", torch.float32), cp=2)
    body = next(iter(bodies_of(compiled.graph).values()))
    wait = next(n for n in body.graph.nodes if is_call(n, WAIT))
    wait.replace_all_uses_with(wait.args[0], delete_user_cb=lambda user: user is not wait)
    with pytest.raises(RuntimeFault, match=r"rank 0, node layer_0.segment_1: \['all_to_all_single'\] used before wait"):
        uncompiled(compiled)


def test_a_cut_graph_keeps_names_and_layouts() -> None:
    """What leaves a segment goes by the name and layout that it has in the lowered graph."""
    lowered = helix_compile(tiny_model("short", torch.float32), cp=2).graph
    for name, body in bodies_of(segments_of(lowered)).items():
        if "_segment_" in name:
            continue
        known = {n.name: n.meta.get("layout") for n in lowered.get_submodule(name).graph.nodes}
        for node in body.graph.nodes:
            if node.meta.get("segment") is None:
                assert node.meta.get("layout") == known[node.name]


def test_one_op_between_collectives_is_no_segment() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"val": torch.empty(2, device="meta"), "input": ["hidden", "hidden"]}
    once = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    once.meta = {"val": torch.empty(2, device="meta")}
    graph.output(once)
    module = fx.GraphModule(torch.nn.Module(), graph)
    cut_graph(module, "body_0")
    assert not list(module.named_children())
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))
