"""One linear that makes q and a gate: which rows make which, near-misses refused with the reason that applies."""

from __future__ import annotations

import re

import pytest
import torch

from helix_compile.ir.graph import node_named
from helix_compile.passes.match.attention import find_attention
from helix_compile.plan.matches import AttentionMatch, HeadLinear, MatchFailure, permuted
from tests.support.graphs import BodyValues
from tests.support.toy_gqa import DK, DV, GATES, H, toy_graph

TOTAL = H * (DK + DV)


def gated_match(gate: str) -> tuple[AttentionMatch, HeadLinear]:
    (match,) = find_attention(toy_graph("repeat", gate))
    assert isinstance(match, AttentionMatch) and match.gate and match.gate.linear, match
    return match, match.gate.linear


@pytest.mark.parametrize(
    ("gate", "width"),
    [("gate from q's linear", DV), ("gate behind all of q", DV), ("gate of a row a head", 1), ("gate heads last", DV)],
)
def test_each_part_is_the_linear_of_its_rows(gate: str, width: int) -> None:
    """Written apart from the match's own rewrite: x W[rows]^T + b[rows], laid out as the part says."""
    match, of_gate = gated_match(gate)
    assert (match.q_proj.node, match.q_proj.weight) == (of_gate.node, of_gate.weight) == ("linear_3", "q_gate.weight")
    assert (match.q_proj.role, match.q_proj.width, of_gate.role, of_gate.width) == ("q", DK, "gate", width)
    graph = toy_graph("repeat", gate)
    values, x = BodyValues(graph), node_named(graph, of_gate.node).args[0].name
    for linear in (match.q_proj, of_gate):
        rows, (part,) = torch.tensor(linear.rows), linear.parts
        weight, bias = values.param(linear.weight)[rows], values.param(linear.bias)[rows]
        heads = torch.einsum("btd,hcd->bthc", values[x], weight) + bias
        laid_out = heads.flatten(2) if part.form == "BT(HC)" else permuted(heads, "BTHC", part.form)
        torch.testing.assert_close(laid_out, values[part.node], rtol=1e-12, atol=1e-12)


def test_parts_of_one_parameter_have_names_and_rows_of_their_own() -> None:
    match, of_gate = gated_match("gate from q's linear")
    names = [rows.name for linear in (match.q_proj, of_gate) for rows in linear.params]
    assert names == ["q_gate.weight.q", "q_gate.bias.q", "q_gate.weight.gate", "q_gate.bias.gate"]
    taken = sorted(row for linear in (match.q_proj, of_gate) for head in linear.rows for row in head)
    assert taken == list(range(TOTAL))


def test_q_that_stays_whole_may_share_its_linear() -> None:
    """The gate is cut; q's heads change places behind it, so that it works at tpa = 1 alone."""
    match, of_gate = gated_match("gate's heads in q's place")
    assert [u.what for u in match.uncut] == ["q"] and of_gate.role == "gate"


MISSES = {
    "gate of rows of q": "the first value behind `linear_3` that is for the gate alone, `sigmoid`, is computed by `sigmoid`",
    "gate of rows that q reads too": f"{H} of {GATES['gate of rows that q reads too']} rows of `linear_3`, {DK - 1} the first, "
    "are read twice by q and the gate, expected once",
    "gate and a row for nothing": f"{H} of {TOTAL + H} rows of `linear_3` reach neither q nor the gate",
    "gate of the token before": f"of shape (2, 1, {H}, {DK + DV}) is not the same channels of each of {H} heads, of its own "
    "sequence and position",
    "gate of a row for some heads": f"of shape (2, 3, {5 * DV}) is not the same channels of each of {H} heads",
    "gate and more of the input": "the gate must come from one linear, it comes from 2",
    "gate scaled with q": "that is for q alone, `slice_1`, is computed by `mul` (aten.mul.Tensor) from rows of q and the gate",
    "gate by a norm over all rows": "is computed by `div` (aten.div.Tensor) from rows of q and the gate",
    "gate and v of q's linear": "reads what `linear_3` makes of both q and the gate",
    "gate read elsewhere": "of the gate is read by `output` too",
}


@pytest.mark.parametrize("miss", MISSES)
def test_near_misses_say_the_reason(miss: str) -> None:
    (failure,) = find_attention(toy_graph("repeat", miss))
    assert isinstance(failure, MatchFailure), failure
    assert re.search(re.escape(MISSES[miss]), failure.reason), failure.reason
    assert failure.node


def test_every_way_to_gate_is_expected() -> None:
    matched = {"gate from q's linear", "gate behind all of q", "gate of a row a head", "gate heads last"}
    assert matched | set(MISSES) | {"gate's heads in q's place"} == set(GATES)
