"""The plan is data: round trip, diff, decisions with their numbers, and shards that add up to the weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helix_compile import HelixPlan, PlanError, helix_compile
from helix_compile.passes.decide.plan_helix import break_even_tokens
from helix_compile.plan.shard import cut_param
from helix_compile.runtime.rank import originals
from tests.support.models import tiny_model


def plan_of(variant: str = "plain", **options: Any) -> HelixPlan:
    return helix_compile(tiny_model(variant), **{"cp": 4, "max_seq_len": 64, **options}).plan


@pytest.mark.parametrize("options", [{"cp": 4}, {"cp": 3, "tpa": 2, "ep": 2}, {"cp": 1, "tpa": 3}], ids=str)
def test_json_round_trip(options: dict[str, Any]) -> None:
    plan = plan_of(**options)
    assert HelixPlan.from_json(plan.to_json()) == plan


def test_equal_plans_and_their_difference() -> None:
    assert plan_of() == plan_of()
    assert plan_of().diff(plan_of()) == []
    lines = plan_of().diff(plan_of(tokens_per_block=4))
    assert "plan.options.tokens_per_block: 32 -> 4" in lines
    assert all("tokens_per_block" in line for line in lines)


def test_a_difference_in_length_is_told_by_item() -> None:
    lines = plan_of().diff(plan_of(merge="ag_rs"))
    assert "plan.options.merge: 'a2a' -> 'ag_rs'" in lines
    added = [line for line in lines if line.startswith("plan.bodies[0].collectives[3]: 'absent' ->")]
    assert len(added) == 1 and max(map(len, lines)) < 200


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"version": 99}'])
def test_not_a_plan(text: str) -> None:
    with pytest.raises(PlanError, match="plan: "):
        HelixPlan.from_json(text)


CONTRADICTIONS: list[tuple[str, str, Any, str]] = [
    ("attentions", "merge", "ag_rs", "'ag_rs' -> 'a2a'"),
    ("attentions", "q_proj", "gather", "'gather' -> 'replicate'"),
    ("attentions", "tokens_per_block", 8, "8 -> 32"),
    ("attentions", "owned_heads", 3, "3 -> 6"),
    ("attentions", "kvp", 2, "2 -> 4"),
    ("attentions", "unheard_of", 1, "1 -> 'absent'"),
    ("ffns", "shard_width", 5, "5 -> "),
    ("ffns", "axes", ["tpf"], "'tpf' -> 'world'"),
    ("ffns", "padding", [1, 0, 0, 0], "1 -> 0"),
]


@pytest.mark.parametrize(("role", "field", "value", "said"), CONTRADICTIONS, ids=[f for _, f, *_ in CONTRADICTIONS])
def test_a_written_plan_that_contradicts_itself_is_refused(role: str, field: str, value: Any, said: str) -> None:
    """What follows from the options stands beside each site, and must."""
    document = json.loads(plan_of().to_json())
    document["bodies"][0][role][0][field] = value
    with pytest.raises(PlanError, match=rf"plan: it contradicts itself .*body_0.{role}\[0\].{field}.*{said}"):
        HelixPlan.from_json(json.dumps(document))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float8_e4m3fn, 9.6), (torch.bfloat16, 19.2)], ids=str)
def test_break_even_of_v_up(dtype: torch.dtype, expected: float) -> None:
    """helix-algorithm section 9, B200-class: 9.6 tokens with FP8 weights and a bf16 payload, 19 with BF16.

    The rule takes weights and payload in one dtype; at FP8 the payload is then half of the table's.
    """
    payload = torch.bfloat16.itemsize / dtype.itemsize
    assert break_even_tokens(128, 512, 128, dtype) / payload == pytest.approx(expected)
    assert break_even_tokens(128, 512, 512, dtype) == float("inf")


@pytest.mark.parametrize(("batch", "expected"), [(5, "after"), (6, "before")])
def test_v_up_auto_turns_at_break_even(batch: int, expected: str) -> None:
    """R=20, V=14: B* = 20 * 14 / 6 * 900 / 8000 = 5.25."""
    decision = next(d for d in plan_of(max_batch_size=batch).decisions if d.name == "v_up")
    assert dict(decision.inputs)["B*"] == 5.25 and decision.result == expected


def test_v_wider_than_the_latent_is_always_after() -> None:
    plan = plan_of("v_wider_than_latent", max_batch_size=64)
    assert plan.bodies[0].attentions[0].v_up == "after"


@pytest.mark.parametrize(("cp", "ep"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 8), (12, 4)])
def test_default_ep(cp: int, ep: int) -> None:
    plan = plan_of(cp=cp)
    assert (plan.layout.ep, plan.layout.tpf) == (ep, cp // ep)


@pytest.mark.parametrize(
    "options", [{"cp": 3}, {"cp": 3, "tpa": 2}, {"cp": 6, "ep": 2}, {"cp": 4, "tpa": 2, "ep": 1}], ids=str
)
def test_shards_put_together_are_the_weight(options: dict[str, Any]) -> None:
    """Without holes, overlaps or lost rows; padding is zero. Replicas over an axis are equal."""
    whole = originals(tiny_model())
    plan = plan_of(**options, v_up="after")
    layout = plan.layout
    for body, prefix in zip(plan.bodies, ("model.layers.0.", "model.layers.2."), strict=True):
        for shard in body.param_shards:
            source = whole[prefix + shard.source]
            seen = torch.zeros_like(source)
            rows = torch.arange(1.0, source.numel() + 1, dtype=torch.float64).view(source.shape)
            for rank in range(layout.world_size):
                part = cut_param(rows, shard, layout, rank).reshape(-1).long()
                assert int((part == 0).sum()) == shard.padding(layout, rank)
                seen.view(-1)[part[part > 0] - 1] += 1
            copies = layout.world_size
            for cut in shard.cuts:
                copies //= layout.size(cut.axis)
            held = seen[seen > 0]
            assert (held == copies).all(), shard.name
            expected = source.numel()
            if shard.name.endswith((".w_uk", ".w_uv")):
                expected = 24 * 20 * (10 if shard.name.endswith("uk") else 14)
            assert held.numel() == expected, shard.name


def test_head_ranges_follow_ranks() -> None:
    plan = plan_of(cp=3, tpa=2)
    ranges = plan.bodies[0].attentions[0].head_ranges(plan.layout)
    assert ranges == ((0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24))
    assert [plan.layout.index("tpa", r) for r in range(6)] == [0, 0, 0, 1, 1, 1]


def test_notes() -> None:
    assert any("tpa=2: the latent cache is held 2 times" in n for n in plan_of(cp=2, tpa=2).notes)
    assert any("max_seq_len=2048 is beyond" in n for n in plan_of(max_seq_len=2048).notes)
