"""What inspect() says: the same facts as text, JSON and files, and the short view of a block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helix_compile import HelixModule, HelixPlan, helix_compile
from helix_compile.ir.stage import graphs_of
from helix_compile.models.presets import build_model, preset_config
from helix_compile.views.graph_text import parameter_text
from helix_compile.views.inspection import ranges_text
from tests.support.models import fresh_model, tiny_model


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return helix_compile(build_model(preset_config("tiny"), meta=True), cp=4)


def test_before_and_after_of_an_attention_block(compiled: HelixModule) -> None:
    before, after = compiled.inspect().attention_before_after("body_1")
    assert before == [
        "# 6 elementwise ops (norms, rope)",
        "linear = aten.linear(hidden, q_a_proj)  # [B,T,40]",
        "# 6 elementwise ops (norms, rope)",
        "linear_1 = aten.linear(linear, q_b_proj)  # [B,T,320]",
        "linear_2 = aten.linear(hidden, kv_a_proj_with_mqa)  # [B,T,48]",
        "# 18 elementwise ops (norms, rope)",
        "cat_2 = aten.cat([past_latent_0, linear_2], 2)  # [B,1,S+T,32]",
        "cat_3 = aten.cat([past_rope_0, linear_2], 2)  # [B,1,S+T,16]",
        "linear_3 = aten.linear(cat_2, kv_b_proj)  # [B,1,S+T,352]",
        "sdpa = aten.scaled_dot_product_attention(linear_1, linear_3, linear_3, attention_mask)  # [B,8,T,20]",
        "linear_4 = aten.linear(sdpa, o_proj)  # [B,T,128]",
    ]
    assert after[:6] == before[:6]
    assert [line.split(" = ")[1].split("(")[0] for line in after[6:]] == [
        "aten.einsum",
        "helix.cache_append",
        "helix.mla_decode",
        "aten.einsum",
        "helix.all_to_all_heads",
        "helix.merge_lse",
        "aten.linear",
        "helix.reshard",
    ]
    assert after[-1] == "linear_4_sum = helix.reshard(linear_4, 'world:P(sum)', 'R', 4)  # [B,T,128]"


@pytest.mark.parametrize("name", ["tiny", pytest.param("deepseek-v3-lite", marks=pytest.mark.slow), "deepseek-v3"])
def test_short_views_fit_a_screen(name: str) -> None:
    config = preset_config(name)
    config.num_hidden_layers = 4  # the bodies are those of 61 layers
    inspection = helix_compile(build_model(config, meta=True), cp=4).inspect()
    assert max(map(len, str(inspection).splitlines())) <= 110
    for body in inspection.plan.bodies:
        for view in inspection.attention_before_after(body.name):
            assert 8 <= len(view) <= 15
            assert max(map(len, view)) <= 115


def test_text_json_and_files_hold_the_same_facts(compiled: HelixModule, tmp_path: Path) -> None:
    inspection = compiled.inspect(tmp_path / "out")
    assert json.loads(inspection.to_json()) == inspection.facts
    assert json.loads((tmp_path / "out/report.json").read_text()) == inspection.facts
    assert (tmp_path / "out/report.txt").read_text() == str(inspection) + "\n"
    assert HelixPlan.from_json((tmp_path / "out/plan.json").read_text()) == compiled.plan
    for stage, moment in (("captured", "before"), ("lowered", "after")):
        for name, body in compiled.stages[stage].named_children():
            text = (tmp_path / f"out/{name}.{moment}.py").read_text()
            compile(text, name, "exec")  # it is Python
            assert text.count("torch.ops.") >= 0.5 * sum(n.op == "call_function" for n in body.graph.nodes)


def test_facts_are_those_of_the_plan_and_the_graphs(compiled: HelixModule) -> None:
    facts = compiled.inspect().facts
    assert facts["layout"] == {"cp": 4, "tpa": 1, "tpf": 1, "ep": 4}
    assert facts["params_bytes_per_rank"] == sum(t.numel() * t.itemsize for t in compiled.ranks[0].params.values())
    widths = sum(cache.shape[-1] for cache in compiled.ranks[0].cache)
    assert facts["kv_bytes_per_token_per_rank"] == widths * 4 / 4  # float32 over cp
    layers = {layer["body"]: layer["count"] for layer in facts["layers"]}
    sent = sum(c["egress_bytes_per_rank_per_token"] * layers[c["body"]] for c in facts["collectives"])
    assert facts["egress_bytes_per_rank_per_token"] == sent
    reasons = {x["what"]: x["reason"] for x in facts["not_rewritten"]}
    assert {"embedding", "norms", "router", "head"} <= set(reasons) and all(reasons.values())


def test_memory_of_a_rank_is_what_a_rank_holds(compiled: HelixModule) -> None:
    memory = compiled.inspect().facts["memory_per_rank"]
    rank = compiled.ranks[0]
    assert memory["kv_cache_bytes"] == sum(c.numel() * c.itemsize for c in rank.cache)
    assert memory["params_bytes"] == sum(t.numel() * t.itemsize for t in rank.params.values())
    assert memory["total_bytes"] == memory["params_bytes"] + memory["kv_cache_bytes"]
    report = str(compiled.inspect())
    assert f"{memory['kv_cache_bytes']:,} of KV cache = {memory['total_bytes']:,}" in report
    assert "capacity: 8 sequences of 4,096 tokens" in report


def test_predicted_times_say_that_they_are(compiled: HelixModule) -> None:
    inspection = compiled.inspect()
    predicted = inspection.facts["predicted"]
    assert "predicted" in predicted["what"] and predicted["machine"] == "gb200" and predicted["overlap"] is None
    assert (predicted["batch"], predicted["tokens"], predicted["context"]) == (8, 1, 4095)
    for body, collectives in zip(predicted["bodies"], (3, 3), strict=True):
        assert len(body["collectives"]) == collectives
        alone = sum(c["microseconds"] for c in body["collectives"])
        assert body["microseconds_of_a_layer"] > alone > 10.7 + 2 * 4.9  # a layer's collectives wait for each other
        assert all(c["slack_microseconds"] == pytest.approx(0, abs=1e-9) for c in body["collectives"])
        assert all(c["held_microseconds"] == pytest.approx(c["microseconds"]) for c in body["collectives"])
        assert f"{body['microseconds_of_a_layer']:.1f}" in str(inspection)


def test_looking_changes_nothing(compiled: HelixModule, tmp_path: Path) -> None:
    def seen() -> list[str]:
        graphs = [str(g.graph) for s in compiled.stages.values() for _, g in graphs_of(s)]
        metas = [sorted(n.meta) for s in compiled.stages.values() for _, g in graphs_of(s) for n in g.graph.nodes]
        return [compiled.plan.to_json(), *graphs, str(metas)]

    before = seen()
    print(compiled.inspect(tmp_path))
    compiled.explain_node("body_1.all_reduce")
    compiled.stage_diff("captured", "lowered")
    assert seen() == before


def test_padding_and_reach_are_stated() -> None:
    model = tiny_model(dtype=torch.float32, experts="grouped_mm")
    report = str(helix_compile(model, cp=6, max_seq_len=64).inspect())
    assert "padding" in report  # 112 columns over 6 ranks
    too_long = helix_compile(model, cp=2, max_seq_len=4096).inspect()
    assert any("1024" in note for note in too_long.facts["notes"])
    assert "note: " in str(too_long)


def test_a_reloaded_module_can_be_inspected(tmp_path: Path) -> None:
    compiled = helix_compile(fresh_model(dtype=torch.float32), cp=2, max_seq_len=64)
    compiled.save(tmp_path / "saved")
    inspection = HelixModule.load(tmp_path / "saved").inspect(tmp_path / "out")
    before, after = inspection.attention_before_after("body_0")
    assert any("helix.all_to_all_heads" in line for line in before)
    assert any("_c10d_functional.all_to_all_single" in line for line in after)
    kept = {k: v for k, v in inspection.facts.items() if k != "layers"}
    assert kept == {k: v for k, v in compiled.inspect().facts.items() if k != "layers"}


def test_short_texts() -> None:
    assert ranges_text([0, 1, 2, 5]) == "0-2, 5"
    assert parameter_text("self_attn.kv_b_proj.weight.w_uk") == "kv_b_proj.w_uk"
    assert parameter_text("self_attn.q_a_proj.weight") == "q_a_proj"
