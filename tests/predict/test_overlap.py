"""HOP-B predicted: the paper's formula, where it pays and where it loses, and that the planner, inspect and the queues agree."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix_compile import HelixOptions, HelixPlan, helix_compile
from helix_compile.predict.accelerators import PRESETS, Accelerator
from helix_compile.predict.costed import Candidate
from helix_compile.predict.costs import Workload
from helix_compile.predict.overlap import Chunk, Verdict, in_parts, rows_of_parts
from helix_compile.predict.planner import Planned, plan_text
from helix_compile.predict.roofline import hopb_time
from helix_compile.predict.schedule import predict_overlap, predict_step
from helix_compile.predict.search import Point, Search
from tests.support.planned import CONTEXT, goal, machine, tiny_costed

NO_LATENCY = {op: ((2, 0.0, 0.0),) for op in PRESETS["gb200"].latency_us}
SLOW_LINK = machine(link_gb_s=3.0, latency_us=NO_LATENCY, fixed_us_per_layer=1.0)
times = st.floats(min_value=0.0, max_value=1e6)
drawn = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@drawn
@given(parts=st.integers(1, 40), compute=times, exchange=times)
def test_equal_parts_are_the_papers_formula(parts: int, compute: float, exchange: float) -> None:
    steps = [Chunk((compute,) * parts, (exchange,) * parts), Chunk((0.0,) * parts)]
    assert in_parts(steps) == pytest.approx(hopb_time(parts, compute, exchange, overlap=True), rel=1e-12, abs=1e-9)
    alone = sum(in_parts([Chunk((compute,), (exchange,)), Chunk((0.0,))]) for _ in range(parts))
    assert alone == pytest.approx(hopb_time(parts, compute, exchange, overlap=False), rel=1e-12, abs=1e-9)


def test_the_papers_figures() -> None:
    eight = [Chunk((2.0,) * 8, (1.2,) * 8), Chunk((0.0,) * 8)]
    assert in_parts(eight) == pytest.approx(17.2, abs=1e-12)
    assert in_parts([Chunk((16.0,), (9.6,)), Chunk((0.0,))]) == pytest.approx(25.6, abs=1e-12)


def test_two_exchanges_a_part_by_hand() -> None:
    """ag_rs: 4 to attend, 3 to gather, 1 to rescale, 2 to scatter, 1 to use, of two parts.

    compute   attend 0: 0-4, attend 1: 4-8, rescale 0: 8-9, rescale 1: 11-12 (its gather ends at 11), use 0: 13-14, use 1: 15-16
    link      gather 0: 4-7, gather 1: 8-11, scatter 0: 11-13, scatter 1: 13-15
    """
    assert in_parts([Chunk((4.0, 4.0), (3.0, 3.0)), Chunk((1.0, 1.0), (2.0, 2.0)), Chunk((1.0, 1.0))]) == 16.0


@drawn
@given(batch=st.integers(0, 300), parts=st.integers(1, 9))
def test_parts_hold_every_row_once(batch: int, parts: int) -> None:
    rows = rows_of_parts(batch, parts)
    assert sum(rows) == batch and len(rows) == parts and max(rows) - min(rows) <= 1


LAYOUTS = [
    Candidate(cp=4, tpa=2, ep=4, tpf=2, v_up="after", overlap="hopb"),
    Candidate(cp=2, tpa=1, ep=1, tpf=2, v_up="before", merge="ag_rs", q_proj="gather", overlap="hopb"),
]


@pytest.mark.parametrize("candidate", LAYOUTS, ids=["a2a", "ag_rs"])
def test_planner_and_inspect_agree(candidate: Candidate) -> None:
    """One cost function and one rule: of the graph that is compiled, node by node, and of the layouts that are searched; ragged parts too."""
    model = tiny_costed()
    compiled = helix_compile(model.captured, options=candidate.options(model.base), world="virtual")
    plain = helix_compile(
        model.captured, options=replace(candidate, overlap="none").options(model.base), world="virtual"
    )
    for batch, accelerator in (
        (12, PRESETS["gb200"]),
        (7, SLOW_LINK),
        (64, replace(SLOW_LINK, launch_us=2.0)),
        (2, SLOW_LINK),
    ):
        asked = goal(accelerator=accelerator, batches=(batch,))
        (point,), (without,) = (Search(model, asked).of(c) for c in (candidate, replace(candidate, overlap="none")))
        step = Workload(batch, 1, CONTEXT - 1)
        found = predict_step(compiled.plan, compiled.graph, step, accelerator)
        for name in ("compute", "exchange", "all_reduce", "fixed", "total"):
            assert getattr(point.time, name) == pytest.approx(getattr(found, name), rel=1e-9), name
        assert without.step_us == pytest.approx(
            predict_step(plain.plan, plain.graph, step, accelerator).total, rel=1e-9
        )
        verdict = predict_overlap(compiled.plan, plain.graph, compiled.graph, compiled.graph, step, accelerator)
        assert verdict.gain == pytest.approx(1 - point.step_us / without.step_us, abs=1e-9)
        assert accelerator is PRESETS["gb200"] or found.exchange < without.time.exchange  # something is hidden
    said = compiled.inspect().facts["predicted"]
    asked = goal(batches=(12,))
    (point,) = Search(model, asked).of(candidate)
    assert said["machine"] == "gb200" and said["microseconds_of_a_step"] == pytest.approx(point.step_us, rel=1e-9)
    mine = Planned(model, asked).overlap_of(point)
    assert mine is not None and said["overlap"]["text"] == mine.text and mine.text in str(compiled.inspect())


@drawn
@given(parts=st.integers(1, 12), compute=times, nbytes=times, latency=times, more=times)
def test_more_latency_never_makes_the_formula_better(
    parts: int, compute: float, nbytes: float, latency: float, more: float
) -> None:
    """Without overlap a batch is exchanged at once, in parts each part pays the latency."""

    def gain(latency: float) -> float:
        whole = hopb_time(1, parts * compute, parts * nbytes + latency, overlap=False)
        return whole - hopb_time(parts, compute, nbytes + latency, overlap=True)

    assert gain(latency + more) <= gain(latency) + 1e-9 * (1e6 + parts * (compute + nbytes + latency + more))


class Gain(NamedTuple):
    """What overlap saves of a step, and what the step without it does besides attention, matmuls and exchanges."""

    saved: float
    other: float


def gains(accelerator: Accelerator, **changes: Any) -> dict[tuple[Candidate, int], Gain]:
    """Of every layout and batch that can have it; by (layout without it, batch)."""
    asked = goal(accelerator=accelerator, fewer_ranks=False, **changes)
    by_layout: dict[tuple[Candidate, int], dict[str, Point]] = {}
    for point in Search(tiny_costed(), asked).points():
        own = by_layout.setdefault((replace(point.candidate, overlap="none"), point.batch), {})
        own[point.candidate.overlap] = point
    return {
        at: Gain(own["none"].step_us - own["hopb"].step_us, own["none"].parts_by_name["other"])
        for at, own in by_layout.items()
        if "hopb" in own
    }


def test_more_latency_never_makes_overlap_better() -> None:
    """But for what the merge of one part hides of the next one's exchange, which is no more than what is not attention."""
    slower = []
    for latency in (0.0, 1.0, 5.0, 20.0, 1000.0):  # of any size: half a batch is no smaller tier
        slower.append(gains(replace(SLOW_LINK, latency_us={op: ((2, latency, latency),) for op in NO_LATENCY})))
    for few, many in pairwise(slower):
        assert all(many[at].saved <= few[at].saved + few[at].other for at in few)
    assert any(g.saved > 0 for g in slower[0].values()) and all(g.saved < 0 for g in slower[-1].values())


def test_more_launches_never_make_overlap_better() -> None:
    found = [gains(replace(SLOW_LINK, fixed_us_per_layer=fixed)) for fixed in (0.0, 10.0, 100.0)]
    for few, many in pairwise(found):
        assert all(many[at].saved < few[at].saved for at in few)


def chosen(**changes: Any) -> Point | None:
    return Planned(tiny_costed(), goal(fewer_ranks=False, **changes)).best


def test_it_is_chosen_where_it_pays_and_nowhere_else() -> None:
    """A slow link without latencies pays; few sequences, short exchanges and cp = 1 never do."""
    won = chosen(accelerator=SLOW_LINK, batches=(64,))
    assert won is not None and won.candidate.overlap == "hopb"
    for accelerator in (PRESETS["gb200"], PRESETS["h100"], SLOW_LINK):
        for batch in (1, 2, 64):
            for context in (1024, 1 << 17, CONTEXT):
                asked = {"accelerator": accelerator, "batches": (batch,), "context": context}
                best = chosen(**asked)
                assert best is not None
                if best.candidate.overlap == "none":
                    continue
                verdict = Planned(tiny_costed(), goal(**asked)).overlap_of(best)
                assert best.candidate.cp > 1 and batch > 1 and verdict is not None and verdict.gain > 0.0
                assert accelerator is SLOW_LINK  # the others exchange little, and wait for latencies
    assert not any(
        p.candidate.overlap == "hopb" and (p.candidate.cp == 1 or p.batch == 1)
        for p in Search(tiny_costed(), goal()).points()
    )


def test_where_it_loses_is_said() -> None:
    model, layout = tiny_costed(), Candidate(cp=8, tpa=1, ep=8, tpf=1, v_up="after", overlap="hopb")
    asked = goal(batches=(2,), context=4096)
    (point,) = Search(model, asked).of(layout)
    verdict = Planned(model, asked).overlap_of(point)
    assert isinstance(verdict, Verdict) and verdict.loses
    assert (
        verdict.text.startswith("overlap=hopb: predicted to lose ")
        and "2 sequences at 4,096 tokens on gb200" in verdict.text
    )
    parts = verdict.hopb.total - verdict.without.total
    assert parts == pytest.approx(
        sum(
            getattr(verdict.hopb, n) - getattr(verdict.without, n)
            for n in ("compute", "exchange", "all_reduce", "fixed")
        )
    )
    alone = Candidate(cp=1, tpa=8, ep=8, tpf=1, v_up="after")
    (plain,) = Search(model, asked).of(alone)
    assert Planned(model, asked).overlap_of(plain) is None
    (one,) = Search(model, goal(batches=(1,))).of(replace(layout, overlap="none"))
    assert Planned(model, goal(batches=(1,))).overlap_of(one) is None  # one sequence is no two parts


def test_a_layout_that_is_asked_for_is_judged_and_a_plan_that_wins_goes_on() -> None:
    model, own = tiny_costed(), HelixOptions(cp=8, overlap="hopb", max_batch_size=2)
    planned = Planned(model, goal(batches=(64,)), configured=(own, "own.toml"))
    configured = planned.as_configured
    assert configured is not None and configured.candidate.overlap == "hopb" and configured.batch == 2
    assert configured.candidate.v_up == "after"  # as helix_compile decides it at that batch
    assert any(reason.startswith("of own.toml: overlap=hopb: predicted to lose ") for reason in planned.reasons)
    won = Planned(model, goal(accelerator=SLOW_LINK, batches=(64,), fewer_ranks=False))
    assert any(reason.startswith("overlap=hopb: predicted to gain ") for reason in won.reasons)
    plan = HelixPlan.from_json(plan_text(won))
    assert plan.options.overlap == "hopb" and {a.parts for body in plan.bodies for a in body.attentions} == {2}
    assert helix_compile(model.captured, plan=plan, world="virtual").plan.decides_otherwise(plan) == []
