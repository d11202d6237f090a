"""The search against brute force, and what must hold whatever the figures: more is never worse."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest

from helix_compile.config.options import HelixOptions
from helix_compile.errors import HelixError, LayoutError
from helix_compile.predict.formats import cache_format, read_factor, weight_format
from helix_compile.predict.planner import DO_NOT, Planned
from helix_compile.predict.search import Point, Search, batches_of, count_of, pareto, recommended
from helix_compile.predict.terms import seen
from tests.support.planned import goal, machine, tiny_costed


def points(**changes: Any) -> list[Point]:
    return Search(tiny_costed(), goal(**changes)).points()


def test_choices_are_all_legal_layouts_once() -> None:
    """By counting: N = 8 ranks, 8 heads and 8 experts, everything divides."""
    found = list(tiny_costed().choices(8))
    layouts = {(c.cp, c.tpa, c.ep, c.tpf) for c in found}
    assert layouts == {(cp, 8 // cp, ep, 8 // ep) for cp, ep in product((1, 2, 4, 8), repeat=2)}
    assert (
        len(found) == len(set(found)) == 4 * (1 + 3 * 16)
    )  # cp = 1 exchanges nothing; else merge x q_proj x v_up x overlap
    assert not any(c.pad_heads for c in found)
    padded = list(tiny_costed().choices(3))
    assert padded and all(c.pad_heads for c in padded) and not list(tiny_costed().choices(3, pad_heads=False))


def test_the_front_is_what_nothing_beats() -> None:
    every = points(batches=(1, 2, 4, 8, 16, 32, 64, 128))
    front = pareto(every)
    assert len(front) > 3

    def beats(a: Point, b: Point) -> bool:
        mine, others = ((p.tokens_per_s_per_user, p.tokens_per_s_per_gpu) for p in (a, b))
        return mine != others and all(x >= y for x, y in zip(mine, others, strict=True))

    assert not any(beats(a, b) for a in every if a.fits for b in front)
    missed = [p for p in every if p.fits and not any(q == p or beats(q, p) for q in front)]
    same = {(p.tokens_per_s_per_user, p.tokens_per_s_per_gpu) for p in front}
    assert all(
        (p.tokens_per_s_per_user, p.tokens_per_s_per_gpu) in same for p in missed
    )  # equal in both: the plainest stays


def test_more_bandwidth_is_never_slower() -> None:
    slow = machine(bf16_tflops=1.0)
    base = points(accelerator=slow)
    more = {
        "hbm_tb_s": 16.0,
        "link_gb_s": 1800.0,
        "bf16_tflops": 2.0,
        "fixed_us_per_layer": 10.0,
        "hbm_efficiency": 1.0,
    }
    for name, value in more.items():
        now = points(accelerator=replace(slow, **{name: value}))
        assert all(b.step_us <= a.step_us for a, b in zip(base, now, strict=True)), name
        assert any(b.step_us < a.step_us for a, b in zip(base, now, strict=True)), name


def test_more_memory_never_removes_a_plan() -> None:
    fitting = [
        {(p.candidate, p.batch) for p in points(accelerator=machine(memory_gb=gb)) if p.fits} for gb in (4.1, 6, 20, 99)
    ]
    assert all(a <= b for a, b in pairwise(fitting))
    assert len({len(f) for f in fitting}) == 4  # each step lets more in


def test_a_longer_context_and_a_larger_batch_are_never_faster() -> None:
    by_context = [points(context=1 << n) for n in (12, 16, 20)]
    for shorter, longer in pairwise(by_context):
        assert all(a.step_us <= b.step_us for a, b in zip(shorter, longer, strict=True))
    two, eight, many = (points(batches=(n,)) for n in (2, 8, 64))  # two parts of a batch want two sequences
    assert all(a.step_us <= b.step_us <= c.step_us for a, b, c in zip(two, eight, many, strict=True))
    whole = {p.candidate: p.step_us for p in two if p.candidate.overlap == "none"}
    assert all(p.step_us <= whole[p.candidate] for p in points(batches=(1,)))


def test_one_rank_of_cp_exchanges_nothing() -> None:
    for point in points():
        moves = point.parts_by_name["exchange"]
        assert (moves == 0.0) == (point.candidate.cp == 1)
        assert (point.parts_by_name["all_reduce"] == 0.0) == (point.candidate.ranks == 1)


def test_capacity_grows_with_cp() -> None:
    """The gain that never reverses: KV bytes of a rank over cp."""
    fits = {p.candidate.cp: p.tokens_that_fit for p in points(batches=(1,)) if p.candidate.ranks == 8}
    assert fits[1] < fits[2] < fits[4] < fits[8] and fits[8] == pytest.approx(8 * fits[1], rel=0.01)


def test_formats_change_what_is_read() -> None:
    plain = Search(tiny_costed(), goal())
    fp8 = Search(tiny_costed(), goal(cache=cache_format("fp8"), weights=weight_format("nvfp4")))
    for a, b in zip(plain.points(), fp8.points(), strict=True):
        assert b.kv_bytes_per_rank * 2 == a.kv_bytes_per_rank and b.params_bytes_per_rank < a.params_bytes_per_rank
        assert b.parts_by_name["attention"] <= a.parts_by_name["attention"]
        if a.candidate.overlap == "none":  # else less attention hides less of it
            assert b.parts_by_name["exchange"] == a.parts_by_name["exchange"]  # the payload stays in the model's dtype
    assert read_factor(cache_format("fp8_ds_mla"), tiny_costed().sites, 2) == (32 + 4 + 2 * 16) / (2 * 48)


def test_what_a_query_sees() -> None:
    assert seen(("all", 0), 99, 4, 32) == 32 and seen(("all", 0), 99, 1, 32) == 100
    assert seen(("window", 10), 99, 1, 32) == 10 and seen(("chunk", 64), 99, 1, 32) == 36
    assert seen(("top", 2048), 1 << 20, 8, 32) == 256 and seen(("top", 2048), 99, 8, 32) == 32


def test_the_answer_and_where_not_to_use_helix() -> None:
    short = Planned(tiny_costed(), goal(context=1024))
    assert short.best is not None and short.best.candidate.cp == 1
    assert all(c.winner == "cp=1" and c.text.startswith(DO_NOT) for c in short.contests)
    slow = Planned(tiny_costed(), goal(accelerator=machine(link_gb_s=1.0), batches=(64,), context=4096))
    assert all(c.winner == "cp=1" for c in slow.contests)
    long = Planned(tiny_costed(), goal(batches=(64,), tokens_per_s_per_user=1200.0))
    assert long.best is not None and long.best.candidate.cp > 1 and long.best.tokens_per_s_per_user >= 1200.0
    assert [c.winner for c in long.contests] == ["cp>1"] and DO_NOT not in "".join(long.reasons)
    assert any("capacity" in reason for reason in long.reasons)


def test_nothing_fits_is_said_with_the_nearest() -> None:
    planned = Planned(tiny_costed(), goal(accelerator=machine(memory_gb=4.001), ranks=2))
    assert planned.best is None and planned.front == [] and "nothing fits: the least memory is" in planned.reasons[0]
    eager = Planned(tiny_costed(), goal(tokens_per_s_per_user=1e9))
    assert eager.best is None and "the most that is predicted" in eager.reasons[0]


def test_ties_go_to_the_plainer() -> None:
    every = points(accelerator=machine(fixed_us_per_layer=1e6))  # all steps are equal within 2 %
    best = recommended([p for p in every if p.candidate.ranks == 8 and p.batch == 8], goal())
    assert best is not None and best.candidate.cp == 1


def test_replicas() -> None:
    assert goal(ranks=12).replicas == [1, 2, 3, 4, 6, 12] and goal(ranks=12, fewer_ranks=False).replicas == [12]
    short = goal(ranks=12, fewer_ranks=False, accelerator=machine(link_ranks=8))
    assert short.replicas == [6]  # the most that the link joins and that divides
    assert any("the link joins 8 ranks" in line for line in Planned(tiny_costed(), short).assumptions)


def test_a_layout_beyond_the_link_is_not_costed() -> None:
    """One that a configuration asks for; it would look as fast as one that the link joins."""
    wide = Planned(tiny_costed(), goal(), configured=(HelixOptions(cp=8, tpa=10), "own.toml"))
    assert wide.as_configured is None
    said = "as own.toml says it: 80 ranks; the link of gb200 joins 72, and layouts of more are not costed"
    assert said in wide.reasons


def test_arguments() -> None:
    assert batches_of("1..256") == (1, 2, 4, 8, 16, 32, 64, 128, 256) and batches_of("3..10") == (3, 4, 8, 10)
    assert batches_of("8") == (8,) and batches_of("1,8,64") == (1, 8, 64)
    assert (
        count_of("1M", "--context") == 1 << 20 and count_of("128K", "--context") == 131072 and count_of("7", "x") == 7
    )
    for refused in ("0..4", "8..2", "x", "4,2", ""):
        with pytest.raises(HelixError, match="expected a number, several with commas, or a range"):
            batches_of(refused)
    with pytest.raises(HelixError, match="expected tokens, such as"):
        count_of("1.3", "--context")
    with pytest.raises(LayoutError, match="context >= 2"):
        goal(context=1)
    with pytest.raises(HelixError, match="expected one of auto, fp8"):
        cache_format("int8")
    with pytest.raises(HelixError, match="pp=2: pipeline stages"):
        tiny = tiny_costed()
        type(tiny)(tiny.captured, tiny.matches, replace(tiny.base, pp=2))
