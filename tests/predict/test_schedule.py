"""The predicted schedule: a trace that Perfetto can open, consistent with the graph and with the critical path."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import fx

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.collectives import is_collective
from helix_compile.ir.graph import c10d
from helix_compile.predict.costs import Workload, predict_costs
from helix_compile.predict.schedule import GB200, critical_path, predict_body, predict_schedule, run_queues, thread_of
from helix_compile.views.schedule_svg import format_schedule_svg
from tests.support.models import tiny_model

PLANS: list[dict[str, Any]] = [{"cp": 4}, {"cp": 2, "tpa": 2, "merge": "ag_rs"}, {"cp": 1}]


SLOW = [pytest.param(plan, marks=pytest.mark.slow) for plan in (PLANS[0], PLANS[2])]


@pytest.fixture(scope="module", params=[PLANS[1], *SLOW], ids=str)
def compiled(request: pytest.FixtureRequest) -> HelixModule:
    return helix_compile(tiny_model(), max_seq_len=200, tokens_per_block=16, **request.param)


def test_the_file_is_a_trace_of_every_rank_and_body(compiled: HelixModule, tmp_path: Path) -> None:
    compiled.inspect(tmp_path)
    trace = json.loads((tmp_path / "schedule.trace.json").read_text())
    assert trace["otherData"]["predicted"] and trace["otherData"]["context"] == 199
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {(e["pid"], e["args"]["name"]) for e in trace["traceEvents"] if e["name"] == "process_name"}
    ranks = range(compiled.plan.layout.world_size)
    assert names == {(r, f"rank {r} (predicted)") for r in ranks}
    assert {e["cat"] for e in complete} == {"predicted"}
    assert {(e["pid"], e["args"]["body"]) for e in complete} == {(r, b) for r in ranks for b in ("body_0", "body_1")}
    for e in complete:
        node = next(n for n in compiled.graph.get_submodule(e["args"]["body"]).graph.nodes if n.name == e["name"])
        assert e["args"]["stage"] == node.meta["helix_stage"] and (e["dur"] > 0 or "waits_for" in e["args"])
        assert (e["tid"] == 1) == is_collective(node) == bool(e["args"]["wire_bytes"])
    started = {(e["pid"], e["args"]["body"], e["name"]) for e in complete if e["tid"] == 1}
    waited = [(e["pid"], e["args"]["body"], e["args"]["waits_for"]) for e in complete if "waits_for" in e["args"]]
    assert set(waited) == started and len(waited) == len(started)  # of each start one wait, an event of its own
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert len(arrows) == 2 * len(started) and len({e["id"] for e in arrows}) == len(started)
    for rank in ranks:
        for thread in (0, 1):
            own = sorted((e["ts"], e["dur"]) for e in complete if (e["pid"], e["tid"]) == (rank, thread))
            for (start, length), (following, _) in pairwise(own):
                assert start + length <= following * (1 + 1e-12) + 1e-9


def test_a_node_starts_after_what_it_reads_and_ranks_meet(compiled: HelixModule) -> None:
    for schedule in predict_schedule(compiled.plan, compiled.graph):
        ends = {(e.rank, e.node): e.end for e in schedule.events if e.waits_for is None}
        starts: dict[str, set[float]] = {}
        for event in schedule.events:
            if is_collective(event.node) and event.node.args[-1] == "world":
                starts.setdefault(event.node.name, set()).add(event.start)
            for source in event.node.all_input_nodes if event.waits_for is None else ():
                while source.op != "placeholder" and (event.rank, source) not in ends:
                    source = source.all_input_nodes[0]  # a view or a wait: takes no time itself
                assert event.start >= ends.get((event.rank, source), 0.0)
        assert all(len(times) == 1 for times in starts.values())
        assert max(ends.values()) == schedule.seconds


def test_the_total_is_the_critical_path_of_the_busiest_rank(compiled: HelixModule) -> None:
    """CP rank 0 has the most tokens, so nobody keeps it waiting."""
    step = Workload(3, 2, 100)
    for body in compiled.plan.bodies:
        graph = compiled.graph.get_submodule(body.name).graph
        schedule = predict_body(graph, body.name, compiled.plan, step)
        costs = predict_costs(graph, step, compiled.plan.layout, 16)
        seconds = {n: c.seconds(GB200) for n, c in costs.items()}
        assert schedule.seconds == pytest.approx(critical_path(graph, seconds, thread_of).total)
        assert schedule.path.total <= schedule.seconds * (1 + 1e-12)
        assert set(schedule.path.collective_slack()) == {n.name for n in graph.nodes if is_collective(n)}


def test_an_emptier_rank_waits_for_the_fullest() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=200000, max_batch_size=8)
    graph = compiled.graph.get_submodule("body_0").graph
    schedule = predict_body(graph, "body_0", compiled.plan, Workload(8, 1, 30))  # one block only
    decode = {e.rank: e for e in schedule.events if e.node.name == "mla_decode"}
    assert decode[0].seconds > decode[1].seconds
    exchange = [e for e in schedule.events if e.node.name == "all_to_all_single"]
    assert len({e.start for e in exchange}) == 1 and exchange[1].start > decode[1].end


def two_parts() -> fx.Graph:
    """Attention of two parts (a, b), exchange and wait of each, and what reads them, in the order of overlap="hopb"."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def call(name: str, target: Any, *args: Any) -> fx.Node:
        return graph.create_node("call_function", target, args, name=name)

    starts = []
    for part in "ab":
        attended = call(f"attend_{part}", torch.neg, x)
        starts.append(call(f"start_{part}", c10d.all_reduce.default, attended, "sum", "world"))
    merged = []
    for part, start in zip("ab", starts, strict=True):
        merged.append(call(f"merge_{part}", torch.abs, call(f"wait_{part}", c10d.wait_tensor.default, start)))
    graph.output(merged)
    return graph


@pytest.mark.parametrize(
    ("exchange", "held", "total"),
    [
        (3.0, {"start_a": 0.0, "start_b": 2.0}, 14.0),  # the first is over before b has attended
        (5.0, {"start_a": 0.0, "start_b": 4.0}, 16.0),
        (8.0, {"start_a": 3.0, "start_b": 7.0}, 22.0),  # the link is never idle behind a
    ],
)
def test_a_wait_holds_compute_for_what_nothing_hid(exchange: float, held: dict[str, float], total: float) -> None:
    """5 to attend and 1 to merge, by hand; in that order a's merge, 1, runs while b is exchanged."""
    graph = two_parts()
    seconds = {n.name: {"att": 5.0, "sta": exchange, "mer": 1.0}.get(n.name[:3], 0.0) for n in graph.nodes}
    timed = run_queues(graph, [seconds, seconds], lambda axis, rank: (0, 1))
    waits = {node.args[0].name: took for rank, _, node, _, took, of in timed if rank == 0 and of is not None}
    assert waits == held
    assert max(start + took for *_, start, took, _ in timed) == total
    lanes = [(t[2].name, t[3]) for t in timed if t[0] == 1 and t[1] == "link"]
    assert lanes == [("start_a", 5.0), ("start_b", max(10.0, 5.0 + exchange))]


def test_a_slower_peer_holds_the_exchange() -> None:
    graph = two_parts()
    seconds = [{"attend_a": a, "attend_b": 5.0, "start_a": 1.0, "start_b": 1.0} for a in (5.0, 9.0)]
    timed = run_queues(graph, seconds, lambda axis, rank: (0, 1))
    assert [t[3] for t in timed if t[2].name == "start_a"] == [9.0, 9.0]
    assert [t[4] for t in timed if t[2].name == "wait_a"] == [0.0, 0.0]
    assert [t[4] for t in timed if t[2].name == "wait_b"] == [5.0, 1.0]  # rank 0 was ready at 10, b starts at 14


def test_the_picture_has_both_lanes(compiled: HelixModule, tmp_path: Path) -> None:
    schedule = predict_schedule(compiled.plan, compiled.graph)[1]
    picture = ElementTree.fromstring(format_schedule_svg("a title & more", schedule))
    drawn = {g.get("data-event") for g in picture.iter("{http://www.w3.org/2000/svg}g")}
    assert drawn - {None} == {e.node.name for e in schedule.events if e.rank == 0}
    links = [r for r in picture.iter("{http://www.w3.org/2000/svg}rect") if r.get("class") == "link"]
    assert len(links) == len([n for n in compiled.graph.get_submodule("body_1").graph.nodes if is_collective(n)])
    assert all(
        float(r.get("x", 0)) + float(r.get("width", 0)) <= 1160
        for r in picture.iter()
        if r.get("class") != "paper" and r.get("x")
    )
    compiled.inspect(tmp_path)
    assert "predicted schedule of a layer, rank 0" in (tmp_path / "body_1.schedule.svg").read_text()
