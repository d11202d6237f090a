"""verify(): what it accepts, what it finds after a user's edits, and what it must leave alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from helix_compile import HelixError, HelixModule, assert_equivalent, helix_compile, verify
from helix_compile.capture.model import capture
from helix_compile.ir.graph import aten, calls
from helix_compile.verifier import verify as verification
from tests.support.driver import random_ids
from tests.support.models import fresh_model, tiny_model

PLANS: list[dict[str, Any]] = [
    {"cp": 4, "tokens_per_block": 4},
    {"cp": 2, "tpa": 2, "merge": "ag_rs", "q_proj": "gather", "v_up": "after"},
    {"cp": 3, "ep": 1, "tokens_per_block": 1},
    {"cp": 1},
    {"cp": 4, "max_seq_len": 7, "max_batch_size": 1},
]


def short_model(dtype: torch.dtype = torch.float64) -> Any:
    """One layer of each kind; where a finding names one of several layers the model has four."""
    return tiny_model("short", dtype)


def compiled_short(dtype: torch.dtype = torch.float64, variant: str = "short") -> HelixModule:
    return helix_compile(tiny_model(variant, dtype), cp=4, tokens_per_block=4)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(
            o, d, marks=() if (o, d) in ((PLANS[0], torch.bfloat16), (PLANS[1], torch.float64)) else pytest.mark.slow
        )
        for o in PLANS[:2]
        for d in (torch.float64, torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_a_clean_module_is_ok(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Several layers of a body, but in 16 bits, where eight draws are pooled: one of each kind."""
    model = short_model(dtype) if dtype is torch.bfloat16 else tiny_model(dtype=dtype)
    report = verify(helix_compile(model, **options), model)
    assert report.ok, report
    seen = report.coverage
    assert seen.stages == ["attention", "reshard", "ffn", "lowered"] and seen.ranks == 4
    counts = (seen.steps, seen.needles, seen.empty_shards, seen.unequal_shards, seen.padded_rows)
    assert all(counts) and seen.idle_rows and seen.block_boundaries and seen.page_boundaries
    assert seen.full_cache and 0 < seen.largest_deviation <= seen.limit


@pytest.mark.parametrize("options", PLANS[2:], ids=str)
def test_other_plans_are_ok(options: dict[str, Any]) -> None:
    report = verify(helix_compile(short_model(), **options), short_model())
    assert report.ok, report


def test_float64_too_recompiles_the_plan() -> None:
    model = short_model(torch.float32)
    report = verify(helix_compile(model, cp=4, tokens_per_block=4), model, dtype=torch.float64)
    assert report.ok and report.dtype == "float32 and float64", report


def test_nothing_of_the_user_changes() -> None:
    model = short_model()
    weights = copy.deepcopy(model.state_dict())
    compiled, other = compiled_short(), compiled_short()
    prompt, more = random_ids(model, 2, 9), random_ids(model, 2, 1)
    compiled(prompt), other(prompt)
    before = [c.clone() for rank in compiled.ranks for c in rank.cache]
    assert verify(compiled, model).ok
    after = [c for rank in compiled.ranks for c in rank.cache]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert compiled.lengths.tolist() == [9, 9]
    assert torch.equal(compiled(more), other(more))
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_parameter_edit_is_followed_to_its_layer_node_and_rank() -> None:
    compiled = compiled_short(variant="plain")
    name = "model.layers.3.input_layernorm.weight"
    compiled.ranks[2].params[name] = compiled.ranks[2].params[name] * 1.01
    report = verify(compiled, tiny_model())
    text = str(report)
    assert {f.code for f in report.findings} >= {"HX204", "HX401"}
    logits = next(f for f in report.findings if f.code == "HX401")
    assert "stage lowered" in logits.where and "layer 3" in logits.where and "rank 2" in logits.where
    assert "input_layernorm" in logits.where and "position" in logits.where
    assert name in text


def test_an_edit_of_an_earlier_stage_is_named_as_the_first() -> None:
    compiled = compiled_short(variant="plain")
    body = compiled.stages["reshard"].get_submodule("body_1")
    assert isinstance(body, fx.GraphModule)
    silu = calls(body.graph, aten.silu.default)[-1]
    silu.target = aten.relu.default
    body.recompile()
    report = verify(compiled, tiny_model())
    assert all("stage reshard" in f.where for f in report.findings)
    (finding,) = [f for f in report.findings if f.code == "HX401"]  # other experts may follow from it
    assert "layer 2" in finding.where and f"`{silu.name}`" in finding.where


def test_a_capture_that_is_not_the_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is another model's: that is said, and not that the ranks are wrong."""
    model = fresh_model("short")
    compiled = helix_compile(model, cp=2)
    captured = capture(model)
    monkeypatch.setattr(verification, "capture", lambda *args, **kwargs: captured)
    other = copy.deepcopy(model)
    other.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    report = verify(compiled, other)
    assert {"HX407", "HX401"} <= {f.code for f in report.findings}, report


def _raise_in_the_middle(compiled: HelixModule) -> None:
    body = compiled.graph.get_submodule("body_0")
    assert isinstance(body, fx.GraphModule)
    node = calls(body.graph, aten.silu.default)[0]
    node.args = (node.args[0], 1)
    body.recompile()


def _lose_a_parameter(compiled: HelixModule) -> None:
    del compiled.ranks[1].params["model.norm.weight"]


def _wrong_shape(compiled: HelixModule) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    compiled.ranks[1].params[name] = compiled.ranks[1].params[name][:, :-1]


def _no_output(compiled: HelixModule) -> None:
    body = compiled.graph.get_submodule("body_1")
    assert isinstance(body, fx.GraphModule)
    body.graph.erase_node(next(n for n in body.graph.nodes if n.op == "output"))


def _nan(compiled: HelixModule) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    compiled.ranks[0].params[name] = torch.full_like(compiled.ranks[0].params[name], torch.nan)


BROKEN = [_raise_in_the_middle, _lose_a_parameter, _wrong_shape, _no_output, _nan]


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__.strip("_"))
def test_whatever_breaks_is_a_finding(break_it: Any) -> None:
    compiled = compiled_short()
    break_it(compiled)
    report = verify(compiled, short_model())
    assert not report.ok
    json.loads(report.to_json())


def test_a_reloaded_module(tmp_path: Path) -> None:
    compiled_short().save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    report = verify(loaded, short_model())
    assert report.ok and report.coverage.stages == ["lowered"], report
    assert any("reloaded" in note for note in report.notes)
    assert verify(loaded, compiled_short()).ok
    name = "model.layers.0.mlp.up_proj.weight"
    held = [rank.params[name] for rank in loaded.ranks]
    loaded.ranks[0].params[name], loaded.ranks[1].params[name] = held[1], held[0]
    assert "HX201" in {f.code for f in verify(loaded, short_model()).findings}


def test_two_compiled_modules() -> None:
    one = compiled_short()
    other = helix_compile(short_model(), cp=2, tpa=2, merge="ag_rs", tokens_per_block=8)
    report = verify(one, other)
    assert report.ok and 0 < report.coverage.largest_deviation < 1e-10, report
    name = "model.norm.weight"
    for rank in other.ranks:
        rank.params[name] = rank.params[name] * 1.001
    assert "HX409" in {f.code for f in verify(one, other).findings}
    with pytest.raises(HelixError, match=r"two modules in float64 and float32"):
        verify(one, compiled_short(torch.float32))


def test_assert_equivalent() -> None:
    compiled = compiled_short()
    assert_equivalent(compiled, short_model())
    _lose_a_parameter(compiled)
    with pytest.raises(AssertionError, match=r"HX203 .*\n  at parameter model.norm.weight"):
        assert_equivalent(compiled, short_model())


def test_wrong_use_is_refused() -> None:
    compiled = compiled_short()
    with pytest.raises(HelixError, match="must be a HelixModule, got DeepseekV3ForCausalLM"):
        verify(short_model(), compiled)  # type: ignore[arg-type] # the order is wrong
    with pytest.raises(HelixError, match=r"torch\.float64, got torch\.float16"):
        verify(compiled, short_model(), dtype=torch.float16)
    with pytest.raises(HelixError, match="original model or another HelixModule, got int"):
        verify(compiled, 3)  # type: ignore[arg-type] # not a model


def test_the_report_as_json_holds_what_is_printed() -> None:
    compiled = compiled_short()
    _nan(compiled)
    report = verify(compiled, short_model())
    facts = json.loads(report.to_json())
    assert facts["ok"] is False and facts["coverage"]["ranks"] == 4
    for finding in facts["findings"]:
        assert finding["code"] in str(report) and finding["where"] in str(report)


def test_a_parameter_in_another_dtype_is_named() -> None:
    """Its values may be equal after a cast: the graph was captured for one dtype."""
    compiled = compiled_short(torch.float32)
    name = "model.layers.0.input_layernorm.weight"  # ones: equal in any dtype
    compiled.ranks[1].params[name] = compiled.ranks[1].params[name].double()
    report = verify(compiled, short_model(torch.float32))
    assert any(f.code == "HX203" and "float64" in f.got for f in report.findings), report
