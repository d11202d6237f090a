"""A gate and q of one linear: exact in every way to lay the rows out, and verify tells a gate that is another's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, helix_compile, verify
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.passes.match import joint
from helix_compile.plan.helix_plan import BodyPlan
from tests.support.families import fresh_family
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.sparse import sparse_deviation
from tests.support.toy_mla import ToyMLA

WAYS = ("behind q", "one row")  # by head: axk2
STEPS = (1, 2, 3, 5, 1)


@cache
def gated_model() -> tuple[Any, CapturedGraph]:
    """A layer for each way."""
    model: Any = fresh_family("youtu", num_hidden_layers=len(WAYS))
    torch.manual_seed(3)
    for layer, gate in enumerate(WAYS):
        model.model.layers[layer].self_attn = ToyMLA("cat", "", layer, gate).double().eval()
    return model, capture(model)


@pytest.mark.parametrize(
    "options",
    [
        {"cp": 2, "tpa": 2},
        {"cp": 5, "pad_heads": True},
        pytest.param({"cp": 1}, marks=pytest.mark.slow),
        pytest.param({"cp": 3, "q_proj": "gather"}, marks=pytest.mark.slow),
        pytest.param({"cp": 4, "merge": "ag_rs", "v_up": "before"}, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "tpa": 5, "pad_heads": True, "q_proj": "gather"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_way_to_lay_the_rows_out(options: dict[str, Any]) -> None:
    model, graph = gated_model()
    run = run_family(model, compiled_family(graph, **options))
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens


def test_every_row_is_in_one_shard_and_on_every_rank_once() -> None:
    """Q over the ranks that compute heads, the gate over those that own them: 12 heads at cp 2, tpa 2."""
    compiled = compiled_family(gated_model()[1], 2, tpa=2)
    for plan in compiled.plan.bodies:
        q, gate = (plan.shard(f"self_attn.q_gate.weight.{role}") for role in ("q", "gate"))
        assert q is not None and gate is not None and plan.shard("self_attn.q_gate.weight") is None
        assert (q.layout, gate.layout) == ("tpa:S(0)", "world:S(0)")
        rows = 12 * 16 // 2, 12 * _width(plan) // 4
        assert (q.shape, gate.shape) == ((rows[0], 28), (rows[1], 28))
    held = sum(t.numel() for n, t in compiled.ranks[0].params.items() if "q_gate.weight" in n)
    assert held == 28 * (2 * 6 * 16 + 3 * (14 + 1))


def _width(plan: BodyPlan) -> int:
    return 1 if plan.layers == (WAYS.index("one row"),) else 14


@cache
def axk2() -> tuple[Any, CapturedGraph]:
    model = fresh_family(
        "axk2", index_topk=7, num_attention_heads=24, num_key_value_heads=24
    )  # captured by test_sparse.py too
    return model, capture(model)


def compiled_axk2(**options: Any) -> HelixModule:
    return helix_compile(axk2()[1], **{"max_batch_size": 3, "max_seq_len": 64, "tokens_per_block": 3, **options})


@pytest.mark.slow
def test_saved_and_loaded(tmp_path: Any) -> None:
    compiled_axk2(cp=2, tpa=2).save(tmp_path / "module")
    assert (
        sparse_deviation(axk2()[0], HelixModule.load(tmp_path / "module"), [5, 2, 19], (1, 2)) <= LIMIT[torch.float64]
    )


def test_zero_heads_have_no_gate() -> None:
    compiled = compiled_axk2(cp=5, pad_heads=True)  # 24 heads, 25 places
    assert sparse_deviation(axk2()[0], compiled, [7, 1, 19], (1, 3)) <= LIMIT[torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_verify_finds_nothing_wrong(dtype: torch.dtype) -> None:
    """In bfloat16 the gate is float32 and the product is cast back behind it."""
    model = fresh_family("axk2", dtype=dtype)
    compiled = helix_compile(model, cp=2, tpa=2, tokens_per_block=4, max_batch_size=3, max_seq_len=256)
    report = verify(compiled, model)
    assert report.ok, report


def swapped_ranks(compiled: HelixModule) -> None:
    params = [rank.params for rank in compiled.ranks]
    for name in [n for n in params[0] if n.endswith("q_gate_proj.weight.gate")]:
        params[0][name], params[1][name] = params[1][name], params[0][name]


def rows_one_late(compiled: HelixModule) -> None:
    for rank in compiled.ranks:
        for name in [n for n in rank.params if n.endswith("q_gate_proj.weight.gate")]:
            rank.params[name] = rank.params[name].roll(1, 0)


def no_sigmoid(compiled: HelixModule) -> None:
    for name, body in compiled.graph.named_children():
        if name.startswith("body"):
            sigmoid = next(n for n in body.graph.nodes if n.name == "o_gated").args[1].args[0]
            assert sigmoid.target is torch.ops.aten.sigmoid.default
            sigmoid.replace_all_uses_with(sigmoid.args[0])
            body.graph.erase_node(sigmoid)
            body.recompile()


@pytest.mark.parametrize(
    ("fault", "codes"),
    [
        pytest.param(swapped_ranks, {"HX201"}, marks=pytest.mark.slow),
        pytest.param(rows_one_late, {"HX202"}, marks=pytest.mark.slow),
        pytest.param(no_sigmoid, {"HX403"}, marks=pytest.mark.slow),
    ],
)
def test_verify_finds_a_gate_that_is_not_the_models(fault: Any, codes: set[str]) -> None:
    model, compiled = axk2()[0], compiled_axk2(cp=2)
    fault(compiled)
    report = verify(compiled, model)
    assert {f.code for f in report.findings} >= codes, report


def test_verify_finds_rows_that_the_matcher_took_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, shards and ranks agree with each other, and each row is held once: only the numbers tell."""
    rows_of = joint._rows

    def next_head(linear: Any, node: Any, role: str, heads: int) -> Any:
        form, rows = rows_of(linear, node, role, heads)
        return form, rows.roll(1, 0) if role == "gate" else rows

    monkeypatch.setattr(joint, "_rows", next_head)
    model, compiled = axk2()[0], compiled_axk2(cp=2)
    monkeypatch.undo()
    assert sparse_deviation(model, compiled, [5, 2, 9], (1,)) > 1e-2
    report = verify(compiled, model)
    assert any(f.check == "numeric" for f in report.findings), report
