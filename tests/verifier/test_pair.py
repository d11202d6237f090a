"""verify(compiled_a, compiled_b): silent on two plans of one model; a fault in either is named in words for two modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import HelixError, HelixModule, helix_compile, verify
from helix_compile.verifier.pair import captured_of
from helix_compile.verifier.report import Finding
from tests.support.models import fresh_model

OTHER_PLANS: list[dict[str, Any]] = [
    {"cp": 2, "tpa": 2, "v_up": "after"},
    {"cp": 2, "merge": "ag_rs"},
    {"cp": 1, "tokens_per_block": 3},
]
NORM, BIAS = "model.layers.1.self_attn.kv_a_layernorm.weight", "self_attn_o_proj_bias"


@cache
def new_model(dtype: torch.dtype) -> Any:
    """As a new model is: norm weights all one, biases zero; nothing but conditioning shows one that is left out."""
    model = fresh_model("short_biased", dtype)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def built(dtype: torch.dtype = torch.float64, **options: Any) -> HelixModule:
    return helix_compile(new_model(dtype), **{"cp": 2, "max_seq_len": 32, "tokens_per_block": 2, **options})


def edit_on_one_rank(name: str) -> Callable[[HelixModule], None]:
    def edit(compiled: HelixModule) -> None:
        compiled.ranks[1].params[name] = compiled.ranks[1].params[name] * 1.5

    return edit


def drop_a_bias(compiled: HelixModule) -> None:
    body: Any = compiled.graph.get_submodule("body_0")
    bias = next(n for n in body.graph.nodes if n.name.endswith(BIAS))
    (add,) = bias.users
    add.replace_all_uses_with(next(a for a in add.args if a is not bias))
    body.recompile()


def the_finding(report: Any) -> Finding:
    (finding,) = report.findings
    assert "original" not in str(finding)
    return finding


@pytest.mark.parametrize(
    "options", [OTHER_PLANS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OTHER_PLANS[1:])], ids=str
)
def test_two_plans_of_one_model(options: dict[str, Any]) -> None:
    report = verify(built(), built(**options))
    assert report.ok and report.coverage.conditioned, report
    assert report.coverage.largest_deviation < 1e-13  # measured 5e-15 here, 3e-14 over four layers


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))],
    ids=str,
)
def test_two_plans_in_narrow_dtypes(dtype: torch.dtype) -> None:
    report = verify(built(dtype), built(dtype, **OTHER_PLANS[1]))
    assert report.ok, report
    assert report.coverage.largest_deviation < report.coverage.limit / 2


FAULTS: dict[str, tuple[Callable[[HelixModule], None], str, str]] = {
    "bias": (drop_a_bias, "layer 0", "`add"),
    "norm": (edit_on_one_rank(NORM), "layer 1", "`self_attn_kv_a_layernorm_weight`, rank 1"),
    "shard": (
        edit_on_one_rank("model.layers.1.self_attn.o_proj.weight"),
        "layer 1",
        "`self_attn_o_proj_weight`, rank 1",
    ),
}


@pytest.mark.parametrize("side", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["first", "second"])
@pytest.mark.parametrize("fault", FAULTS)
def test_equal_plans_are_compared_node_by_node(fault: str, side: int) -> None:
    damage, layer, node = FAULTS[fault]
    modules = (built(), built())
    damage(modules[side])
    finding = the_finding(verify(*modules))
    assert finding.code == "HX409" and "second module's" in finding.got
    assert layer in finding.where and node in finding.where


@pytest.mark.parametrize("fault", FAULTS)
def test_unlike_plans_are_compared_layer_by_layer(fault: str) -> None:
    damage, layer, _ = FAULTS[fault]
    modules = (built(), built(**OTHER_PLANS[0]))
    damage(modules[1])
    finding = the_finding(verify(*modules))
    assert finding.code == "HX409" and f"{layer}; first value that deviates" in finding.where


@pytest.mark.parametrize("side", [0, 1], ids=["first", "second"])
def test_ranks_of_one_module_that_disagree(side: int) -> None:
    modules = (built(), built())
    edit_on_one_rank("lm_head.weight")(modules[side])
    finding = the_finding(verify(*modules))
    assert finding.code == "HX405" and ("first module", "second module")[side] in finding.where
    assert "`lm_head_weight`, rank 1" in finding.where


def test_a_second_module_that_is_not_finite_or_breaks() -> None:
    first, second = built(), built()
    for rank in second.ranks:
        rank.params["model.norm.weight"] = rank.params["model.norm.weight"] * torch.nan
    finding = the_finding(verify(first, second))
    assert finding.code == "HX406" and "second module" in finding.where
    for rank in second.ranks:
        rank.params["model.norm.weight"] = torch.ones(3)
    codes = {(f.code, f.where.split(",")[0]) for f in verify(first, second).findings}
    assert ("HX501", "second module") in codes


def test_a_reloaded_module_lends_the_weights_of_the_other(tmp_path: Path) -> None:
    compiled = built()
    compiled.save(tmp_path)
    loaded = HelixModule.load(tmp_path)
    assert verify(loaded, compiled).coverage.conditioned
    report = verify(loaded, HelixModule.load(tmp_path))
    assert report.ok and not report.coverage.conditioned
    assert any("weights are as they are" in note for note in report.notes)


def test_the_captured_graph_is_put_together_again() -> None:
    from helix_compile.capture.model import capture

    model = new_model(torch.float64)
    assert captured_of(helix_compile(model, cp=2)).layers == capture(model).layers


def test_a_module_without_weights_is_refused() -> None:
    with pytest.raises(HelixError, match="second module is on the meta device"):
        verify(built(), built(device="meta"))
