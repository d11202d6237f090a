"""lower="triton": what is chosen, what is fused, what stays with its reason, and that the whole step is the model's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from helix_compile import HelixModule, LoweringUnavailable, helix_compile, verify
from helix_compile.ir.graph import calls, helix_op
from helix_compile.ir.stage import nodes_of
from helix_compile.kernels.target import offline_target, target_for
from tests.support.driver import left_padded, random_ids, worst_deviation
from tests.support.models import tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the device")
PLANS = {
    "after": {"cp": 4, "v_up": "after"},
    "before": {"cp": 2, "tpa": 2, "q_proj": "gather"},
    "ag_rs": {"cp": 2, "merge": "ag_rs", "v_up": "before"},
    "one_rank": {"cp": 1},
}


@cache
def triton_module(variant: str, **plan: Any) -> HelixModule:
    """A float32 module by kernels, made once a worker."""
    model = tiny_model(variant, torch.float32)
    return helix_compile(model, lower="triton", max_seq_len=64, tokens_per_block=3, **plan)


def chosen(compiled: HelixModule, body: str) -> dict[str, str]:
    """Node -> overload of the compute ops of a body."""
    gm = compiled.graph.get_submodule(body)
    assert isinstance(gm, fx.GraphModule)
    return {n.name: str(n.target).split(".", 1)[1] for n in gm.graph.nodes if "kernel" in n.meta}


@pytest.mark.parametrize(
    "plan", ["after", "ag_rs", *(pytest.param(p, marks=pytest.mark.slow) for p in ("before", "one_rank"))]
)
def test_the_whole_model_by_kernels(plan: str) -> None:
    """Ragged and left-padded, T > 1, empty shards; sizes that are no powers of two."""
    compiled = triton_module("short", **PLANS[plan])
    compiled.reset()
    model = tiny_model("short", torch.float32)
    assert worst_deviation(model, compiled, [5, 1], (1, 3)) <= 2e-5


@pytest.mark.parametrize("variant", [pytest.param("short_half_rope", marks=pytest.mark.slow), "short_plain_router"])
def test_other_models_by_kernels(variant: str) -> None:
    compiled = triton_module(variant, cp=2)
    assert "moe_router.default" in chosen(compiled, "body_1").values()
    assert "cache_append.norm_rope" in chosen(compiled, "body_0").values()
    assert worst_deviation(tiny_model(variant, torch.float32), compiled, [4], (1,)) <= 2e-5


def test_what_is_fused_with_w_uv_behind_the_exchange() -> None:
    assert chosen(triton_module("short", **PLANS["after"]), "body_1") == {
        "q_rope": "rope_heads.default",
        "visible_now": "cache_append.norm_rope",
        "mla_decode": "mla_decode.splits",
        "packed": "pack_heads.splits",
        "o": "merge_lse.default",
        "router": "moe_router.default",
        "routed": "moe_experts.default",
    }


def test_what_is_left_with_its_reason() -> None:
    """W_UV before the exchange needs merged heads; ag_rs has no exchange buffer, and its rescaling no kernel."""
    compiled = triton_module("short", **PLANS["ag_rs"])
    assert chosen(compiled, "body_0")["mla_decode"] == "mla_decode.default"
    kernels = {k["node"]: k for k in compiled.inspect().facts["kernels"] if k["body"] == "body_0"}
    assert kernels["rescaled_o"]["provider"] == "reference"
    assert kernels["rescaled_o"]["reason"] == "no Triton kernel for rescale_by_lse"
    assert "rescaled_o" in str(compiled.inspect())


def test_float64_keeps_the_references_and_says_why() -> None:
    compiled = helix_compile(tiny_model("short"), cp=2, lower="triton")
    kernels = compiled.inspect().facts["kernels"]
    assert {k["provider"] for k in kernels} == {"reference"}
    assert all("float64" in k["reason"] for k in kernels)
    assert worst_deviation(tiny_model("short"), compiled, [3, 1], (1,)) <= 1e-10


@pytest.mark.parametrize("plan", ["after", "before"])
def test_the_wire_is_the_same(plan: str) -> None:
    """Two all_reduces and one all_to_all a layer, and gathers only where they were asked for."""
    by_kernels = triton_module("short", **PLANS[plan])
    reference = helix_compile(
        tiny_model("short", torch.float32), max_seq_len=64, tokens_per_block=3, lower="reference", **PLANS[plan]
    )
    for name, body in by_kernels.graph.named_children():
        other = reference.graph.get_submodule(name)
        assert isinstance(body, fx.GraphModule) and isinstance(other, fx.GraphModule)
        wires = [[str(n.target) for n in g.graph.nodes if "_c10d_functional" in str(n.target)] for g in (body, other)]
        assert wires[0] == wires[1]
        assert sum("all_reduce" in op for op in wires[0]) == 2


def test_leading_arguments_are_those_of_the_op() -> None:
    """A reader of the lowered graph finds mla_decode's arguments where helix::mla_decode has them."""
    for plan in ("after", "before"):
        body = triton_module("short", **PLANS[plan]).graph.get_submodule("body_0")
        assert isinstance(body, fx.GraphModule)
        (decode,) = [n for n in body.graph.nodes if helix_op(n) == "mla_decode"]
        names = [a.name for a in decode.target._schema.arguments[:6]]
        assert names == ["q_latent", "q_rope", "cache", "page_table", "visible", "scale"]
        assert decode.args[5] == pytest.approx((10 + 6) ** -0.5)
        assert not calls(body.graph, torch.ops.helix.mla_decode.default)


def test_a_reload_is_bitwise(tmp_path: Path) -> None:
    compiled = triton_module("short", **PLANS["after"])
    compiled.reset()
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    ids = random_ids(tiny_model("short"), 2, 4)
    assert torch.equal(loaded(ids), compiled(ids))
    assert chosen(loaded, "body_1") == chosen(compiled, "body_1")


def test_the_text_of_a_body_runs_by_itself(tmp_path: Path) -> None:
    """In a new process, where nothing has registered the kernels: every op that the text names is there."""
    compiled = triton_module("short", **PLANS["after"])
    compiled.inspect(tmp_path)
    text = (tmp_path / "body_1.after.py").read_text()
    ops = sorted(set(re.findall(r"torch\.ops\.helix_triton\.\w+\.\w+", text)))
    assert len(ops) == 7
    script = f"import runpy; runpy.run_path({str(tmp_path / 'body_1.after.py')!r}); import torch; {'; '.join(ops)}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_batch_items_are_independent() -> None:
    """A kernel that mixes rows would show here: alone and beside a longer neighbour."""
    compiled = triton_module("short", **PLANS["after"])
    ids, mask = random_ids(tiny_model("short"), 2, 6), left_padded([6, 2])
    compiled.reset()
    both = compiled(ids, mask)[1, 4:]
    compiled.reset()
    alone = compiled(ids[1:, 4:])[0]
    torch.testing.assert_close(both, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.slow  # a minute of the interpreter
@pytest.mark.parametrize("plan", ["after", "before"])
def test_verify_is_silent_and_sees_an_edit(plan: str) -> None:
    """The static checks alone, on the graph with fused ops; then a scale that is off by a thousandth."""
    model = tiny_model("short", torch.float32)
    compiled = helix_compile(model, lower="triton", max_seq_len=64, tokens_per_block=3, **PLANS[plan])
    report = verify(compiled, model)
    assert report.ok, report
    body = compiled.graph.get_submodule("body_1")
    assert isinstance(body, fx.GraphModule)
    (decode,) = [n for n in body.graph.nodes if helix_op(n) == "mla_decode"]
    decode.args = (*decode.args[:5], decode.args[5] * 1.001, *decode.args[6:])
    body.recompile()
    found = verify(compiled, model)
    assert not found.ok and any("mla_decode" in str(f) for f in found.findings)


def test_refused_without_the_interpreter() -> None:
    """In a process of its own: the variable is read when Triton is imported."""
    script = (
        "from helix_compile import helix_compile\n"
        "from helix_compile.models.presets import build_model, preset_config\n"
        "helix_compile(build_model(preset_config('tiny')), cp=2, lower='triton')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "LoweringUnavailable" in last and "TRITON_INTERPRET=1" in last


def test_auto_is_the_reference_on_a_cpu() -> None:
    assert target_for("auto", torch.device("cpu")) is None
    assert target_for("reference", torch.device("cpu")) is None
    with pytest.raises(LoweringUnavailable, match="got device meta"):
        target_for("triton", torch.device("meta"))
    with pytest.raises(LoweringUnavailable, match=r"sm_42.*sm_100, sm_90"):
        offline_target("sm_42")


def test_greedy_tokens_are_the_models() -> None:
    compiled = triton_module("short", **PLANS["after"])
    model = tiny_model("short", torch.float32)
    ids = random_ids(model, 1, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(compiled.generate(ids, **options), model.generate(ids, **options))


def test_kernels_are_a_stage_of_their_own_with_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_DUMP", str(tmp_path))
    compiled = helix_compile(tiny_model("short", torch.float32), cp=2, lower="triton", max_seq_len=64)
    assert list(compiled.stages) == ["captured", "attention", "reshard", "ffn", "collectives", "lowered"]
    assert not [n for n in nodes_of(compiled.stages["collectives"]) if str(n.target).startswith("helix_triton.")]
    assert [n for n in nodes_of(compiled.graph) if str(n.target).startswith("helix_triton.")]
    assert (tmp_path / "04_collectives.txt").is_file() and (tmp_path / "05_lowered.txt").is_file()
    ids = torch.arange(6).reshape(2, 3)
    before = compiled.run_stage("collectives", ids)
    compiled.reset()
    torch.testing.assert_close(compiled(ids), before, rtol=1e-5, atol=1e-5)
