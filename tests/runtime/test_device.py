"""A model is compiled for a device that it is not on; meta stands for one, as graphs, not values, are looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import fx

from helix_compile import helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.graph_json import graph_from_json, graph_to_json, values_of_graphs
from helix_compile.runtime.claims import graph_digest
from helix_compile.verifier.static.graph import type_graph
from tests.support.models import fresh_model

MODEL = fresh_model("short", torch.float32)


def devices(graph: fx.GraphModule) -> set[str]:
    """Every device that a graph or a body names: in arguments, and in the values that it was captured with."""
    return set(_devices(graph))


def _devices(graph: fx.GraphModule) -> Iterator[str]:
    for node in graph.graph.nodes:
        yield from (str(v) for v in node.kwargs.values() if isinstance(v, torch.device))
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            yield str(value.device)
    for _, body in graph.named_children():
        assert isinstance(body, fx.GraphModule)
        yield from _devices(body)


@pytest.mark.parametrize("captured", [False, True], ids=["module", "captured"])
def test_graphs_say_the_device_that_was_asked_for(captured: bool) -> None:
    model = capture(MODEL) if captured else MODEL
    there = helix_compile(model, cp=2, device="meta")
    assert devices(there.graph) == {"meta"}
    assert {t.device.type for rank in there.ranks for t in rank.params.values()} == {"meta"}
    if isinstance(model, CapturedGraph):
        assert devices(model.graph) == {"cpu"}
    here = helix_compile(model, cp=2)  # what was captured once serves both
    assert devices(here.graph) == {"cpu"}
    assert graph_digest(here.graph) == graph_digest(there.graph)
    typed = [type_graph(m.graph, m.ranks[0].params, {}, m.plan.layout) for m in (here, there)]
    assert typed[0].nodes == typed[1].nodes > 60
    assert typed[0].findings == typed[1].findings  # of shapes that propagate on either device


@pytest.mark.parametrize("here", ["cpu", "meta"])
def test_a_saved_graph_runs_where_it_is_read(here: str) -> None:
    """Not where it was written: on a card that this reader may not have."""
    graph = fx.Graph()
    positions = graph.call_function(torch.ops.aten.arange.default, (4,), {"device": torch.device("cuda:3")})
    graph.output(positions)
    positions.meta["val"] = torch.arange(4)
    written = json.dumps(graph_to_json(fx.GraphModule({}, graph)))
    assert "cuda" in written
    read = graph_from_json(json.loads(written), "a file", {}, torch.device(here), values_of_graphs())
    assert devices(read) == {here}
    # no part of what a graph is: each rank names a card of its own
    assert graph_digest(read) == graph_digest(fx.GraphModule({}, graph))
    assert read().device.type == here
