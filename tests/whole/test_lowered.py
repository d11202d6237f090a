"""What is left in the lowered graph, and the bytes it moves: the plan's sum is what the virtual world counts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import fx
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, HelixOptions, helix_compile
from helix_compile.capture.model import capture
from helix_compile.compile import plan_model
from helix_compile.ir.graph import placeholders
from tests.support.driver import random_ids
from tests.support.models import SIZES, tiny_model


def bodies(compiled: HelixModule) -> list[fx.GraphModule]:
    return [m for _, m in compiled.graph.named_children() if isinstance(m, fx.GraphModule)]


def collectives(body: fx.GraphModule) -> Counter[tuple[str, str]]:
    found = [n for n in body.graph.nodes if str(n.target).startswith("_c10d_functional.")]
    names = [(str(n.target).split(".")[1], n.args[-1]) for n in found]
    waits = sum(n.target is torch.ops._c10d_functional.wait_tensor.default for n in found)
    counted = Counter(name for name in names if name[0] != "wait_tensor")
    assert waits == sum(counted.values())
    return counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_defaults_send_one_all_to_all_and_two_all_reduces(dtype: torch.dtype) -> None:
    experts = "batched_mm" if dtype is torch.float64 else "grouped_mm"
    compiled = helix_compile(tiny_model(dtype=dtype, experts=experts), cp=4, max_seq_len=64)
    expected = {("all_to_all_single", "kvp"): 1, ("all_reduce", "world"): 2}
    assert [dict(collectives(b)) for b in bodies(compiled)] == [expected, expected]


def test_compute_ops_stay_single_nodes() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    dense, moe = (
        Counter(str(n.target) for n in b.graph.nodes if str(n.target).startswith("helix.")) for b in bodies(compiled)
    )
    attention = {f"helix.{op}.default" for op in ("cache_append", "mla_decode", "merge_lse")}
    packing = {"helix.pack_heads.default", "helix.unpack_heads.default"}
    assert set(dense) == attention | packing and set(dense.values()) == {1}
    assert set(moe) == set(dense) | {"helix.moe_experts.default"} and set(moe.values()) == {1}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_works_on_the_whole_context(attention: str) -> None:
    compiled = helix_compile(tiny_model(attention=attention), cp=2, max_seq_len=64)
    for body in bodies(compiled):
        kinds = {p.meta["input"][0] for p in placeholders(body.graph)}
        assert kinds == {"hidden", "tensor", "step", "cache", "param"}
        names = {p.meta["input"][1] for p in placeholders(body.graph)}
        assert not any(n.startswith(("past", "attention_mask")) for n in names)
        assert "self_attn.kv_b_proj.weight" not in names
        targets = {str(n.target) for n in body.graph.nodes}
        assert not targets & {"aten.scaled_dot_product_attention.default", "aten.softmax.int"}


def test_the_graph_knows_no_rank() -> None:
    """One text for all: ranks differ in parameters, cache and two rank numbers only."""
    compiled = helix_compile(tiny_model(), cp=4, tpa=2, max_seq_len=64)
    inputs = {tuple(p.meta["input"]) for p in placeholders(compiled.graph.graph)}
    assert {("input", "kvp_rank"), ("input", "ep_rank")} < inputs
    for rank in compiled.ranks:
        shapes = {n: tuple(t.shape) for n, t in rank.params.items()}
        assert shapes == {n: tuple(t.shape) for n, t in compiled.ranks[0].params.items()}


WIRES: list[dict[str, Any]] = [
    {"cp": 4},
    {"cp": 3, "tpa": 2, "v_up": "before"},
    {"cp": 2, "tpa": 2, "q_proj": "gather", "v_up": "after"},
    {"cp": 8, "merge": "ag_rs", "q_proj": "gather"},
    {"cp": 1, "tpa": 3},
]


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        # the dtype is a factor of each collective: every plan in one, both where lse and output differ in theirs
        *((plan, torch.float64) for plan in WIRES[1:]),
        *((plan, torch.bfloat16) for plan in (WIRES[0], WIRES[3])),
        *(pytest.param(plan, torch.bfloat16, marks=pytest.mark.slow) for plan in (WIRES[1], WIRES[2], WIRES[4])),
        pytest.param(WIRES[0], torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_states_the_bytes_that_are_sent(plan: dict[str, Any], dtype: torch.dtype) -> None:
    experts = "batched_mm" if dtype is torch.float64 else "grouped_mm"
    model = tiny_model(dtype=dtype, experts=experts)
    compiled = helix_compile(model, max_seq_len=64, **plan)
    tokens = 0
    for shape in ((3, 5), (3, 1), (3, 2)):
        compiled(random_ids(model, *shape))
        tokens += shape[0] * shape[1]
    expected = compiled.plan.egress_bytes_per_rank_per_token * tokens
    assert expected > 0 and compiled.world.sent_bytes == [expected] * compiled.plan.layout.world_size
    groups = {axis: len(compiled.world.mesh.groups[axis]) for axis in ("kvp", "world")}
    counted: Counter[tuple[str, str]] = Counter()
    for body, graph in zip(compiled.plan.bodies, bodies(compiled), strict=True):
        assert collectives(graph) == Counter((c.op, c.axis) for c in body.collectives)
        for c in body.collectives:
            counted[(c.op, c.axis)] += 3 * len(body.layers) * groups[c.axis]
    assert compiled.world.num_collectives == counted


# helix-algorithm, section 8: bf16 payload, fp32 lse, tpa = 1, real DeepSeek-V3 widths
BYTES = {
    2: (14336, 73728, 65536, 512, 65792, 16640),
    4: (21504, 110592, 98304, 1536, 98688, 24960),
    8: (25088, 129024, 114688, 3584, 115136, 29120),
    16: (26880, 138240, 122880, 7680, 123360, 31200),
    32: (27776, 142848, 126976, 15872, 127472, 32240),
    64: (28224, 145152, 129024, 32256, 129528, 32760),
}


@pytest.fixture(scope="module")
def real_widths() -> DeepseekV3ForCausalLM:
    """Real widths, one dense and one MoE layer, no weights."""
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return DeepseekV3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("cp", BYTES)
def test_real_bytes_on_the_wire(real_widths: DeepseekV3ForCausalLM, cp: int) -> None:
    reduce, gather_q, scatter_o, gather_lse, latent, after_up = BYTES[cp]

    def moved(**options: Any) -> list[tuple[str, Fraction]]:
        asked = HelixOptions(cp=cp, max_seq_len=64, max_batch_size=1, **options)
        plan = plan_model(capture(real_widths), asked).plan.body("body_0").collectives
        return [(c.op, c.egress_bytes_per_rank_per_token) for c in plan]

    sums = [("all_reduce", reduce)] * 2
    assert moved(v_up="after") == [("all_to_all_single", latent), *sums]
    assert moved(v_up="before") == [("all_to_all_single", after_up), *sums]
    assert moved(merge="ag_rs", q_proj="gather", v_up="after") == [
        ("all_gather_into_tensor", gather_q),
        ("all_gather_into_tensor", gather_lse),
        ("reduce_scatter_tensor", scatter_o),
        *sums,
    ]


def test_every_value_is_typed() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    for stage in ("attention", "reshard", "ffn", "lowered"):
        for _, body in compiled.stages[stage].named_children():
            assert isinstance(body, fx.GraphModule)
            assert all("layout" in n.meta for n in body.graph.nodes)


def test_padding_is_stated_and_zero() -> None:
    """F = 112 over 3 ranks is 38, 38, 36 and two rows of zeros."""
    compiled = helix_compile(tiny_model(), cp=3, max_seq_len=64)
    dense, layout = compiled.plan.body("body_0").ffns[0], compiled.plan.layout
    assert (dense.width, dense.shard_width(layout), dense.padding(layout)) == (
        SIZES["intermediate_size"],
        38,
        (0, 0, 2),
    )
    gate = compiled.ranks[2].params["model.layers.0.mlp.gate_proj.weight"]
    assert torch.count_nonzero(gate[36:]) == 0 and torch.count_nonzero(gate[:36]) > 0
