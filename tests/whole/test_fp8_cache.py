"""A cache in FP8 computes what the unmodified model computes from entries that are rounded in the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helix_compile import capture, helix_compile
from helix_compile.errors import PlanError
from helix_compile.ir.stage import bodies_of
from helix_compile.verifier.mutants.self_test import awkward_sparse, awkward_windows
from tests.support.driver import random_ids, worst_deviation
from tests.support.families import fresh_family
from tests.support.fp8 import CacheRounding, Rounding, poison, rounded_reference, to_nearest, toward_zero, without_clamp
from tests.support.models import fresh_model, tiny_model
from tests.support.numerics import LIMIT

RAGGED = [6, 11, 9]
STEPS = (1, 2, 5, 1)
SCALES = (0.004, 0.03)  # one a layer of "short"; at the first 448 * scale = 1.8: many entries lie beyond


def deviation(
    model: Any, plan: dict[str, Any], rounding: CacheRounding, steps: tuple[int, ...] = STEPS, captured: Any = None
) -> float:
    """Of a model compiled as `plan` says, or of its capture, from the model with rounded entries."""
    compiled = helix_compile(captured or model, max_seq_len=256, **plan)
    poison(compiled)  # what nobody has written is NaN
    return worst_deviation(model, compiled, RAGGED, steps, rounded_reference(model, rounding))


slow = pytest.mark.slow
E4M3: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": SCALES}


@pytest.mark.parametrize(
    "plan",
    [
        {"cp": 1},
        {"cp": 3, "tokens_per_block": 2},
        pytest.param({"cp": 2, "tpa": 2, "tokens_per_block": 3, "q_proj": "gather", "v_up": "before"}, marks=slow),
        pytest.param({"cp": 4, "tokens_per_block": 1, "merge": "ag_rs"}, marks=slow),
    ],
    ids=str,
)
def test_mla_in_fp8_e4m3(plan: dict[str, Any]) -> None:
    assert deviation(tiny_model("short"), {**plan, **E4M3}, CacheRounding(SCALES)) <= LIMIT[torch.float64]


def test_the_default_scale_is_1() -> None:
    plan = {"cp": 2, "cache_dtype": "fp8_e4m3"}
    assert deviation(tiny_model("short"), plan, CacheRounding(1.0), (1,)) <= LIMIT[torch.float64]


@pytest.mark.parametrize(
    ("scales", "rounding"),
    [(0.004, to_nearest), (SCALES, toward_zero), (SCALES, without_clamp)],
    ids=["another scale in the second layer", "toward zero", "no clamp"],
)
def test_the_oracle_tells_another_rounding(scales: Any, rounding: Rounding) -> None:
    plan = {"cp": 2, **E4M3}
    assert deviation(tiny_model("short"), plan, CacheRounding(scales, rounding), (1,)) > 1e-4


def test_what_has_no_effect_or_does_not_fit_is_refused() -> None:
    model = tiny_model("short")
    with pytest.raises(PlanError, match=r"cache_scale=0\.5 has no effect at cache_dtype='fp8_ds_mla'"):
        helix_compile(model, cp=2, cache_dtype="fp8_ds_mla", cache_scale=0.5)
    with pytest.raises(PlanError, match="cache_scale: got 3 numbers, expected one, or 2"):
        helix_compile(model, cp=2, cache_dtype="fp8_e4m3", cache_scale=[1.0, 2.0, 3.0])
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "1", []):
        with pytest.raises(PlanError, match="option cache_scale="):
            helix_compile(model, cp=2, cache_dtype="fp8_e4m3", cache_scale=wrong)


@pytest.mark.parametrize("plan", [{"cp": 2}, pytest.param({"cp": 4, "tokens_per_block": 3}, marks=slow)], ids=str)
def test_mla_in_fp8_ds_mla(plan: dict[str, Any]) -> None:
    """150 latent values: a block of 128, and one of 22, which in the last layer is 0."""
    model: Any = fresh_model("wide_latent")
    with torch.no_grad():
        model.model.layers[-1].self_attn.kv_a_layernorm.weight[128:] = 0
    plan = {**plan, "cache_dtype": "fp8_ds_mla"}
    assert deviation(model, plan, CacheRounding(None)) <= LIMIT[torch.float64]
    assert deviation(model, plan, CacheRounding(None, toward_zero), (1,)) > 1e-4
    assert deviation(model, plan, CacheRounding(None, block=64), (1,)) > 1e-4


@pytest.mark.parametrize(
    "plan", [{"cp": 3}, pytest.param({"cp": 2, "tpa": 2, "tokens_per_block": 2}, marks=slow)], ids=str
)
def test_grouped_query_attention_in_fp8_e4m3(plan: dict[str, Any]) -> None:
    """Heads of K and V, a window, sinks."""
    model = awkward_windows(torch.float64)
    scales = (0.01, 0.002)
    plan = {**plan, "cache_dtype": "fp8_e4m3", "cache_scale": scales, "unmatched": "keep"}  # its experts
    assert deviation(model, plan, CacheRounding(scales), (1, 2, 5, 14, 1)) <= LIMIT[torch.float64]


@pytest.mark.parametrize(
    ("name", "variant", "plan", "formats"),
    [
        ("gemma4", "", {"cp": 2}, ["fp8_e4m3"]),
        pytest.param("gemma4", "", {"cp": 2, "tpa": 2, "tokens_per_block": 1}, ["fp8_e4m3"], marks=slow),
        pytest.param("gemma4", "", {"cp": 4, "tokens_per_block": 3, "merge": "ag_rs"}, ["fp8_e4m3"], marks=slow),
        pytest.param("gemma4", "", {"cp": 4, "window": "replicate"}, ["fp8_e4m3"], marks=slow),
        pytest.param("mistral_large4", "shared", {"cp": 4}, ["fp8_e4m3", "fp8_ds_mla"], marks=slow),
    ],
    ids=str,
)
def test_layers_that_read_an_earlier_ones_cache(
    name: str, variant: str, plan: dict[str, Any], formats: list[str]
) -> None:
    """They read it rounded, and by the scale of the layer that wrote it: with another one the oracle is far off."""
    model = fresh_family(name, variant)
    for cache_dtype in formats:
        scales = (0.01, 0.002) if cache_dtype == "fp8_e4m3" else None
        given: dict[str, Any] = {**plan, "cache_dtype": cache_dtype, **({"cache_scale": scales} if scales else {})}
        assert deviation(model, given, CacheRounding(scales)) <= LIMIT[torch.float64]
        if scales:
            assert deviation(model, given, CacheRounding(scales[::-1]), (1,)) > 1e-4


@pytest.mark.fresh_capture  # shared captures have no symbol for its seven keys
def test_sparse_attention_keeps_its_index_keys() -> None:
    """In the model's dtype, behind the FP8 values: an indexer that read rounded keys would choose others."""
    model = awkward_sparse(torch.float64)
    captured = capture(model)
    for plan, rounding in (
        ({"cache_dtype": "fp8_e4m3", "cache_scale": 0.01}, CacheRounding(0.01)),
        ({"cache_dtype": "fp8_ds_mla"}, CacheRounding(None)),
    ):
        plan = {"cp": 2, "tokens_per_block": 2, **plan}
        assert deviation(model, plan, rounding, captured=captured) <= LIMIT[torch.float64]


def test_k_and_v_have_no_ds_mla() -> None:
    with pytest.raises(PlanError, match=r"layer 0: cache_dtype='fp8_ds_mla' .* nearest that works: .*'fp8_e4m3'"):
        helix_compile(awkward_windows(torch.float64), cp=2, cache_dtype="fp8_ds_mla", unmatched="keep")


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_ds_mla"])
def test_kernels_are_selected_and_agree(name: str) -> None:
    """In the interpreter. An entry near a tie of e4m3 may fall to the other side where a norm is summed otherwise."""
    model = tiny_model("short", torch.float32)
    plan: dict[str, Any] = {"cp": 2, "max_seq_len": 256, "cache_dtype": name}
    kernels, reference = (helix_compile(model, lower=how, **plan) for how in ("triton", "reference"))
    wanted = {"cache_append.norm_rope", "mla_decode.default"}
    for body in bodies_of(kernels.graph).values():
        assert wanted <= {str(n.target).removeprefix("helix_triton.") for n in body.graph.nodes}
    ids = random_ids(model, 2, 5)
    got, expected = kernels(ids), reference(ids)
    assert float((got - expected).norm() / expected.norm()) <= 1e-2
