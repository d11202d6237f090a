"""Predicted costs against figures worked out by hand, and wire bytes against the plan's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helix_compile import HelixError, HelixModule, helix_compile
from helix_compile.errors import LayoutError
from helix_compile.models.presets import build_model, preset_config
from helix_compile.predict.accelerators import PRESETS
from helix_compile.predict.costs import NodeCost, Workload, predict_costs
from helix_compile.predict.schedule import predict_schedule
from tests.support.models import tiny_model
from tests.support.planned import machine


def costs_of(compiled: HelixModule, body: str, step: Workload, rank: int = 0) -> dict[str, NodeCost]:
    graph = compiled.graph.get_submodule(body).graph
    options = compiled.plan.options
    return predict_costs(graph, step, compiled.plan.layout, options.tokens_per_block, rank)


@pytest.mark.parametrize("plan", [{"cp": 4}, {"cp": 2, "tpa": 2, "merge": "ag_rs"}, {"cp": 3, "tpa": 2}], ids=str)
@pytest.mark.parametrize("step", [Workload(5, 1, 900), Workload(2, 3, 40)], ids=str)
def test_wire_bytes_are_the_plans(plan: dict[str, Any], step: Workload) -> None:
    compiled = helix_compile(tiny_model(), max_seq_len=1024, **plan)
    for body in compiled.plan.bodies:
        costs = costs_of(compiled, body.name, step)
        wire = sum(c.wire_bytes for c in costs.values())
        planned = float(body.egress_bytes_per_rank_per_token) * step.batch * step.tokens
        assert wire == pytest.approx(planned, rel=1e-12)


def test_a_cut_head_is_predicted_as_planned_and_as_it_runs() -> None:
    """Wire bytes of the layers and of the graph around them: of the plan, of inspect, and as the virtual world counts them."""
    model = tiny_model()
    compiled = helix_compile(model, cp=4, max_batch_size=3, max_seq_len=64, head="shard", pad_heads=True)
    step = Workload(3, 2, 0)
    events = [
        (1 if schedule.body == "outer" else len(compiled.plan.body(schedule.body).layers), event)
        for schedule in predict_schedule(compiled.plan, compiled.graph, step)
        for event in schedule.events
        if event.rank == 0
    ]
    compiled.world.reset_counters()
    compiled(torch.zeros(3, 2, dtype=torch.int64))
    predicted = sum(times * event.cost.wire_bytes for times, event in events)
    assert [predicted] * 4 == compiled.world.sent_bytes
    assert predicted == compiled.plan.egress_bytes_per_rank_per_token * 6
    facts = compiled.inspect().facts["predicted"]  # of one token a sequence
    said = sum(b["layers"] * c["wire_bytes"] for b in facts["bodies"] for c in b["collectives"])
    assert said == compiled.plan.egress_bytes_per_rank_per_token * 3
    (embedded,) = [e.cost for _, e in events if e.node.name == "embedded_rows"]
    assert embedded.hbm_bytes == 2 * 6 * model.config.hidden_size * model.dtype.itemsize + 6 * 8  # rows, not the table


def test_attention_at_the_real_sizes() -> None:
    """2 B T H s (576 + 512) flops and B s 576 bytes of cache: helix-algorithm, section 14."""
    config = preset_config("deepseek-v3")
    config.num_hidden_layers = 4
    model = build_model(config, dtype=torch.bfloat16, meta=True)
    compiled = helix_compile(model, cp=8, max_seq_len=131072)
    step = Workload(batch=4, tokens=1, context=131071)
    cost = costs_of(compiled, "body_1", step)["mla_decode"]
    local = 131072 // 8
    assert cost.flops == 2 * 4 * 128 * local * (576 + 512)
    activations = 4 * 128 * (576 * 2 + 512 * 2 + 4)  # q, partial_o in bf16, lse in fp32
    assert cost.hbm_bytes == 4 * local * 576 * 2 + activations
    assert cost.seconds(PRESETS["gb200"]) == pytest.approx(
        cost.flops / (0.6 * 2.5e15)
    )  # 239 flops a byte: beyond the ridge, 234
    o_proj = costs_of(compiled, "body_1", step)["linear_4"]
    assert o_proj.flops == 2 * 4 * 7168 * 16384 / 8
    experts = costs_of(compiled, "body_1", step)["routed"]
    assert experts.flops == 6 * 4 * 8 / 8 * 2048 * 7168
    hit = 1 - (1 - 8 / 256) ** 4
    weights = 3 * 2048 * 7168 * 32 * 2
    assert experts.hbm_bytes == pytest.approx(hit * weights + 2 * 4 * 7168 * 2)


def test_ranks_differ_by_their_part_of_the_context() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=1024, tokens_per_block=32)
    flops = [costs_of(compiled, "body_0", Workload(1, 1, 99), r)["mla_decode"].flops for r in range(4)]
    assert [f / flops[3] for f in flops] == [8.0, 8.0, 8.0, 1.0]  # 32, 32, 32 and 4 tokens of 100


def test_views_waits_and_inputs_cost_nothing() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    costs = costs_of(compiled, "body_1", Workload(2, 1, 10))
    for name in ("hidden", "view", "transpose", "getitem", "wait_tensor", "sym_size_int", "output"):
        assert costs[name] == NodeCost(), name
    assert costs["linear_4"].flops > 0 and costs["all_reduce"].is_collective


def test_seconds_are_a_roofline() -> None:
    shares = {"hbm_efficiency": 0.5, "flops_efficiency": 0.25, "launch_us": 1.0}
    latencies = {op: ((2, 2.0, 2.0), (8, 6.0, 6.0)) for op in PRESETS["gb200"].latency_us}
    own = machine(bf16_tflops=4.0, fp8_tflops=8.0, hbm_tb_s=2.0, link_gb_s=5.0, latency_us=latencies, **shares)
    assert NodeCost(flops=10e6, hbm_bytes=10e6).seconds(own) == pytest.approx(11e-6)
    assert NodeCost(flops=40e6, hbm_bytes=10e6).seconds(own) == pytest.approx(41e-6)
    assert NodeCost(flops=40e6, hbm_bytes=10e6, peak="fp8").seconds(own) == pytest.approx(21e-6)
    assert NodeCost(wire_bytes=15e3, collective="all_reduce", peers=4).seconds(own) == pytest.approx(8e-6)  # 1 + 4 + 3
    assert NodeCost().seconds(own) == 0.0  # a view is not launched


def test_refusals() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    graph = compiled.stages["ffn"].get_submodule("body_0").graph
    with pytest.raises(HelixError, match=r"exchanged.*is a move"):
        predict_costs(graph, Workload(1, 1, 1), compiled.plan.layout, 32)
    with pytest.raises(LayoutError, match="batch=0"):
        Workload(0, 1, 1)
