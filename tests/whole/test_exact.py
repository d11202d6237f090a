"""Every plan computes what the unmodified model computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.capture.model import capture
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids, worst_deviation
from tests.support.models import VARIANTS, tiny_model
from tests.support.numerics import LIMIT

RAGGED = [6, 11, 9]  # left-padded; at cp=8 and tokens_per_block=4 most shards are empty
SWITCHES: dict[str, tuple[Any, ...]] = {
    "cp": (1, 2, 3, 4, 6, 8),
    "tpa": (1, 2),
    "tokens_per_block": (1, 2, 3, 4, 5, 32),
    "merge": ("a2a", "ag_rs"),
    "q_proj": ("replicate", "gather"),
    "v_up": ("auto", "before", "after"),
    "ep": (None, 1, 2, 4),
}


def is_legal(plan: dict[str, Any]) -> bool:
    """24 heads over cp * tpa ranks, ep divides them; at cp = 1 the options of the exchange are refused."""
    exchange = (plan.get("merge"), plan.get("q_proj"), plan.get("v_up"))
    ranks = plan.get("cp", 1) * plan.get("tpa", 1)
    if plan.get("cp") == 1 and exchange != ("a2a", "replicate", "auto"):
        return False
    return 24 % ranks == 0 and ranks % (plan.get("ep") or 1) == 0


def pairwise() -> list[dict[str, Any]]:
    """Few legal plans that hold every pair of values that a legal plan can hold."""
    legal = [
        plan
        for values in itertools.product(*SWITCHES.values())
        if is_legal(plan := dict(zip(SWITCHES, values, strict=True)))
    ]
    pairs = {plan_id(p): set(itertools.combinations(p.items(), 2)) for p in legal}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(legal, key=lambda p: len(pairs[plan_id(p)] & left))
        chosen.append(best)
        left -= pairs[plan_id(best)]
    return chosen


def plan_id(plan: dict[str, Any]) -> str:
    return "-".join(f"{k}{v}" for k, v in plan.items())


def in_two_tiers(plans: list[dict[str, Any]]) -> list[Any]:
    """Every second one in CI, the others in the slow tier: only together do they hold every pair."""
    marks = [(), pytest.mark.slow]
    return [pytest.param(p, marks=marks[i % 2], id=plan_id(p)) for i, p in enumerate(plans)]


@pytest.mark.parametrize("plan", in_two_tiers(pairwise()))
def test_fp64_over_plans(plan: dict[str, Any]) -> None:
    model = tiny_model("short")  # one layer of each kind: what plans change
    compiled = helix_compile(model, max_seq_len=256, **plan)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]


# shorter models, and what changes no graph of attention
OTHERS = ("tied", "two_shared", "short", "short_biased", "short_half_rope", "short_plain_router")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.slow if v in OTHERS else ()) for v in VARIANTS if v != "plain"]
)
@pytest.mark.parametrize(
    "plan",
    in_two_tiers(
        [
            {"cp": 2, "tpa": 2, "tokens_per_block": 2, "v_up": "before", "q_proj": "gather"},
            {"cp": 4, "tokens_per_block": 3, "v_up": "after"},
        ]
    ),
)
def test_fp64_over_models(variant: str, plan: dict[str, Any]) -> None:
    model = tiny_model(variant)
    compiled = helix_compile(model, max_seq_len=256, **plan)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]


def test_eager_attention_equals_the_sdpa_form() -> None:
    """In fp64 the eager original itself is NaN under left padding."""
    eager, reference = tiny_model(attention="eager"), tiny_model()
    compiled = helix_compile(eager, cp=4, tokens_per_block=3, max_seq_len=256)
    assert worst_deviation(reference, compiled, RAGGED) <= LIMIT[torch.float64]


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_fp32(experts: str) -> None:
    model = tiny_model(dtype=torch.float32, experts=experts)
    compiled = helix_compile(model, cp=4, tpa=2, tokens_per_block=3, max_seq_len=256)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float32]


def test_many_block_boundaries_and_pages() -> None:
    """Longer than a page of 128 slots on every rank, and 150 blocks a rank."""
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=1, max_seq_len=640)
    assert worst_deviation(model, compiled, [590, 600], (1, 3, 1)) <= LIMIT[torch.float64]
    assert all(int(n) > 4 * 128 for n in compiled.lengths)


@pytest.mark.parametrize("context", [0, 1])
def test_first_tokens_of_one_sequence(context: int) -> None:
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=2, max_seq_len=64)
    reference = Reference(model)
    for _ in range(context + 1):
        ids, mask = random_ids(model, 1, 1), torch.ones(1, 1, dtype=torch.int64)
        with WidenedIslands():
            assert deviation(compiled(ids), reference.step(ids, mask), mask) <= 1e-10


def test_whole_graph_mode_agrees() -> None:
    model = tiny_model("short")
    compiled = helix_compile(capture(model, whole=True), cp=4, tpa=2, tokens_per_block=3, max_seq_len=256)
    by_layer = helix_compile(model, cp=4, tpa=2, tokens_per_block=3, max_seq_len=256)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]
    assert compiled.plan.egress_bytes_per_rank_per_token == by_layer.plan.egress_bytes_per_rank_per_token


@pytest.mark.parametrize("stage", ["attention", "reshard", "ffn", "lowered"])
@pytest.mark.parametrize(
    "plan",
    [
        {"cp": 4, "tpa": 2, "tokens_per_block": 5, "v_up": "after", "ep": 8},
        {"cp": 3, "tpa": 2, "tokens_per_block": 3, "q_proj": "gather", "merge": "ag_rs", "ep": 1},
    ],
    ids=plan_id,
)
def test_every_stage_runs_and_is_equal(stage: str, plan: dict[str, Any]) -> None:
    model = tiny_model("attention_bias")
    compiled = helix_compile(model, max_seq_len=256, **plan)
    run = lambda ids, mask: compiled.run_stage(stage, ids, mask)  # noqa: E731
    assert worst_deviation(model, run, RAGGED, (1, 3)) <= LIMIT[torch.float64]


def test_dtype_converts_a_copy() -> None:
    model = tiny_model(dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    compiled = helix_compile(model, cp=4, dtype=torch.float64, max_seq_len=64)
    ids = random_ids(model, 2, 7)
    logits = compiled(ids)
    assert logits.dtype is torch.float64 and model.dtype is torch.float32
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = Reference(model).step(ids, torch.ones_like(ids)).double()
    assert deviation(logits, expected, torch.ones_like(ids)) <= LIMIT[torch.float32]


def test_padding_on_the_right_and_idle_rows() -> None:
    """A row's logits do not depend on where its padding stands; an idle row keeps its length."""
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=3, max_seq_len=256)
    ids = random_ids(model, 3, 8)
    right = torch.tensor([[1] * 5 + [0] * 3, [1] * 8, [0] * 8])
    with WidenedIslands():
        logits = compiled(ids, right)
        assert compiled.lengths.tolist() == [5, 8, 0]
        for row, tokens in ((0, 5), (1, 8)):
            part = ids[row : row + 1, :tokens]
            expected = Reference(model).step(part, torch.ones_like(part))
            assert deviation(logits[row : row + 1, :tokens], expected, torch.ones_like(part)) <= 1e-10
    assert torch.isfinite(logits).all()


def test_a_long_step_in_chunks_equals_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helix_compile.runtime.step.MAX_CHUNK", 4)
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=3, max_seq_len=256)
    assert worst_deviation(model, compiled, [13, 7], (9, 1)) <= LIMIT[torch.float64]


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself must be able to fail: the query position off by one for T = 1."""
    model = tiny_model()
    compiled = helix_compile(model, cp=4, tokens_per_block=3, max_seq_len=256)
    ledger = type(compiled._ledger)
    right = ledger.positions
    shift = lambda self, mask: right(self, mask) + (mask.shape[1] == 1)  # noqa: E731
    monkeypatch.setattr(ledger, "positions", shift)
    assert worst_deviation(model, compiled, left_padded(RAGGED).sum(1).tolist()) > 1e-4
