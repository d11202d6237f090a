"""The predicted schedule: a trace that Perfetto can open, consistent with the graph and with the critical path."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.collectives import is_collective
from helix_compile.predict.costs import GB200, Workload, predict_costs
from helix_compile.predict.schedule import critical_path, predict_body, predict_schedule, thread_of
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
        assert e["args"]["stage"] == node.meta["helix_stage"] and e["dur"] > 0
        assert (e["tid"] == 1) == is_collective(node) == bool(e["args"]["wire_bytes"])
    for rank in ranks:
        for thread in (0, 1):
            own = sorted((e["ts"], e["dur"]) for e in complete if (e["pid"], e["tid"]) == (rank, thread))
            for (start, length), (following, _) in pairwise(own):
                assert start + length <= following * (1 + 1e-12) + 1e-9


def test_a_node_starts_after_what_it_reads_and_ranks_meet(compiled: HelixModule) -> None:
    for schedule in predict_schedule(compiled.plan, compiled.graph):
        ends = {(e.rank, e.node): e.end for e in schedule.events}
        starts: dict[str, set[float]] = {}
        for event in schedule.events:
            if is_collective(event.node) and event.node.args[-1] == "world":
                starts.setdefault(event.node.name, set()).add(event.start)
            for source in event.node.all_input_nodes:
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
