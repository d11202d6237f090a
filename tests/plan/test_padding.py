"""Shards and plans with zero heads: parts, boxes that are read, JSON of today and of before."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from helix_compile import HelixPlan, PlanError, helix_compile
from helix_compile.plan.shard import cut_param, shard_boxes
from helix_compile.runtime.rank import originals
from helix_compile.verifier.contract import coordinate, head_places
from tests.support.padding import gqa_of, mla_of, padded

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mla": (lambda: mla_of(20), {"cp": 4, "tpa": 2, "q_proj": "gather", "v_up": "after", "ep": 8}),
    "mla before": (lambda: mla_of(20), {"cp": 4, "tpa": 2, "v_up": "before"}),
    "grouped": (lambda: gqa_of(12, 3), {"cp": 4, "tpa": 2, "q_proj": "gather"}),
}


@pytest.mark.parametrize("case", ["mla", pytest.param("mla before", marks=pytest.mark.slow), "grouped"])
def test_parts_and_boxes(case: str) -> None:
    """Each element once on every replica, at the place of its head; zeros elsewhere. What is read by boxes is the same."""
    build, options = CASES[case]
    compiled = padded(build(), **options)
    plan, layout = compiled.plan, compiled.plan.layout
    whole, zeros = originals(build()), 0
    site = plan.bodies[0].attentions[0]
    places = head_places(site.heads, site.kv_heads, layout)
    for name, (source, shard) in compiled.facts.shards.items():
        if not name.startswith("model.layers.1."):
            continue
        ids = torch.arange(1.0, whole[source].numel() + 1, dtype=torch.float64).view(shard.source_shape)
        picked = ids if shard.index is None else ids[torch.tensor(shard.index)]
        picked = picked.view(shard.view)
        picked = picked.narrow(*shard.window) if shard.window else picked
        times = torch.zeros(int(ids.max()) + 1, dtype=torch.int64)
        for rank in range(layout.world_size):
            part = cut_param(ids, shard, layout, rank)
            assert int((part == 0).sum()) == shard.padding(layout, rank)
            zeros += shard.padding(layout, rank)
            times += torch.bincount(part.reshape(-1).long(), minlength=len(times))
            boxes = shard_boxes(shard, layout, rank)
            read = torch.zeros(boxes.local_shape, dtype=torch.float64)
            for box in boxes.boxes:
                target = read[tuple(slice(*r) for r in box.local)]
                target.view([b - a for a, b in box.source]).copy_(ids[tuple(slice(*r) for r in box.source)])
            assert torch.equal(read.view(shard.shape), part) and boxes.padded == bool((part == 0).any())
            (cut, *more) = shard.cuts
            if cut.padding and not more:  # place by place
                dims = [s for d, s in enumerate(picked.shape) if d != cut.dim]
                local = part.reshape(*picked.shape[: cut.dim], -1, *picked.shape[cut.dim + 1 :]).movedim(cut.dim, 0)
                start = coordinate(cut.axis, rank, layout) * len(local)
                for head, mine in zip(places[start : start + len(local)], local, strict=True):
                    wanted = torch.zeros(dims, dtype=ids.dtype) if head is None else picked.select(cut.dim, head)
                    assert torch.equal(mine, wanted), (name, rank)
        copies = layout.world_size
        for cut in shard.cuts:
            copies //= layout.size(cut.axis)
        assert set(times[picked.reshape(-1).long()].tolist()) == {copies}, name
    assert zeros


@pytest.mark.parametrize("case", CASES)
def test_written_and_read(case: str) -> None:
    build, options = CASES[case]
    plan = padded(build(), **options).plan
    assert HelixPlan.from_json(plan.to_json()) == plan
    site = plan.bodies[0].attentions[0]
    assert len({*range(site.heads)} - {h for a, b in site.head_ranges(plan.layout) for h in range(a, b)}) == 0
    document = json.loads(plan.to_json())
    document["bodies"][0]["attentions"][0]["heads"] -= 1
    with pytest.raises(PlanError, match="it contradicts itself"):
        HelixPlan.from_json(json.dumps(document))


def test_a_plan_of_before_still_loads() -> None:
    plan = helix_compile(mla_of(20), cp=2, tpa=2, world="virtual").plan
    document = json.loads(plan.to_json())
    del document["options"]["pad_heads"]
    for body in document["bodies"]:
        for site in body["attentions"]:
            del site["heads"], site["kv_heads"]
        for ffn in body["ffns"]:
            del ffn["experts"]
        for shard in body["param_shards"]:
            for cut in shard["cuts"]:
                del cut["padding"]
    assert HelixPlan.from_json(json.dumps(document)) == plan


def test_the_plan_says_what_padding_costs() -> None:
    """By hand: 4 zero heads that every rank computes, float64, two layers; R = 20, r = 6, V = 14, D = 40."""
    compiled = padded(mla_of(20), cp=8, v_up="before")
    plan = compiled.plan
    (said,) = (d for d in plan.decisions if d.name == "pad_heads")
    assert said.result == "20 -> 24 heads"
    of_q, up, out = 28 * 16, 20 * (10 + 14), 14 * 40
    # q, W_UK and W_UV are held by every rank for all heads, o_proj's columns for its own
    per_layer = 4 * (of_q + up) + out // 2
    assert dict(said.inputs) == {
        "params_bytes": 2 * per_layer * 8,
        "exchange_bytes_per_token": 2 * 4 * (14 + 1) * 8 * 7 // 8,
        "kv_bytes_per_token": 0,
        "flops_per_token": 2 * 2 * per_layer,
        "flops_per_token_and_cached_token": 2 * 2 * 4 * (26 + 20),
    }
    assert any(re.search(r"pad_heads: 20 -> 24 heads; .*840 bytes sent a token", note) for note in plan.notes)
    report = compiled.inspect()
    assert "pad_heads: 20 -> 24 heads" in str(report) and "840 bytes sent a token" in str(report)
    told = next(d for d in report.facts["decisions"] if d["name"] == "pad_heads")
    assert told["inputs"]["exchange_bytes_per_token"] == 840 if isinstance(told["inputs"], dict) else told["inputs"]
