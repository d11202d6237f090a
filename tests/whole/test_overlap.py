"""overlap="hopb": the bits of overlap="none", and an order in which one part is on its way while the next attends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, PlanError, helix_compile, verify
from helix_compile.worlds.virtual import VirtualWorld
from tests.support.driver import random_ids
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model, tiny_model
from tests.support.order import A2A, AG_RS, record_walks

OPTIONS: dict[str, Any] = {"max_batch_size": 5, "max_seq_len": 64, "tokens_per_block": 2}


def pair(model: Any, **options: Any) -> tuple[HelixModule, HelixModule]:
    options = {**OPTIONS, **options}
    return helix_compile(model, **options), helix_compile(model, **options, overlap="hopb")


def same_bits(model: Any, plain: HelixModule, parted: HelixModule, batches: tuple[int, ...]) -> None:
    """Ragged prompts, single tokens, drafts, idle rows: logits at every place, padding too, and caches.

    Where attention forgets, padding stands in front alone: between tokens it is refused.
    """
    forgets = plain.plan.shortest_reach > 0
    for B in batches:
        plain.reset(), parted.reset()
        for T in (5, 1, 3):
            ids, mask = random_ids(model, B, T), torch.ones(B, T, dtype=torch.int64)
            if T == 5 or not forgets:
                mask[0, : T // 2] = 0
                mask[2:3] = int(forgets)
            assert torch.equal(plain(ids, mask), parted(ids, mask)), (B, T)
        for mine, theirs in zip(parted.ranks, plain.ranks, strict=True):
            assert all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(mine.cache, theirs.cache, strict=True)
            )
    assert parted.world.sent_bytes == plain.world.sent_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_latents_have_the_bits_of_a_batch_in_one(dtype: torch.dtype) -> None:
    """W_UV before the exchange; one sequence, which leaves a part without rows, up to five."""
    model = tiny_model("short", dtype)
    same_bits(model, *pair(model, cp=4, v_up="before"), (1, 2, 5))


def test_the_order_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank and in every layer; in stages that speak of moves too; and bytes and numbers of collectives are the plan's."""
    model = tiny_model("short", torch.float32)
    events = record_walks(monkeypatch, VirtualWorld)
    parted = helix_compile(model, **OPTIONS, cp=2, tpa=2, overlap="hopb")
    ids = random_ids(model, 3, 4)
    logits = parted(ids)
    assert events == dict.fromkeys(range(4), A2A * 2)
    assert parted.world.num_collectives == {("all_to_all_single", "kvp"): 8, ("all_reduce", "world"): 4}
    assert set(parted.world.sent_bytes) == {parted.plan.egress_bytes_per_rank(12)}
    events.clear()
    for stage in ("ffn", "overlap"):
        parted.reset()
        assert torch.equal(parted.run_stage(stage, ids), logits)
    assert events == dict.fromkeys(range(4), A2A * 2)  # of the second: the first has no parts
    events.clear()
    gathers = helix_compile(model, **OPTIONS, cp=4, merge="ag_rs", overlap="hopb")
    gathers(ids[:1])
    assert events == dict.fromkeys(range(4), AG_RS * 2)


def test_a_reloaded_module_has_its_parts(tmp_path: Path) -> None:
    model = tiny_model("short", torch.float32)
    parted = helix_compile(model, **OPTIONS, cp=2, overlap="hopb")
    parted.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    assert list(loaded.stages) == ["ffn", "overlap", "lowered"] and loaded.plan == parted.plan
    ids = random_ids(model, 3, 4)
    assert torch.equal(loaded(ids), parted(ids))
    texts = [
        [(n.name, n.meta.get("part")) for n in m.graph.get_submodule("body_0").graph.nodes] for m in (loaded, parted)
    ]
    assert texts[0] == texts[1] and any(part for _, part in texts[0])


def test_windows_that_exchange_nothing_stay_whole() -> None:
    model = fresh_gqa("gemma3", torch.float64, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    plain, parted = pair(model, cp=2, window="replicate")
    (decision,) = [d for d in parted.plan.decisions if d.name == "overlap"]
    told = dict(decision.inputs)
    assert (told["attentions_in_parts"], told["attentions_that_exchange_nothing"], decision.result) == (1, 1, 2)
    assert [[s.parts for s in b.attentions] for b in parted.plan.bodies] == [[1], [2]]
    same_bits(model, plain, parted, (3,))
    only = fresh_gqa("gemma3", torch.float64, sliding_window=5, layer_types=["sliding_attention"] * 2)
    with pytest.raises(PlanError, match="option overlap='hopb' has no effect at window='replicate'"):
        helix_compile(only, cp=2, window="replicate", overlap="hopb")


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "after": (lambda: tiny_model("short"), {"cp": 4, "v_up": "after"}),
    "ag_rs": (lambda: tiny_model("short"), {"cp": 4, "merge": "ag_rs", "v_up": "before"}),
    "gather": (lambda: tiny_model("short"), {"cp": 2, "tpa": 2, "q_proj": "gather"}),
    "gather ag_rs": (lambda: tiny_model("short"), {"cp": 2, "tpa": 2, "q_proj": "gather", "merge": "ag_rs"}),
    "padded": (lambda: tiny_model("short"), {"cp": 5, "pad_heads": True}),
    "head": (lambda: tiny_model("short"), {"cp": 4, "head": "shard", "pad_heads": True}),
    "fp8 latents": (lambda: tiny_model("short", torch.float32), {"cp": 4, "cache_dtype": "fp8_ds_mla"}),
    "fp8": (lambda: tiny_model("short", torch.float32), {"cp": 4, "cache_dtype": "fp8_e4m3", "cache_scale": 0.02}),
    "gqa": (lambda: fresh_gqa("qwen3"), {"cp": 2, "tpa": 2}),
    "gqa ag_rs": (lambda: fresh_gqa("qwen3"), {"cp": 4, "merge": "ag_rs"}),
    "gqa fp8": (lambda: fresh_gqa("qwen3", torch.float32), {"cp": 2, "cache_dtype": "fp8_e4m3", "cache_scale": 0.02}),
    "sinks": (lambda: fresh_family("granite_swa"), {"cp": 4}),
    "sinks ag_rs": (lambda: fresh_family("granite_swa"), {"cp": 2, "merge": "ag_rs"}),
    "windows": (lambda: fresh_gqa("gemma3", sliding_window=5), {"cp": 4}),
    "sparse": (lambda: fresh_family("glm_moe_dsa"), {"cp": 4}),
    "sparse owner": (lambda: fresh_family("glm_moe_dsa"), {"cp": 2, "tpa": 2, "topk_exchange": "owner"}),
    "sparse ag_rs": (lambda: fresh_family("glm_moe_dsa", dtype=torch.float32), {"cp": 4, "merge": "ag_rs"}),
    "latents of earlier layers": (lambda: fresh_family("mistral_large4", "shared"), {"cp": 4}),
    "shared": (lambda: fresh_family("gemma4"), {"cp": 4}),
    "gate": (lambda: fresh_family("dots3_note"), {"cp": 4}),
    "bfloat16": (lambda: fresh_gqa("qwen3", torch.bfloat16), {"cp": 4}),
}


@pytest.mark.parametrize(
    "kind", [k if k in ("gqa", "sparse owner") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_every_kind_of_site_has_the_bits_of_a_batch_in_one(kind: str) -> None:
    make, options = KINDS[kind]
    model = make()
    plain, parted = pair(model, **options)
    assert any(site.parts == 2 for body in parted.plan.bodies for site in body.attentions)
    same_bits(model, plain, parted, (2, 3) if kind == "sparse owner" else (1, 2, 5))


@pytest.mark.slow
@pytest.mark.fresh_capture  # what three parts ask of B stays with a capture, and two parts of it fail then
def test_the_pipeline_of_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the plan to say so: of one sequence two are empty."""
    monkeypatch.setattr("helix_compile.passes.decide.overlap.PARTS", 3)
    events = record_walks(monkeypatch, VirtualWorld)
    model = fresh_model("short")
    plain, parted = pair(model, cp=2)
    same_bits(model, plain, parted, (1, 2, 5))
    order = [
        "attend 0",
        "start 0",
        "attend 1",
        "start 1",
        "wait 0",
        "merge 0",
        "attend 2",
        "start 2",
        "wait 1",
        "merge 1",
        "wait 2",
        "merge 2",
    ]
    assert events[0][: 2 * len(order)] == order * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["after", "ag_rs", "gather", "gqa", "sinks", "windows", "sparse owner", "fp8 latents", "shared", "gate"]
)
def test_verify_finds_nothing(kind: str) -> None:
    make, options = KINDS[kind]
    model = make()
    report = verify(helix_compile(model, **options, tokens_per_block=4, max_seq_len=256, overlap="hopb"), model)
    assert report.ok, report


@pytest.mark.slow
def test_generation_and_sequences_that_begin_again() -> None:
    model = tiny_model("short", torch.float32)
    plain, parted = pair(model, cp=4, v_up="before")
    ids, mask = random_ids(model, 3, 4), torch.ones(3, 4, dtype=torch.int64)
    mask[1, :2] = 0
    written = [m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (plain, parted)]
    assert torch.equal(*written)
    plain.reset(rows=[1]), parted.reset(rows=[1])
    for T in (2, 1):
        step = random_ids(model, 3, T)
        assert torch.equal(plain(step), parted(step)) and torch.equal(plain.lengths, parted.lengths)
    plain.truncate([3, 1, 3]), parted.truncate([3, 1, 3])
    assert torch.equal(plain(ids), parted(ids))


# what else can run the graph; float32 as Inductor generates it is held within a limit (tests/runtime/test_overlap.py)
LOWERINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "triton": (lambda: tiny_model("short", torch.float32), {"cp": 4, "lower": "triton", "v_up": "before"}),
    "cpp": (lambda: tiny_model("short"), {"cp": 4, "lower": "cpp", "v_up": "before"}),
    "cpp float32": (lambda: tiny_model("short", torch.float32), {"cp": 2, "lower": "cpp", "merge": "ag_rs"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOWERINGS)
def test_every_lowering_has_the_bits_of_a_batch_in_one(kind: str) -> None:
    make, options = LOWERINGS[kind]
    model = make()
    plain, parted = pair(model, **options)
    assert any(site.parts == 2 for body in parted.plan.bodies for site in body.attentions)
    same_bits(model, plain, parted, (1, 3))
