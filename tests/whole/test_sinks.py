"""Sinks, a logit a head that takes part in the softmax: against the unmodified model; once, on what is merged."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, MatchError
from helix_compile.errors import PassError
from helix_compile.ir.graph import node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.stage import bodies_of
from helix_compile.passes.typing.check_layouts import check_layouts
from tests.support.families import FAMILIES, fresh_family
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import toy_model

SLOW = pytest.mark.slow
EXACT = LIMIT[torch.float64]
PLANS = [{"cp": 1}, {"cp": 2}, {"cp": 4}, {"cp": 2, "tpa": 2, "merge": "ag_rs"}, {"cp": 4, "merge": "ag_rs"}]


@functools.cache
def model_of(name: str) -> Any:
    """gpt_oss: [scores, sinks], the maximum taken off, a column cut off; granite_swa: o * sigmoid(lse - sinks)."""
    return fresh_family(name)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("gpt_oss", {"cp": 4}),
        ("granite_swa", {"cp": 2, "tpa": 2, "merge": "ag_rs"}),
        *(pytest.param(name, plan, marks=SLOW) for name in ("gpt_oss", "granite_swa") for plan in PLANS),
    ],
    ids=str,
)
def test_fp64(name: str, plan: dict[str, Any]) -> None:
    run = run_family(model_of(name), compiled_family(model_of(name), **plan, **FAMILIES[name].options))
    assert run.worst <= EXACT and run.same_tokens


@SLOW
@pytest.mark.parametrize("plan", [{"cp": 2, "tpa": 2}, {"cp": 4, "merge": "ag_rs"}], ids=str)
@pytest.mark.parametrize("style", ["chain", "split", "eager"])
def test_mla_with_sinks(style: str, plan: dict[str, Any]) -> None:
    model = toy_model(style, "sinks")
    run = run_family(model, compiled_family(model, **plan))
    assert run.worst <= EXACT and run.same_tokens


def test_experts_in_no_pattern_are_refused_or_stay_whole_and_are_told() -> None:
    with pytest.raises(MatchError, match=r"experts.gate_up_proj .* looks like expert weights.*unmatched=\"keep\""):
        compiled_family(model_of("gpt_oss"), cp=2)
    compiled = compiled_family(model_of("gpt_oss"), cp=2, unmatched="keep")
    told = dict(compiled.plan.not_rewritten)
    assert "every rank holds and computes all" in told["experts mlp.experts.gate_up_proj"]
    assert not compiled.plan.leaves
    facts = compiled.inspect().facts["layers"]
    assert [x["sinks"] for x in facts] == [[True]] * 2 and [x["windows"] for x in facts] == [[5], [0]]
    assert "attention (window of 5, sinks)" in " ".join(str(compiled.inspect()).split())


def test_a_sink_on_a_part_of_a_softmax_is_no_typed_graph() -> None:
    """What each rank attends to is a part: a sink there would count once a rank."""
    compiled: HelixModule = compiled_family(model_of("granite_swa"), cp=2)
    stage = compiled.stages["ffn"]
    name, body = next(iter(bodies_of(stage).items()))
    check_layouts(body, plan=compiled.plan.body(name), degrees=compiled.plan.layout)
    applied = next(n for n in body.graph.nodes if n.target is helix.apply_sinks.default)
    merged, total, sinks = applied.args
    parts = [node_named(body.graph, n) for n in ("partial_o", "lse")]
    for args in ((parts[0], parts[1], sinks), (merged, parts[1], sinks), (parts[0], total, sinks)):
        applied.args = args
        with pytest.raises(PassError, match=r"sinks on|the lse of all keys"):
            check_layouts(body, plan=compiled.plan.body(name), degrees=compiled.plan.layout)
    applied.args = (merged, total, sinks)


def test_a_row_that_sees_nothing_stays_nothing() -> None:
    o, lse = torch.zeros(1, 2, 3, 4), torch.tensor([[[1.0, 2.0, 3.0], [-torch.inf] * 3]])
    o[0, 0] = 1.0
    got = helix.apply_sinks(o, lse, torch.tensor([0.0, -40.0, 40.0]))
    torch.testing.assert_close(got[0, 0, :, 0], torch.tensor([0.7310586, 1.0, 0.0]))
    assert torch.equal(got[0, 1], torch.zeros(3, 4))
    assert helix.total_lse(torch.full((3, 1, 1, 2), -torch.inf)).tolist() == [[[-torch.inf] * 2]]


def test_fakes_and_schemas() -> None:
    for op, args in (
        (helix.apply_sinks.default, (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4), torch.randn(4))),
        (helix.total_lse.default, (torch.randn(2, 2, 3, 4),)),
        (helix.first_visible.default, (torch.tensor([[-1, 0, 5]]), torch.tensor(1), 2, 3, 4, 0)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
