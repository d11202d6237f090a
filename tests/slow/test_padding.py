"""Padded heads: every number of heads, every layout, against the unmodified model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from helix_compile import assert_equivalent, helix_compile
from helix_compile.checkpoint.named import named_model
from tests.slow.test_releases import RELEASES
from tests.support.families import FAMILIES, fresh_family
from tests.support.family_run import compiled_family, run_family
from tests.support.gqa_models import SIZES
from tests.support.padding import check_bytes, check_exact, gqa_of, mla_of, padded
from tests.support.sparse import sparse_deviation

pytestmark = pytest.mark.slow
LAYOUTS = [(cp, tpa) for cp in (2, 4, 8) for tpa in (1, 2)]
# each exchange, query and W_UV placement comes up for every number of heads
WAYS: list[dict[str, Any]] = [
    {"v_up": "after"},
    {"v_up": "before"},
    {"q_proj": "gather", "v_up": "after"},
    {"merge": "ag_rs", "v_up": "before"},
    {"merge": "ag_rs", "q_proj": "gather", "v_up": "after"},
    {"q_proj": "gather", "v_up": "before"},
]


@pytest.mark.parametrize(("cp", "tpa"), LAYOUTS)
@pytest.mark.parametrize("heads", [20, 12, 5])
def test_mla(heads: int, cp: int, tpa: int) -> None:
    model = mla_of(heads)
    compiled = padded(model, cp=cp, tpa=tpa, **WAYS[LAYOUTS.index((cp, tpa))])
    assert (
        compiled.plan.bodies[0].attentions[0].padding(compiled.plan.layout).places == -(-heads // (cp * tpa)) * cp * tpa
    )
    check_exact(model, compiled)
    check_bytes(model, compiled)


@pytest.mark.parametrize(("cp", "tpa"), LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(20, 4), (20, 5), (12, 3), (12, 12), (5, 1), (5, 5)])
def test_gqa(heads: int, kv_heads: int, cp: int, tpa: int) -> None:
    model = gqa_of(heads, kv_heads)
    way = {k: v for k, v in WAYS[LAYOUTS.index((cp, tpa))].items() if k != "v_up"}
    compiled = padded(model, cp=cp, tpa=tpa, **way)
    padding = compiled.plan.bodies[0].attentions[0].padding(compiled.plan.layout)
    assert padding.padded_groups == math.ceil(kv_heads / tpa) * tpa and padding.places % (cp * tpa) == 0
    check_exact(model, compiled)
    check_bytes(model, compiled)


@pytest.mark.parametrize(("experts", "ep"), [(10, 4), (10, 8), (12, 8), (9, 2)])
def test_experts(experts: int, ep: int) -> None:
    """8 ranks; at ep = 8 of 10 experts, two a rank, three ranks hold none of the model."""
    model = mla_of(12, n_routed_experts=experts, n_group=1, topk_group=1)
    compiled = padded(model, cp=4, tpa=2, ep=ep)
    check_exact(model, compiled)
    check_bytes(model, compiled)


def test_glm_4_7_flash() -> None:
    """20 heads over 8 ranks, at the published size, without weights."""
    plan = helix_compile(named_model(str(RELEASES / "GLM-4.7-Flash.json"), meta=True), cp=8, pad_heads=True).plan
    attention = plan.bodies[0].attentions[0]
    assert attention.padding(plan.layout).places == 24
    assert attention.head_ranges(plan.layout) == (*((3 * r, 3 * r + 3) for r in range(6)), (18, 20), (20, 20))
    assert any("20 -> 24 heads" in note and "bytes of parameters" in note for note in plan.notes)


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # a gate with one row a head behind MLA
    "bailing": (
        "bailing_hybrid",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "layer_types": ["full_attention"] * 2,
            "num_hidden_layers": 2,
        },
        {"cp": 4, "tpa": 2},
    ),
    # two sites a layer
    "longcat": ("longcat_flash", {"num_attention_heads": 5, "num_key_value_heads": 5}, {"cp": 4}),
    # the rope part of q is a value of its own
    "youtu": ("youtu", {"num_attention_heads": 5, "num_key_value_heads": 5}, {"cp": 4, "q_proj": "gather"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    family, sizes, options = OTHERS[name]
    model = fresh_family(family, **sizes)
    compiled = padded(model, **options)
    check_exact(model, compiled)
    check_bytes(model, compiled)


def test_a_gate_behind_grouped_query_attention() -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 22, "num_dense_layers": 1}
    gqa = {**SIZES, **sizes, "num_attention_heads": 12, "num_key_value_heads": 3, "layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    model = AfmoeForCausalLM(AfmoeConfig(**gqa)).double().eval()
    model.set_experts_implementation("batched_mm")
    compiled = padded(model, cp=8)
    assert any(s.name.endswith("gate_proj.weight") and s.cuts[0].padding for s in compiled.plan.bodies[0].param_shards)
    check_exact(model, compiled)
    check_bytes(model, compiled)


@pytest.mark.parametrize("merge", ["a2a", "ag_rs"])
@pytest.mark.parametrize("name", ["gpt_oss", "mistral", "dots3_note"])
def test_windows_and_sinks(name: str, merge: str) -> None:
    """12 heads on 8 ranks, beside sinks of a head each, windows, and chosen keys."""
    model = fresh_family(name)
    compiled = compiled_family(model, 8, pad_heads=True, merge=merge, **FAMILIES[name].options)
    run = run_family(model, compiled)
    assert run.worst <= 1e-10 and run.same_tokens
    if name == "gpt_oss":
        assert_equivalent(compiled, model)


def test_sparse_attention() -> None:
    """An indexer's heads are whole on every rank; those of attention are padded."""
    model = fresh_family("deepseek_v32", num_attention_heads=5, num_key_value_heads=5)
    compiled = padded(model, cp=4)
    assert sparse_deviation(model, compiled, [5, 2, 9], (1, 1, 3, 1)) <= 1e-10
