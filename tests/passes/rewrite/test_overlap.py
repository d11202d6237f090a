"""A batch in parts: what the pass and the lowering leave of the graph, and what typing refuses of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import fx

from helix_compile import HelixModule, PassError, helix_compile
from helix_compile.ir.graph import aten, calls, node_named
from helix_compile.ir.ops import helix
from helix_compile.ir.sizes import HINT_B, shape_of
from helix_compile.ir.stage import bodies_of, body_of, copy_module
from helix_compile.passes.rewrite.overlap import overlap_pass
from helix_compile.passes.runner import PassContext
from helix_compile.passes.typing.check_layouts import check_layouts
from tests.support.graphs import captured_tiny
from tests.support.models import tiny_model

OPTIONS: dict[str, Any] = {"cp": 4, "max_seq_len": 64, "overlap": "hopb"}


@cache
def compiled(**options: Any) -> HelixModule:
    return helix_compile(tiny_model("short"), **{**OPTIONS, **options})


def text(gm: fx.GraphModule) -> list[str]:
    """Names of what is of a part, and of what joins them."""
    nodes = [n for n in gm.graph.nodes if "part" in n.meta or n.name == "o_joined"]
    return [n.name for n in nodes if "getitem" not in str(n.target) and n.target is not helix.rows_of_part.default]


def test_moves_of_parts_in_their_order() -> None:
    """W_UV after the exchange has all rows; before it, as many, of which those of other parts are zeros."""
    after = body_of(compiled(v_up="after").stages["overlap"], "body_0")
    up = "mla_decode_part{0} exchanged_part{0}"
    assert text(after) == f"{up.format(0)} {up.format(1)} o_part0 o_part1 o_joined".split()
    before = body_of(compiled(v_up="before").stages["overlap"], "body_0")
    up = "mla_decode_part{0} partial_o_rows_part{0} partial_o_up_rows_part{0} exchanged_part{0}"
    assert text(before) == f"{up.format(0)} {up.format(1)} o_part0 o_part1 o_joined".split()
    assert shape_of(node_named(before.graph, "partial_o_up_rows_part0"))[0] == HINT_B


def test_start_and_wait_stand_apart() -> None:
    lowered = body_of(compiled(v_up="after").stages["lowered"], "body_0")
    assert text(lowered) == [
        "mla_decode_part0",
        "packed",
        "all_to_all_single",
        "mla_decode_part1",
        "packed_1",
        "all_to_all_single_1",
        "wait_tensor",
        "unpacked",
        "o_part0",
        "wait_tensor_1",
        "unpacked_1",
        "o_part1",
        "o_joined",
    ]
    site = compiled(v_up="after").plan.bodies[0].attentions[0]
    assert site.parts == 2 and [c.parts for c in compiled(v_up="after").plan.bodies[0].collectives] == [2, 1, 1]
    # everything that only B is in, is a number of rows of B: no size was fixed to that of the capture
    rows = [str(node_named(lowered.graph, f"o_part{i}").meta["val"].shape[0]) for i in range(2)]
    B = str(node_named(lowered.graph, "o_joined").meta["val"].shape[0])
    assert rows == [f"({B}//2)", f"{B} - (({B}//2))"]


def _of_first(gm: fx.GraphModule, op: Any, place: int) -> None:
    """The second call of an op takes an argument of the first."""
    first, second = calls(gm.graph, op)[:2]
    second.update_arg(place, first.args[place])


def _wait_too_late(gm: fx.GraphModule) -> None:
    unpack = calls(gm.graph, helix.unpack_heads.default)[0]
    unpack.update_arg(0, unpack.args[0].args[0])


def _joined(gm: fx.GraphModule, parts: Callable[[Any], Any]) -> None:
    joined = node_named(gm.graph, "o_joined")
    joined.update_arg(0, parts(joined.args[0]))


def _other_part(gm: fx.GraphModule, part: int, parts: int) -> None:
    for rows in calls(gm.graph, helix.rows_of_part.default):
        if rows.meta["part"][1]:
            rows.args = (rows.args[0], part, parts)


BROKEN: dict[str, tuple[Callable[[fx.GraphModule], None], str]] = {
    "a wait behind its use": (_wait_too_late, "before wait_tensor"),
    "parts swapped": (lambda gm: _joined(gm, lambda parts: parts[::-1]), "rows 1/2, 0/2 are joined, expected 0/2, 1/2"),
    "a part dropped": (lambda gm: _joined(gm, lambda parts: parts[:1]), "rows 0/2 are joined, expected 0/1"),
    "a part twice": (lambda gm: _other_part(gm, 0, 2), "joined with themselves"),
    "rows that overlap": (lambda gm: _other_part(gm, 1, 3), "rows 0/2, 1/3 are joined"),
    "the buffer of another part": (
        lambda gm: _of_first(gm, helix.unpack_heads.default, 0),
        "reads rows of several parts",
    ),
    "the pages of another part": (lambda gm: _of_first(gm, helix.mla_decode.default, 3), "reads rows of several parts"),
    "all rows beside those of a part": (
        lambda gm: calls(gm.graph, helix.mla_decode.default)[0].update_arg(3, node_named(gm.graph, "page_table")),
        "reads all rows and those of a part",
    ),
    "all rows through W_UV": (
        lambda gm: calls(gm.graph, helix.place_rows.default)[0].update_arg(2, 1),
        "placed as 1/2",
    ),
    "a buffer that is written while it is exchanged": (
        lambda gm: _written(gm, calls(gm.graph, helix.pack_heads.default)[0]),
        "has no typing rule",
    ),
}


def _written(gm: fx.GraphModule, packed: fx.Node) -> None:
    start = next(iter(packed.users))
    with gm.graph.inserting_after(start):
        gm.graph.call_function(aten.zero_.default, (packed,)).meta["val"] = packed.meta["val"]


@pytest.mark.parametrize("name", BROKEN)
def test_typing_refuses(name: str) -> None:
    edit, message = BROKEN[name]
    module = compiled(v_up="before" if "W_UV" in name else "after")
    stage = copy_module(module.stages["lowered"])
    gm = body_of(stage, "body_0")
    check_layouts(gm, plan=module.plan.body("body_0"), degrees=module.plan.layout)
    edit(gm)
    with pytest.raises(PassError, match=message):
        check_layouts(gm, plan=module.plan.body("body_0"), degrees=module.plan.layout)


def test_what_is_never_whole_is_refused() -> None:
    module, captured = compiled(), captured_tiny("short")
    gm = body_of(copy_module(module.stages["ffn"]), "body_0")
    merge = calls(gm.graph, helix.merge_lse.default)[0]
    merge.target = helix.total_lse.default
    merge.args = merge.args[1:]
    context = PassContext(captured, {}, module.plan)
    match = type("Match", (), {"body": "body_0"})()
    with pytest.raises(PassError, match="`mla_decode`: what it attends to is never whole"):
        overlap_pass(gm, match, context)


def test_without_overlap_nothing_is_of_a_part() -> None:
    module = helix_compile(tiny_model("short"), cp=4, max_seq_len=64)
    assert "overlap" not in module.stages and not any(d.name == "overlap" for d in module.plan.decisions)
    assert not any("part" in n.meta for b in bodies_of(module.graph).values() for n in b.graph.nodes)
